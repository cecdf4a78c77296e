"""Speed side by side: one MoE layer in milliseconds, the whole model in tokens per second, all in one interleaved run.

The rivals of the shared core are the original experts under each implementation that Transformers has for them, and
per-expert SVD factors of the same bytes, which need no core and so do fewer multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_compress.evaluation.routing import expert_modules
from moe_compress.evaluation.timing import Timing, time_interleaved
from moe_compress.modeling.experts import SharedCoreExperts
from moe_compress.modeling.find import describe_experts
from moe_compress.modeling.tensors import Layout

CORE, SVD = "shared core", "per-expert SVD"
TOKENS = (1, 16, 512)
# `batched_mm` copies the weights of every chosen expert, which is meant for few tokens.
_BATCHED_TOKENS = 16
_BATCHED_BYTES = 2**30
# Inputs to rotate through, so that a decoding step does not find all its experts in the cache of the step before.
_INPUTS = 8

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def original_forwards(experts: nn.Module, tokens: int, top_k: int) -> dict[str, Forward]:
    """The original experts under each implementation that makes sense for so many tokens, by name."""

    def forward(implementation: str) -> Forward:
        # As the dispatcher of `use_experts_implementation` does, without touching the module's config.
        plain = type(experts).forward.__wrapped__  # type: ignore[attr-defined]
        function = ALL_EXPERTS_FUNCTIONS.get_interface(implementation, plain)
        return lambda hidden, index, weights: function(experts, hidden, index, weights)

    names = ["eager", "grouped_mm"]
    gathered = tokens * top_k * sum(parameter[0].nbytes for parameter in experts.parameters())
    if tokens <= _BATCHED_TOKENS and gathered <= _BATCHED_BYTES:
        names.append("batched_mm")
    return {f"original, {name}": forward(name) for name in names}


def layer_speed(
    original: nn.Module,
    compressed: Mapping[str, nn.Module],
    *,
    top_k: int,
    tokens: Sequence[int] = TOKENS,
    seconds: float = 1.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Time one MoE layer, without router and shared experts.

    Args:
        original: an experts module of Transformers.
        compressed: name (`CORE`, `SVD`) to what stands in for it.
        top_k: experts per token.
        tokens: tokens per call.
        seconds: time to spend per number of tokens.
        seed: seed of hidden states and routing.

    Returns:
        A dict per number of tokens and variant: `tokens`, `variant`, `ms` (median), `ms_low`, `ms_high` (quartiles),
        `samples`, and `speedup`: time of the fastest original over this one's.
    """
    facts = describe_experts("experts", original)
    parameter = next(original.parameters())
    rows = []
    for number in tokens:
        inputs = [
            layer_inputs(
                number, facts.hidden_size, facts.num_experts, top_k, dtype=parameter.dtype, device=parameter.device,
                seed=seed + each,
            )
            for each in range(_INPUTS)
        ]  # fmt: skip
        forwards: dict[str, Forward] = {**original_forwards(original, number, top_k), **compressed}
        with torch.inference_mode():
            timings = time_interleaved(
                {name: _bind(forward, inputs) for name, forward in forwards.items()}, parameter.device, seconds=seconds
            )
        best = min(timing.median for name, timing in timings.items() if name not in compressed)
        for name, timing in timings.items():
            row = {"tokens": number, "variant": name, **_milliseconds(timing)}
            rows.append({**row, "speedup": best / timing.median})
    return rows


