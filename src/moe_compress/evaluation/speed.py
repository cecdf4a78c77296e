"""Speed of one MoE layer, side by side in one interleaved run: forward, and forward with backward.

The rivals of the shared core are the original experts under each implementation that Transformers has for them, and
per-expert SVD factors of the same bytes, which need no core and so do fewer multiply-adds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_compress.evaluation.memory import allocated_by
from moe_compress.evaluation.roofline import Rates, layer_work
from moe_compress.evaluation.timing import Timing, time_interleaved
from moe_compress.factorization import Form
from moe_compress.modeling.experts import SharedCoreExperts, find_shared_cores
from moe_compress.modeling.find import describe_experts
from moe_compress.modeling.tensors import Layout, factor_tensors, form_of

CORE, SVD = "moe-compress", "per-expert SVD"
TOKENS = (1, 16, 512)
# `batched_mm` copies the weights of every chosen expert, which is meant for few tokens.
_BATCHED_TOKENS = 16
_BATCHED_BYTES = 2**30
# Inputs to rotate through, so that a decoding step does not find all its experts in the cache of the step before.
_INPUTS = 8
# In a model the layers take turns: a layer never finds its weights in the cache. So a small one is timed as several
# copies in turn, until they take more than any cache has; but not more than a model has layers.
_COLD_BYTES = 2**28
_MOST_COPIES = 16


@dataclass(frozen=True)
class LayerInputs:
    """Routed tokens for one MoE layer: hidden states `[T, H]`, chosen experts `[T, k]` and their weights `[T, k]`."""

    hidden: Tensor
    index: Tensor
    weights: Tensor


def layer_inputs(
    tokens: int, hidden_size: int, num_experts: int, top_k: int, *, dtype: torch.dtype, device: torch.device, seed: int
) -> LayerInputs:
    """Normal hidden states and a routing that falls evenly on all experts, which is the hardest for a cache."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(device, dtype)
    weights, index = torch.randn(tokens, num_experts, generator=generator).softmax(-1).topk(top_k, dim=-1)
    return LayerInputs(hidden, index.to(device), (weights / weights.sum(-1, keepdim=True)).to(device, dtype))


