"""A model run one decoder layer at a time: only one layer's weights, and what lies outside the layers, are in memory.

The model's own forward pass is kept: stand-ins take the place of its decoder layers, so that everything it computes
around them (embeddings, masks, positions) reaches us as the arguments of a layer, whatever the architecture. A stand-in
either hands its input on or, at the layer that is asked for, ends the pass. The real layers are built from the
checkpoint when it is their turn. An architecture whose layers pass each other more than hidden states does not fit
this; that is found out with stand-ins only, before any layer is read.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.compression.mapping import Feed, map_checkpoint, meta_model
from moe_compress.compression.source import SourceModel
from moe_compress.config import ModelConfig


class DoesNotFit(Exception):
    """This architecture cannot be run layer by layer; the message says why."""


class _Reached(BaseException):
    """Ends a forward pass at a decoder layer. Not an Exception: no model's code is to catch it."""

    def __init__(self, call: LayerCall) -> None:
        super().__init__()
        self.call = call


@dataclass(frozen=True)
class LayerCall:
    """What a model calls one of its decoder layers with: hidden states [B, L, H], and everything else."""

    hidden_states: Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """The layer's output for other hidden states of the same shape."""
        output = layer(hidden_states, *self.arguments, **self.keywords)
        return output[0] if isinstance(output, tuple) else output


class _StandIn(nn.Module):
    """Takes the place of a decoder layer, with all its attributes (its attention type, say) but without its weights."""

    def __init__(self, layer: nn.Module, number: int, owner: LayerwiseModel) -> None:
        super().__init__()
        self.__dict__.update(_layer=layer, _number=number, _owner=owner)  # past nn.Module: none of it is a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        if arguments:
            hidden_states, *rest = arguments
        else:
            hidden_states, rest = keywords.pop("hidden_states"), []
        return self.__dict__["_owner"]._on_layer(
            self.__dict__["_number"], LayerCall(hidden_states, tuple(rest), keywords)
        )


