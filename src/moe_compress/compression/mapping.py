"""From the names in a checkpoint to the experts modules of the Transformers model, by Transformers' own tables.

The model is built without memory (on the meta device) from its configuration, and every name on disk is put through
the renamings and converters that `from_pretrained` would apply. So any layout that Transformers reads (one matrix per
expert under each architecture's names, fused 3-D tensors, the older names of either) is read here, without a table of
ours. What feeds an experts module is loaded one layer at a time; everything else is passed through.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from moe_compress.compression.checkpoint import Checkpoint
from moe_compress.errors import UserError, first_line
from moe_compress.modeling import ExpertsModule, find_experts


@dataclass
class Feed:
    """The disk tensors that make one parameter (or, through one converter, several)."""

    targets: tuple[str, ...]  # full parameter names; the first is the one that the converter is called for
    converter: WeightConverter | None  # None: the only source is the parameter itself
    sources: list[tuple[str, str]] = field(default_factory=list)  # (source pattern, name on disk), in loading order

    def convert(self, read: Callable[[str], Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Make the parameters from the tensors that `read` gives for names on disk."""
        if self.converter is None:
            return {self.targets[0]: read(self.sources[0][1])}
        converter = deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.targets[0], name, pattern, partial(read, name))  # type: ignore[arg-type]
        made = converter.convert(self.targets[0], model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass
class MoeLayer:
    """One experts module and where its parameters lie on disk."""

    index: int
    experts: ExpertsModule
    feeds: list[Feed]
    dtypes: dict[str, torch.dtype]  # parameter name within the module to its type on disk

    @property
    def name(self) -> str:
        return self.experts.name

    @property
    def disk_names(self) -> list[str]:
        return [name for feed in self.feeds for _, name in feed.sources]


@dataclass
class ModelMap:
    """What every tensor of a checkpoint is for."""

    model: PreTrainedModel  # on the meta device
    layers: list[MoeLayer]
    passthrough: list[str]  # names on disk that are copied as they are
    unused: list[str]  # the part of `passthrough` that the model does not load, such as extra prediction layers
    feeds: list[Feed]  # of every parameter and buffer that is in the checkpoint

    def load(self, checkpoint: Checkpoint, layer: MoeLayer) -> dict[str, Tensor]:
        """Read the parameters of one experts module, as the module holds them.

        Returns:
            `gate_up_proj` (or `up_proj`), `down_proj` and, where there are any, `gate_up_proj_bias` and
            `down_proj_bias`; 3-D and 2-D, in the type on disk and the layout of the module ([E, out, in], or
            [E, in, out] where `is_transposed`).

        Raises:
            UserError: a tensor holds NaN or infinity, or its shard was cut short.
        """
        tensors: dict[str, Tensor] = {}
        for feed in layer.feeds:
            for name, tensor in feed.convert(checkpoint.finite_tensor, self.model).items():
                tensors[name.removeprefix(f"{layer.name}.")] = tensor
        return tensors


def meta_model(
    config: PretrainedConfig, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the causal language model of a configuration without memory for its weights.

    Args:
        dtype: type of its parameters; None takes that of the configuration.

    Raises:
        UserError: Transformers has no causal language model for it.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                deepcopy(config), trust_remote_code=trust_remote_code, **({} if dtype is None else {"dtype": dtype})
            )
    except Exception as error:  # whatever the constructor of a model raises, remote code included
        raise UserError(
            f"model type '{config.model_type}' cannot be built as a causal language model: {first_line(error)}"
        ) from error
    return model


def map_checkpoint(checkpoint: Checkpoint, model: PreTrainedModel) -> ModelMap:
    """Find out what every tensor of a checkpoint is for. Reads no tensor.

    Args:
        model: the model that Transformers builds for the checkpoint, on the meta device.

    Raises:
        UserError: the model is dense or its experts are of a kind that cannot be compressed; a tensor is missing, or
            has another shape than the model wants; each message names the tensor.
    """
    experts = find_experts(model)
    owners = {f"{found.name}.{key}": found.name for found in experts for key in _expert_parameters(found)}
    feeds, unused = _assign(checkpoint, model)
    by_layer: dict[str, list[Feed]] = {found.name: [] for found in experts}
    passthrough: list[str] = list(unused)
    for feed in feeds:
        owning = {owners.get(target) for target in feed.targets}
        if owning == {None}:
            passthrough.extend(name for _, name in feed.sources)
        elif len(owning) == 1:
            by_layer[str(owning.pop())].append(feed)
        else:
            raise UserError(
                f"tensor {feed.sources[0][1]} holds the experts of several modules ({', '.join(map(str, owning))}); "
                "such checkpoints are not supported"
            )
    produced = {target for feed in feeds for target in feed.targets}
    dtypes = _check_experts(checkpoint, model, owners, by_layer, produced)
    _check_others(checkpoint, model, owners, produced)
    layers = [
        MoeLayer(
            index,
            found,
            by_layer[found.name],
            {key: dtypes[f"{found.name}.{key}"] for key in _expert_parameters(found)},
        )
        for index, found in enumerate(experts)
    ]
    order = {name: position for position, name in enumerate(sorted(checkpoint, key=dot_natural_key))}
    return ModelMap(
        model,
        layers,
        sorted(passthrough, key=order.__getitem__),
        sorted(unused, key=order.__getitem__),
        feeds,
    )


def _assign(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[list[Feed], list[str]]:
    """Group the names on disk by the parameters they make, exactly as `from_pretrained` does; and those it ignores."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    feeds: dict[str, Feed] = {}
    unused: list[str] = []
    for name in sorted(checkpoint, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            unused.append(name)
        elif pattern is None:
            if target in feeds:
                raise UserError(f"tensors {feeds[target].sources[0][1]} and {name} are both stored for {target}")
            feeds[target] = Feed((target,), None, [(name, name)])
        else:
            if target not in feeds:
                first, *others = converter_of[pattern].target_patterns
                targets = (target, *(target.replace(first, other) for other in others))
                feeds[target] = Feed(targets, converter_of[pattern])
            feeds[target].sources.append((pattern, name))
    return list(feeds.values()), unused


def _expert_parameters(experts: ExpertsModule) -> list[str]:
    """Names of the parameters of an experts module; refuses what the compressed module would have no place for."""
    known = {name for projection in experts.projections for name in (projection, f"{projection}_bias")}
    names = list(experts.module.state_dict())
    for name in names:
        if name not in known:
            raise UserError(
                f"{experts.name} ({type(experts.module).__name__}) has the parameter {name}, which the compressed "
                "experts cannot hold; this architecture is not supported"
            )
    return names


def _check_experts(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    owners: dict[str, str],
    by_layer: dict[str, list[Feed]],
    produced: set[str],
) -> dict[str, torch.dtype]:
    """Convert shapes only, on the meta device, so that anything missing is found before any work.

    Returns:
        Full name of each expert parameter to the type that its tensors have on disk.
    """
    state = model.state_dict()
    dtypes: dict[str, torch.dtype] = {}
    missing = [target for target in owners if target not in produced]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{checkpoint.path} has no tensor for {missing[0]}{more}; the checkpoint is incomplete")

    def shape_of(name: str) -> Tensor:
        entry = checkpoint[name]
        return torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta")

    for feed in (feed for feeds in by_layer.values() for feed in feeds):
        experts = state[feed.targets[0]].shape[0]
        gap = _gap(feed, experts)
        if gap:
            raise UserError(f"{checkpoint.path} lacks a tensor of {feed.targets[0]}: {gap}")
        try:
            made = feed.convert(shape_of, model)
        except Exception as error:  # whatever an operation of Transformers says about shapes it cannot join
            raise UserError(
                f"the tensors for {feed.targets[0]} in {checkpoint.path} do not fit together: {first_line(error)}"
            ) from error
        for target in feed.targets:
            if target not in made or made[target].shape != state[target].shape:
                found = list(made[target].shape) if target in made else "nothing"
                raise UserError(
                    f"the tensors for {target} in {checkpoint.path} make {found}, but the configuration asks for "
                    f"{list(state[target].shape)}"
                )
            dtypes[target] = made[target].dtype
    return dtypes


def _gap(feed: Feed, experts: int) -> str | None:
    """The first expert whose tensor is missing from a one-matrix-per-expert layout, by its name on disk."""
    if feed.converter is None:
        return None
    by_pattern = {
        pattern: [name for found, name in feed.sources if found == pattern]
        for pattern in feed.converter.source_patterns
        if "*" in pattern
    }
    for pattern, names in by_pattern.items():
        if len(names) == experts:
            continue
        if not names:
            return f"no tensor matches {pattern}"
        numbered = [_expert_number(pattern, name) for name in names]
        absent = sorted(set(range(experts)) - {number for _, number, _ in numbered})
        if absent:
            before, _, after = numbered[0]
            return f"{before}{absent[0]}{after} is missing ({len(names)} of {experts} found)"
        return f"{len(names)} tensors match {pattern} for {experts} experts"
    return None


def _expert_number(pattern: str, name: str) -> tuple[str, int, str]:
    """Split a name like `...experts.3.w1.weight` at the number that the star of its pattern stands for."""
    tail = pattern.rsplit("*", 1)[1].replace("\\", "")
    match = re.search(r"(.*?)(\d+)(" + re.escape(tail) + r"\w*)$", name)
    return (match[1], int(match[2]), match[3]) if match else (name, -1, "")


def _check_others(checkpoint: Checkpoint, model: PreTrainedModel, owners: dict[str, str], produced: set[str]) -> None:
    """Refuse parameters that have no tensor, nor are tied to one that has: they would be random after loading."""
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or []]
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    tied: dict[str, Any] = getattr(model, "all_tied_weights_keys", None) or {}
    for names in names_of.values():
        group = {*names, *(str(tied[name]) for name in names if name in tied)}
        if group & produced or group & owners.keys():
            continue
        if any(pattern.search(name) for pattern in ignored for name in names):
            continue
        raise UserError(f"{checkpoint.path} has no tensor for {names[0]}; the checkpoint is incomplete")
