"""Speed of one MoE layer, side by side in one interleaved run: forward, and forward with backward.

The rivals of a compressed layer are the original experts under each implementation that Transformers has for them, and
other forms of the same bytes (see `layer_forms`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_compress.evaluation.layer_forms import projection_shapes
from moe_compress.evaluation.memory import allocated_by
from moe_compress.evaluation.roofline import layer_work, rate_calls, rates_of
from moe_compress.evaluation.timing import Timing, time_interleaved
from moe_compress.factorization.budget import break_even
from moe_compress.modeling.experts import SharedCoreExperts
from moe_compress.modeling.find import describe_experts
from moe_compress.modeling.tensors import form_of

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


def original_variants(
    copies: Sequence[nn.Module], tokens: int, top_k: int, *, training: bool = False
) -> dict[str, Variant]:
    """The original experts under each implementation that makes sense for so many tokens, by name.

    Not `eager` in training, whose backward pass fills a gradient of all experts for each expert: it takes twenty times
    as long as that of `grouped_mm` (measured on OLMoE's layer).
    """
    names = ["grouped_mm"] if training else ["eager", "grouped_mm"]
    gathered = tokens * top_k * sum(parameter[0].nbytes for parameter in copies[0].parameters())
    if tokens <= _BATCHED_TOKENS and gathered <= _BATCHED_BYTES:
        names.append("batched_mm")
    return {f"original, {name}": Variant(copies, name) for name in names}


def layer_speed(
    original: nn.Module,
    compressed: Mapping[str, SharedCoreExperts],
    *,
    top_k: int,
    tokens: Sequence[int] = TOKENS,
    seconds: float = 1.0,
    seed: int = 0,
    roofline: bool = False,
    training: bool = False,
    least_rounds: int = 7,
) -> list[dict[str, Any]]:
    """Time one MoE layer, without router and shared experts.

    Args:
        original: an experts module of Transformers.
        compressed: name to what stands in for it.
        top_k: experts per token.
        tokens: tokens per call.
        seconds: time to spend per number of tokens.
        seed: seed of hidden states and routing.
        roofline: measure this machine's rates in the same rounds, and add to each row what they allow.
        training: forward and backward, with gradients of everything, instead of the forward pass alone.
        least_rounds: samples of each, at least.

    Returns:
        A dict per number of tokens and variant: `tokens`, `variant`, `ms` (median), `ms_low`, `ms_high` (quartiles),
        `samples`, and `speedup`: time of the fastest original over this one's; of a compressed one also
        `faster_below`, see there. With `roofline`, this machine's `rates`, and `roofline_ms`, the least time at them.
        With `training`, `kept_bytes`, what the forward pass keeps for the backward pass, and `peak_bytes`, the most
        that is allocated beyond weights and inputs, gradients included.
    """
    facts = describe_experts("experts", original)
    parameter = next(original.parameters())
    modules: dict[str, nn.Module] = {"": original, **compressed}
    copies = {name: [module] if training else _copies(module) for name, module in modules.items()}
    machine = rate_calls(parameter.dtype, parameter.device) if roofline else {}
    rows = []
    for number in tokens:
        inputs = [
            layer_inputs(
                number, facts.hidden_size, facts.num_experts, top_k, dtype=parameter.dtype, device=parameter.device,
                seed=seed + each,
            )
            for each in range(_INPUTS)
        ]  # fmt: skip
        variants = original_variants(copies[""], number, top_k, training=training)
        variants |= {name: Variant(copies[name]) for name in compressed}
        call = _train if training else _infer
        with torch.inference_mode(not training), torch.set_grad_enabled(training):
            timings = time_interleaved(
                {name: partial(call, variant, inputs) for name, variant in variants.items()} | machine,
                parameter.device,
                seconds=seconds,
                least_rounds=least_rounds,
            )
        rates = rates_of(timings) if roofline else None
        best = min(timings[name].median for name in variants if name not in compressed)
        for name in variants:
            timing = timings[name]
            row = {"tokens": number, "variant": name, **_milliseconds(timing), "speedup": best / timing.median}
            if name in compressed:
                row["faster_below"] = faster_below(compressed[name], top_k, row["speedup"])
            if rates is not None:
                row["rates"] = asdict(rates)
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


def faster_below(layer: SharedCoreExperts, top_k: int, speedup: float) -> dict[str, int]:
    """The delta ranks at which a layer would be as fast as the fastest original, by projection.

    All ranks of the layer are scaled alike. The time of a layer is taken to be its multiply-adds, times what one of
    them was measured to take at the present ranks. A rank of 0 means: at no rank.
    """
    shapes = projection_shapes(layer)
    sizes = [(shapes[name], form_of(own), own["delta_rank"]) for name, own in layer.layout.items()]
    scale = break_even(sizes, top_k, speedup=speedup)
    return {name: int(scale * own["delta_rank"]) for name, own in layer.layout.items()}


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