def model_speed(
    original: Any,
    compressed: Mapping[str, Any],
    *,
    prefill_tokens: int = 512,
    decode_tokens: int = 32,
    seconds: float = 6.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Time the whole model: reading a prompt, and writing with `generate`, one sequence at a time.

    Args:
        original: the original model.
        compressed: name to compressed model.
        prefill_tokens: length of the prompt that is read.
        decode_tokens: tokens that are written, greedily, after a prompt of 16.
        seconds: time to spend on each of the two.
        seed: seed of the prompt's tokens.

    Returns:
        `rows`: a dict per variant with `variant`, `prefill` and `decode` in tokens per second (median, with `_low` and
        `_high` quartiles) and `prefill_speedup`, `decode_speedup` over the fastest original (no `prefill` for
        batched_mm, which is meant for few tokens); and the two lengths.
    """
    config = original.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or prefill_tokens
    prefill_tokens = min(prefill_tokens, most)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (1, prefill_tokens), generator=generator).to(original.device)
    configs: list[Any] = list({id(m.config): m.config for m in expert_modules(original).values()}.values())

    def selected(model: Any, implementation: str | None) -> Any:
        for each in configs if implementation else ():
            each._experts_implementation = implementation
        return model

    def read(model: Any, implementation: str | None) -> Callable[[int], object]:
        return lambda _: selected(model, implementation)(input_ids=ids, use_cache=False, logits_to_keep=1)

    def write(model: Any, implementation: str | None) -> Callable[[int], object]:
        prompt = ids[:, :16]
        return lambda _: selected(model, implementation).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=decode_tokens,
            min_new_tokens=decode_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    def timed(make: Callable[..., Callable[[int], object]], implementations: Sequence[str]) -> dict[str, Timing]:
        calls = {f"original, {name}": make(original, name) for name in implementations}
        calls |= {name: make(model, None) for name, model in compressed.items()}
        return time_interleaved(calls, ids.device, seconds=seconds, least_rounds=5)

    before = original.config._experts_implementation
    try:
        with torch.inference_mode():
            prefill = timed(read, ("eager", "grouped_mm"))
            decode = timed(write, ("eager", "grouped_mm", "batched_mm"))
    finally:
        selected(original, before)
    rows: dict[str, dict[str, Any]] = {name: {"variant": name} for name in decode}
    for kind, tokens, timings in (("prefill", prefill_tokens, prefill), ("decode", decode_tokens, decode)):
        best = min(timing.median for name, timing in timings.items() if name not in compressed)
        for name, timing in timings.items():
            rows[name] |= {kind: tokens / timing.median, f"{kind}_low": tokens / timing.high}
            rows[name] |= {f"{kind}_high": tokens / timing.low, f"{kind}_speedup": best / timing.median}
    return {"prefill_tokens": prefill_tokens, "decode_tokens": decode_tokens, "rows": list(rows.values())}


def same_bytes_layout(core: SharedCoreExperts) -> dict[str, Layout]:
    """The layout of per-expert SVD factors (no core) with at most the bytes that a shared core layer has.

    Ranks above 8 are rounded down to a multiple of 8, as the grouped GEMMs want them.
    """
    layout: dict[str, Layout] = {}
    for projection, own in core.layout.items():
        experts, rows, inner = getattr(core, f"{projection}_delta_out").shape
        columns = getattr(core, f"{projection}_delta_in").shape[2]
        rank = inner + own["cores"] * rows * columns // (experts * (rows + columns))
        layout[projection] = {"delta_rank": min(_aligned(rank), rows, columns), "cores": 0}
    return layout


@torch.no_grad()
def cut_to_aligned_ranks(model: nn.Module) -> nn.Module:
    """Cut delta ranks above 8 down to multiples of 8, in place, as speed would want them; to be timed, not used.

    The SVD baseline spends its bytes to the last rank. At a rank that is not aligned every call pays for padding,
    which would be unfair to hold against it.
    """
    for module in model.modules():
        if not isinstance(module, SharedCoreExperts):
            continue
        for projection in module.projections:
            rank = _aligned(module.layout[projection]["delta_rank"])
            delta_out, delta_in = (getattr(module, f"{projection}_delta_{side}") for side in ("out", "in"))
            setattr(module, f"{projection}_delta_out", nn.Parameter(delta_out[:, :, :rank].contiguous()))
            setattr(module, f"{projection}_delta_in", nn.Parameter(delta_in[:, :rank].contiguous()))
    return model


def _aligned(rank: int) -> int:
    return rank - rank % 8 if rank > 8 else rank


def random_layer(original: nn.Module, layout: Mapping[str, Layout], seed: int = 0) -> SharedCoreExperts:
    """A compressed layer of the given layout with random values: speed does not depend on them."""
    layer = SharedCoreExperts(original, layout)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return layer.eval()


def _bind(forward: Forward, inputs: Sequence[LayerInputs]) -> Callable[[int], object]:
    def call(number: int) -> object:
        each = inputs[number % len(inputs)]
        return forward(each.hidden, each.index, each.weights)

    return call


def _milliseconds(timing: Timing) -> dict[str, Any]:
    return {
        "ms": 1e3 * timing.median,
        "ms_low": 1e3 * timing.low,
        "ms_high": 1e3 * timing.high,
        "samples": timing.samples,
    }