@dataclass(frozen=True)
class Variant:
    """One way to compute a layer.

    Attributes:
        copies: the same module one or several times, to be used in turn.
        implementation: the one of Transformers' that is used for an original; None for the module's own forward.
    """

    copies: Sequence[nn.Module]
    implementation: str | None = None

    def __call__(self, number: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The output [T, H] of the copy whose turn it is."""
        module = self.copies[number % len(self.copies)]
        if self.implementation is None:
            return module(hidden, index, weights)
        # As the dispatcher of `use_experts_implementation` does, without touching the module's config.
        plain = type(module).forward.__wrapped__  # type: ignore[attr-defined]
        return ALL_EXPERTS_FUNCTIONS.get_interface(self.implementation, plain)(module, hidden, index, weights)


def original_variants(copies: Sequence[nn.Module], tokens: int, top_k: int) -> dict[str, Variant]:
    """The original experts under each implementation that makes sense for so many tokens, by name."""
    names = ["eager", "grouped_mm"]
    gathered = tokens * top_k * sum(parameter[0].nbytes for parameter in copies[0].parameters())
    if tokens <= _BATCHED_TOKENS and gathered <= _BATCHED_BYTES:
        names.append("batched_mm")
    return {f"original, {name}": Variant(copies, name) for name in names}


def layer_speed(
    original: nn.Module,
    compressed: Mapping[str, nn.Module],
    *,
    top_k: int,
    tokens: Sequence[int] = TOKENS,
    seconds: float = 1.0,
    seed: int = 0,
    rates: Rates | None = None,
    training: bool = False,
) -> list[dict[str, Any]]:
    """Time one MoE layer, without router and shared experts.

    Args:
        original: an experts module of Transformers.
        compressed: name (`CORE`, `SVD`) to what stands in for it.
        top_k: experts per token.
        tokens: tokens per call.
        seconds: time to spend per number of tokens.
        seed: seed of hidden states and routing.
        rates: of this machine; adds the roofline to each row.
        training: forward and backward, with gradients of everything, instead of the forward pass alone.

    Returns:
        A dict per number of tokens and variant: `tokens`, `variant`, `ms` (median), `ms_low`, `ms_high` (quartiles),
        `samples`, and `speedup`: time of the fastest original over this one's. With `rates`, `roofline_ms`, the least
        time on this machine. With `training`, `kept_bytes`, what the forward pass keeps for the backward pass, and
        `peak_bytes`, the most that is allocated beyond weights and inputs, gradients included.
    """
    facts = describe_experts("experts", original)
    parameter = next(original.parameters())
    modules = {"": original, **compressed}
    copies = {name: [module] if training else _copies(module) for name, module in modules.items()}
    rows = []
    for number in tokens:
        inputs = [
            layer_inputs(
                number, facts.hidden_size, facts.num_experts, top_k, dtype=parameter.dtype, device=parameter.device,
                seed=seed + each,
            )
            for each in range(_INPUTS)
        ]  # fmt: skip
        variants = original_variants(copies[""], number, top_k)
        variants |= {name: Variant(copies[name]) for name in compressed}
        call = _train if training else _infer
        with torch.inference_mode(not training), torch.set_grad_enabled(training):
            timings = time_interleaved(
                {name: partial(call, variant, inputs) for name, variant in variants.items()},
                parameter.device,
                seconds=seconds,
            )
        best = min(timing.median for name, timing in timings.items() if name not in compressed)
        for name, timing in timings.items():
            row = {"tokens": number, "variant": name, **_milliseconds(timing), "speedup": best / timing.median}
            if rates is not None:
                least = sum(layer_work(variants[name].copies[0], each.index).seconds(rates) for each in inputs)
                # Backward multiplies twice what forward does; reads the weights again and writes as many gradients.
                row["roofline_ms"] = 1e3 * least / len(inputs) * (3 if training else 1)
            if training:
                row |= _training_memory(variants[name], inputs[0], parameter.device)
            rows.append(row)
    return rows


def _infer(variant: Variant, inputs: Sequence[LayerInputs], number: int) -> Tensor:
    each = inputs[number % len(inputs)]
    return variant(number, each.hidden, each.index, each.weights)


def _train(variant: Variant, inputs: Sequence[LayerInputs], number: int) -> object:
    """Forward and backward; the gradients are freed after each call, as `zero_grad` does."""
    out, leaves = _forward_with_gradient(variant, inputs[number % len(inputs)])
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


def _forward_with_gradient(variant: Variant, inputs: LayerInputs) -> tuple[Tensor, list[Tensor]]:
    hidden, weights = inputs.hidden.detach().requires_grad_(), inputs.weights.detach().requires_grad_()
    parameters = [parameter for parameter in variant.copies[0].parameters() if parameter.requires_grad]
    return variant(0, hidden, inputs.index, weights), [hidden, weights, *parameters]


def _training_memory(variant: Variant, inputs: LayerInputs, device: torch.device) -> dict[str, int]:
    with torch.enable_grad():
        kept = allocated_by(lambda: _forward_with_gradient(variant, inputs), device).kept
        peak = allocated_by(lambda: _train(variant, [inputs], 0), device).peak
    return {"kept_bytes": kept, "peak_bytes": peak}


def same_bytes_layout(core: SharedCoreExperts) -> dict[str, Layout]:
    """The layout of per-expert SVD factors (no core) with at most the bytes that a shared core layer has.

    Ranks above 8 are rounded down to a multiple of 8, as the grouped GEMMs want them.
    """
    layout: dict[str, Layout] = {}
    for projection, own in core.layout.items():
        experts, inner = core.num_experts, own["delta_rank"]
        delta = core.factors(projection).fold()
        rows, columns = delta.delta_out.shape[1], delta.delta_in.shape[2]
        if delta.basis is not None:
            columns = delta.basis.shape[1]
        shape = experts, rows, columns
        rank = form_of(own).cost(shape, inner) // Form(0).cost(shape, 1)
        layout[projection] = {"delta_rank": min(_aligned(rank), rows, columns), "cores": 0}
    return layout


@torch.no_grad()
def cut_to_aligned_ranks(model: nn.Module) -> nn.Module:
    """Cut delta ranks above 8 down to multiples of 8, in place, as speed would want them; to be timed, not used.

    The SVD baseline spends its bytes to the last rank. At a rank that is not aligned every call pays for padding,
    which would be unfair to hold against it.
    """
    for module in find_shared_cores(model).values():
        for projection in module.projections:
            delta = module.factors(projection).fold()
            rank = _aligned(delta.delta_rank)
            cut = replace(delta, delta_out=delta.delta_out[:, :, :rank], delta_in=delta.delta_in[:, :rank])
            for name, tensor in factor_tensors(projection, cut).items():
                if name != projection:
                    setattr(module, name, nn.Parameter(tensor))
    return model


def random_layer(original: nn.Module, layout: Mapping[str, Layout], seed: int = 0) -> SharedCoreExperts:
    """A compressed layer of the given layout with random values: speed does not depend on them."""
    layer = SharedCoreExperts(original, layout)
    generator = torch.Generator(next(original.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return layer.eval()


def _aligned(rank: int) -> int:
    return rank - rank % 8 if rank > 8 else rank


def _copies(module: nn.Module) -> list[nn.Module]:
    size = sum(parameter.nbytes for parameter in module.parameters())
    return [module, *(copy.deepcopy(module) for _ in range(min(_MOST_COPIES, -(-_COLD_BYTES // size)) - 1))]


def _milliseconds(timing: Timing) -> dict[str, Any]:
    return {
        "ms": 1e3 * timing.median,
        "ms_low": 1e3 * timing.low,
        "ms_high": 1e3 * timing.high,
        "samples": timing.samples,
    }
