"""A model run one decoder layer at a time: only one layer's weights, and what lies outside the layers, are in memory.

The model's own forward pass is kept: stand-ins take the place of its decoder layers, so that everything it computes
around them (embeddings, masks, positions) reaches us as the arguments of a layer, whatever the architecture. A stand-in
either hands its input on or, at the layer that is asked for, ends the pass. The real layers are built from the
checkpoint when it is their turn. What follows the layers (norm and language-model head) is run the same way: the last
stand-in gives back hidden states that are known. An architecture whose layers pass each other more than hidden states
does not fit this; that is found out with stand-ins only, before any layer is read.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.compression.mapping import Feed, map_checkpoint, meta_model
from moe_compress.compression.source import SourceModel
from moe_compress.config import ModelConfig
from moe_compress.errors import first_line


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
    """The model of a checkpoint, to be run one decoder layer at a time.

    Attributes:
        moe_layers: for each decoder layer, the indices of the MoE layers (of `source.map.layers`) in it.
        config: the configuration that the layers look at.
        vocabulary: how many logits a position has.
        picks: whether the head can be run at some positions only; else `logits` costs the same for few as for all.
    """

    def __init__(self, source: SourceModel, settings: ModelConfig, device: torch.device) -> None:
        """Read what the base model has outside its decoder layers, and try whether the architecture fits.

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
        self._ties = _ties(self.model)
        for number, layer in enumerate(self.layers):
            modules[number] = _StandIn(layer, number, self)
        self._path = path
        inside = set(self._base.modules())
        self._others = [(name, module) for name, module in self.model.named_modules() if module not in inside]
        self._fill((name, module) for name, module in self.model.named_modules() if module in inside)
        self._stop: int | None = None
        self._last: Tensor | None = None
        self._as_tuple = False
        self._seen: list[Tensor] | None = None
        self._check()
        self.vocabulary = int(self.config.get_text_config().vocab_size)
        self.picks = picks_positions(self.model)

    def layer(self, number: int) -> nn.Module:
        """A decoder layer with its weights, on the device, in evaluation mode."""
        block = deepcopy(self.layers[number])
        root = f"{self._path}.{number}"
        self._fill([(f"{root}.{name}" if name else root, module) for name, module in block.named_modules()])
        return block

    def experts(self, block: nn.Module, number: int) -> dict[int, nn.Module]:
        """The experts modules of a decoder layer that `layer` gave, by the index of the MoE layer."""
        return {index: block.get_submodule(name) for index, name in self._experts_inside[number].items()}

    def call(self, number: int, input_ids: Tensor, position_ids: Tensor | None = None) -> LayerCall:
        """What the model calls a decoder layer with for token ids [B, L].

        The hidden states are those of the embedding: right for the first layer, of the right shape for the others.

        Args:
            position_ids: [B, L]; where they start anew, Transformers lets no attention across. None counts from 0.
        """
        self._stop = number
        positions = {} if position_ids is None else {"position_ids": position_ids.to(self.device)}
        try:
            self._base(input_ids=input_ids.to(self.device), use_cache=False, **positions)
        except _Reached as reached:
            return reached.call
        finally:
            self._stop = None
        raise DoesNotFit(f"its forward pass does not come to layer {number}")

    @contextmanager
    def head(self) -> Iterator[None]:
        """A block in which what the model has beside its base, the language-model head, is in memory too."""
        self._fill(self._others)
        try:
            yield
        finally:
            for _, module in self._others:
                for key, parameter in module.named_parameters(recurse=False):
                    module.register_parameter(key, nn.Parameter(torch.empty_like(parameter, device="meta"), False))

    def logits(self, input_ids: Tensor, hidden_states: Tensor, start: int, stop: int) -> Tensor:
        """The logits at the positions from `start` up to `stop`, given what the last decoder layer has put out.

        To be called within `head`; gradients go to the hidden states.

        Args:
            input_ids: [B, L].
            hidden_states: [B, L, H].

        Returns:
            [B, stop - start, V].
        """
        self._last = hidden_states
        positions = torch.arange(start, stop, device=self.device)
        picked = {"logits_to_keep": positions} if self.picks else {}
        try:
            logits: Tensor = self.model(input_ids=input_ids.to(self.device), use_cache=False, **picked).logits
        finally:
            self._last = None
        return logits if self.picks else logits[:, start:stop]

    def check_head(self) -> None:
        """Try whether the head can be run, and backward, from the hidden states after the last layer.

        Raises:
            DoesNotFit: it cannot.
        """
        ids = torch.ones(1, 4, dtype=torch.long, device=self.device)
        states = self.call(0, ids).hidden_states.detach().requires_grad_()
        with self.head():
            try:
                with torch.enable_grad():
                    logits = self.logits(ids, states, 1, 3)
                    logits.float().logsumexp(-1).sum().backward()
            except Exception as error:  # whatever a model raises whose head asks for more
                raise DoesNotFit(f"its head cannot be run by itself ({first_line(error)})") from error
        if logits.shape[:2] != (1, 2) or states.grad is None:
            raise DoesNotFit("its head takes more than the hidden states of its last layer")

    def _on_layer(self, number: int, call: LayerCall) -> Any:
        if self._stop == number:
            raise _Reached(call)
        hidden_states = call.hidden_states
        if self._seen is not None:
            self._seen.append(hidden_states)
        if self._last is not None and number == len(self.layers) - 1:
            hidden_states = self._last
        return (hidden_states,) if self._as_tuple else hidden_states

    @torch.no_grad()
    def _check(self) -> None:
        """Whether hidden states, and nothing else, go from layer to layer, each once and in order."""
        ids = torch.ones(1, 4, dtype=torch.long, device=self.device)
        reason = ""
        for self._as_tuple in (False, True):
            seen: list[Tensor] = []
            self._seen = seen
            try:
                self._base(input_ids=ids, use_cache=False)
            except Exception as error:  # whatever a model raises that does not get from its layers what it expects
                reason = f"its layers hand on more than hidden states ({type(error).__name__}: {error})"
                continue
            finally:
                self._seen = None
            if len(seen) == len(self.layers) and all(states is seen[0] for states in seen):
                return
            reason = "something happens to the hidden states between its layers"
        raise DoesNotFit(" ".join(reason.split()))

    @torch.no_grad()
    def _fill(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Give every parameter and buffer of modules, by their names in the model, its value, on the device."""
        made: dict[str, Tensor] = {}
        for name, module in list(modules):
            prefix = f"{name}." if name else ""
            for key, parameter in list(module.named_parameters(recurse=False)):
                value = self._value(prefix + key, parameter, made)
                if value is None:
                    value = self._tied_value(prefix + key)
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

    def _tied_value(self, name: str) -> Tensor | None:
        """The tensor of a parameter that is tied to one of the base model (or makes that one, if it is the stored)."""
        for partner in self._ties.get(name, ()):
            parameter = self.model.get_parameter(partner)
            value = self._value(partner, parameter, {}) if parameter.is_meta else parameter.detach()
            if value is not None:
                return value
        return None


def _ties(model: Any) -> dict[str, list[str]]:
    """For each parameter that is tied to others, their names."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    for name, partner in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        both = groups[id(model.get_parameter(name))] | groups[id(model.get_parameter(partner))]
        groups.update({id(model.get_parameter(each)): both for each in both})
    return {name: sorted(names - {name}) for names in groups.values() if len(names) > 1 for name in names}


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


def picks_positions(model: PreTrainedModel) -> bool:
    """Whether a model's forward pass can be asked for the logits of some positions only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def compute_dtype(source: SourceModel, settings: ModelConfig) -> torch.dtype:
    """The type that `from_pretrained` would load the model in."""
    declared: str | torch.dtype | None = settings.dtype if settings.dtype != "auto" else source.map.model.config.dtype
    if isinstance(declared, str):
        return getattr(torch, declared.removeprefix("torch."))
    entries = (source.checkpoint[name] for name in source.map.passthrough)
    floating = (entry.torch_dtype for entry in entries if entry.torch_dtype.is_floating_point)
    return declared or next(floating, torch.float32)
