"""Finding the experts of any Transformers MoE, and reading and writing their weights in one convention, [E, out, in].

Experts are known by the attributes that Transformers' `use_experts_implementation` sets, never by class name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.errors import UserError

# Set by the decorator on every experts module; a module with all of them takes part in the experts interface.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# Names that routers, MoE blocks and configs use for the number of experts per token.
_TOP_K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "topk",
)


@dataclass(frozen=True)
class ExpertsModule:
    """The experts of one MoE layer.

    Attributes:
        name: the module's name in the model, such as `model.layers.0.mlp.experts`.
        projections: (E, out, in) of `gate_up_proj` (or `up_proj`, where there is no gate) and of `down_proj`,
            whatever the layout in memory.
    """

    name: str
    module: nn.Module
    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    projections: dict[str, tuple[int, int, int]]


def is_experts(module: nn.Module) -> bool:
    """Whether the module is an original (not compressed) experts module of Transformers' experts interface."""
    return all(mark in module.__dict__ for mark in _MARKS) and not hasattr(module, "original_class")


def up_projection(module: Any) -> str:
    """The name of the first projection: `gate_up_proj`, or `up_proj` where there is no gate."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def describe_experts(name: str, module: Any) -> ExpertsModule:
    """The facts of one experts module.

    Raises:
        UserError: the module has something that a shared core cannot stand for.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise UserError(
            f"{name}: {type(module).__name__} normalizes the output of each expert (post_expert_norm), which a core "
            "applied once per token cannot reproduce; this architecture cannot be compressed"
        )
    up = up_projection(module)
    parameters = dict(module.named_parameters(recurse=False))
    expected = {up, "down_proj"} | ({f"{up}_bias", "down_proj_bias"} if module.has_bias else set())
    if set(parameters) != expected:
        raise UserError(
            f"{name}: {type(module).__name__} has the parameters {sorted(parameters)} where {sorted(expected)} are "
            "expected; this architecture cannot be compressed"
        )
    shapes: dict[str, tuple[int, int, int]] = {}
    for projection in (up, "down_proj"):
        weight = parameters[projection]
        if weight.dim() != 3 or weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise UserError(
                f"{name}.{projection} is {weight.dtype} of shape {tuple(weight.shape)}; compression needs "
                "floating-point weights [experts, rows, columns]: load the model dequantized"
            )
        experts, rows, columns = weight.shape
        shapes[projection] = (experts, columns, rows) if module.is_transposed else (experts, rows, columns)
    experts, hidden, intermediate = shapes["down_proj"]
    if shapes[up] != (experts, intermediate * (2 if module.has_gate else 1), hidden):
        raise UserError(
            f"{name}: {up} {shapes[up]} does not fit down_proj {shapes['down_proj']} (as [experts, out, in])"
        )
    return ExpertsModule(
        name=name,
        module=module,
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        has_gate=module.has_gate,
        has_bias=module.has_bias,
        is_transposed=module.is_transposed,
        is_concatenated=module.is_concatenated,
        projections=shapes,
    )


def find_experts(model: nn.Module) -> list[ExpertsModule]:
    """All original experts modules of a model, in the order of its layers; works on the meta device.

    Raises:
        UserError: a dense model, a model that is compressed already, or experts that cannot be compressed.
    """
    found = [describe_experts(name, module) for name, module in model.named_modules() if is_experts(module)]
    if found:
        return found
    label = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    if any(hasattr(module, "original_class") for module in model.modules()):
        raise UserError(f"{label} is compressed already; give the original model")
    for name, module in model.named_modules():
        if "expert" in type(module).__name__.lower():  # for the message only
            raise UserError(
                f"{label} ({type(model).__name__}) has experts ({type(module).__name__} at {name}) outside of "
                "Transformers' experts interface, so that nothing is known of their layout and their forward pass; "
                "this architecture cannot be compressed"
            )
    raise UserError(
        f"{label} ({type(model).__name__}) has no experts module of Transformers' experts interface: it is a dense "
        "model, or an MoE without that interface; give a Mixture-of-Experts model such as Mixtral, Qwen3-MoE or OLMoE"
    )


def require_weights(modules: Mapping[str, nn.Module]) -> None:
    """Check that modules, by their names, have weights to work on.

    Raises:
        UserError: those of one are offloaded, so that they are on a device only while the module runs.
    """
    for name, module in modules.items():
        if any(parameter.is_meta for parameter in module.parameters()):
            raise UserError(
                f"{name}: its weights are not in memory, as where device_map offloads them; load the model whole"
            )


def expert_weights(module: Any) -> dict[str, Tensor]:
    """The weights of an original experts module as [E, out, in], detached views where the layout allows it."""
    names = (up_projection(module), "down_proj")
    return {name: to_native(getattr(module, name).detach(), module.is_transposed) for name in names}


def set_expert_weights(module: Any, weights: dict[str, Tensor]) -> None:
    """Write weights [E, out, in] into an original experts module, in its own layout and dtype.

    Raises:
        ValueError: an unknown projection or a wrong shape.
    """
    for name, weight in weights.items():
        if name not in (up_projection(module), "down_proj"):
            raise ValueError(f"{type(module).__name__} has no projection {name!r}")
        target = getattr(module, name)
        native = to_native(weight, module.is_transposed)
        if native.shape != target.shape:
            raise ValueError(f"{name}: shape {tuple(native.shape)} given, {tuple(target.shape)} expected")
        with torch.no_grad():
            target.copy_(native)


def to_native(weight: Tensor, is_transposed: bool) -> Tensor:
    """[E, out, in] to the layout of the experts module, or back (the change is its own inverse)."""
    return weight.mT if is_transposed else weight


def experts_per_token(model: nn.Module, name: str) -> int:
    """The number of experts k that a token is routed to in the MoE layer whose experts are called `name`.

    Raises:
        UserError: neither the layer, its router nor the config says.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    experts: Any = model.get_submodule(name)
    configs = [getattr(experts, "config", None), getattr(model, "config", None)]
    for holder in (parent, *parent.children(), *configs):
        for attribute in _TOP_K_NAMES:
            value = getattr(holder, attribute, None)
            if isinstance(value, int) and value > 0:
                return value
    raise UserError(f"{name}: found no number of experts per token in its router or in the config")