class LayerwiseModel:
    """The base model of a checkpoint, to be run one decoder layer at a time.

    Attributes:
        moe_layers: for each decoder layer, the indices of the MoE layers (of `source.map.layers`) in it.
        config: the configuration that the layers look at.
    """

    def __init__(self, source: SourceModel, settings: ModelConfig, device: torch.device) -> None:
        """Read what lies outside the decoder layers, and try whether the architecture fits.

        Raises:
            DoesNotFit: it does not; the message says why.
            UserError: a tensor holds NaN or infinity.
        """
        self.checkpoint = source.checkpoint
        self.device = device
        self.dtype = compute_dtype(source, settings)
        config = deepcopy(source.map.model.config)
        self.model = meta_model(config, dtype=self.dtype, trust_remote_code=settings.trust_remote_code).eval()
        self.config = self.model.config
        self._base: nn.Module = self.model.base_model
        mapped = map_checkpoint(source.checkpoint, self.model)
        self._feeds: dict[str, Feed] = {target: feed for feed in mapped.feeds for target in feed.targets}
        plan = self.model._get_dtype_plan(self.dtype)
        self._kept_wide = re.compile("|".join(key.replace("*", ".*") for key in plan)) if plan else None
        path = layer_list(self.model, [layer.name for layer in mapped.layers])
        modules: Any = self.model.get_submodule(path)
        self.layers: list[nn.Module] = list(modules)
        prefixes = [f"{path}.{number}." for number in range(len(self.layers))]
        self.moe_layers = [
            [layer.index for layer in mapped.layers if layer.name.startswith(prefix)] for prefix in prefixes
        ]
        self._experts_inside = [
            {layer.index: layer.name.removeprefix(prefix) for layer in mapped.layers if layer.name.startswith(prefix)}
            for prefix in prefixes
        ]
        for number, layer in enumerate(self.layers):
            modules[number] = _StandIn(layer, number, self)
        self._path = path
        self._fill(self._base, next(name for name, module in self.model.named_modules() if module is self._base))
        self._stop: int | None = None
        self._as_tuple = False
        self._seen: list[Tensor] = []
        self._check()

    def layer(self, number: int) -> nn.Module:
        """A decoder layer with its weights, on the device, in evaluation mode."""
        block = deepcopy(self.layers[number])
        self._fill(block, f"{self._path}.{number}")
        return block

    def experts(self, block: nn.Module, number: int) -> dict[int, nn.Module]:
        """The experts modules of a decoder layer that `layer` gave, by the index of the MoE layer."""
        return {index: block.get_submodule(name) for index, name in self._experts_inside[number].items()}

    def call(self, number: int, input_ids: Tensor) -> LayerCall:
        """What the model calls a decoder layer with for token ids [B, L].

        The hidden states are those of the embedding: right for the first layer, of the right shape for the others.
        """
        self._stop = number
        try:
            self._base(input_ids=input_ids.to(self.device), use_cache=False)
        except _Reached as reached:
            return reached.call
        finally:
            self._stop = None
        raise DoesNotFit(f"its forward pass does not come to layer {number}")

    def _on_layer(self, number: int, call: LayerCall) -> Any:
        if self._stop == number:
            raise _Reached(call)
        self._seen.append(call.hidden_states)
        return (call.hidden_states,) if self._as_tuple else call.hidden_states

    @torch.inference_mode()
    def _check(self) -> None:
        """Whether hidden states, and nothing else, go from layer to layer, each once and in order."""
        ids = torch.ones(1, 4, dtype=torch.long, device=self.device)
        reason = ""
        for self._as_tuple in (False, True):
            self._seen = []
            try:
                self._base(input_ids=ids, use_cache=False)
            except Exception as error:  # whatever a model raises that does not get from its layers what it expects
                reason = f"its layers hand on more than hidden states ({type(error).__name__}: {error})"
                continue
            if len(self._seen) == len(self.layers) and all(seen is self._seen[0] for seen in self._seen):
                self._seen = []
                return
            reason = "something happens to the hidden states between its layers"
        raise DoesNotFit(" ".join(reason.split()))

    @torch.no_grad()
    def _fill(self, root: nn.Module, root_name: str) -> None:
        """Give every parameter and buffer below `root`, whose name in the model is given, its value, on the device."""
        made: dict[str, Tensor] = {}
        for relative, module in list(root.named_modules()):
            prefix = "".join(f"{part}." for part in (root_name, relative) if part)
            for key, parameter in list(module.named_parameters(recurse=False)):
                value = self._value(prefix + key, parameter, made)
                if value is None:
                    raise DoesNotFit(f"the parameter {prefix}{key} has no tensor of its own in the checkpoint")
                module.register_parameter(key, nn.Parameter(value, requires_grad=False))
            unset = []
            for key, buffer in list(module.named_buffers(recurse=False)):
                value = self._value(prefix + key, buffer, made)
                if value is None:
                    value = torch.empty_like(buffer, device=self.device)
                    if value.is_floating_point():
                        value.fill_(float("nan"))
                    unset.append(key)
                module.register_buffer(key, value, persistent=key not in module._non_persistent_buffers_set)
            if unset:  # computed from the configuration, as from_pretrained does for what no checkpoint holds
                for tensor in module.parameters(recurse=False):
                    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
                self.model._init_weights(module)
            for key in unset:
                buffer = module.get_buffer(key)
                if buffer.is_floating_point() and bool(buffer.isnan().any()):
                    raise DoesNotFit(f"the buffer {prefix}{key} is in no checkpoint and cannot be computed")

    def _value(self, name: str, like: Tensor, made: dict[str, Tensor]) -> Tensor | None:
        """The tensor of a parameter or buffer; `made` holds what one conversion has made beside what was asked for."""
        if name not in made:
            feed = self._feeds.get(name)
            if feed is None:
                return None
            made.update(feed.convert(self.checkpoint.finite_tensor, self.model))
        value = made.pop(name)
        dtype = like.dtype
        if self._kept_wide is not None and self._kept_wide.search(name):
            dtype = torch.float32
        return value.to(self.device, dtype if value.is_floating_point() else value.dtype)


def layer_list(model: nn.Module, names: list[str]) -> str:
    """The name of the list of decoder layers: the outermost one around the experts, the same for all.

    Args:
        names: of the experts modules.

    Raises:
        DoesNotFit: there is none.
    """
    found = set()
    for name in names:
        parts = name.split(".")
        paths = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        lists = [path for path in paths if isinstance(model.get_submodule(path), nn.ModuleList)]
        found.add(lists[0] if lists else "")
    if len(found) != 1 or "" in found:
        raise DoesNotFit("its MoE layers are not in one list of layers")
    return found.pop()


def compute_dtype(source: SourceModel, settings: ModelConfig) -> torch.dtype:
    """The type that `from_pretrained` would load the model in."""
    declared: str | torch.dtype | None = settings.dtype if settings.dtype != "auto" else source.map.model.config.dtype
    if isinstance(declared, str):
        return getattr(torch, declared.removeprefix("torch."))
    entries = (source.checkpoint[name] for name in source.map.passthrough)
    floating = (entry.torch_dtype for entry in entries if entry.torch_dtype.is_floating_point)
    return declared or next(floating, torch.float32)
