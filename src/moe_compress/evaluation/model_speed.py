"""Speed and memory of whole models, original against compressed: reading a prompt, and writing with `generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from moe_compress.evaluation.memory import allocated_by
from moe_compress.evaluation.routing import expert_modules
from moe_compress.evaluation.timing import time_interleaved


def model_speed(
    original: Any,
    compressed: Mapping[str, Any],
    *,
    prefill_tokens: int = 512,
    decode_tokens: int = 32,
    seconds: float = 6.0,
    seed: int = 0,
    least_rounds: int = 5,
) -> dict[str, Any]:
    """Time the whole model: reading a prompt, and writing with `generate`, one sequence at a time.

    Args:
        original: the original model.
        compressed: name to compressed model.
        prefill_tokens: length of the prompt that is read.
        decode_tokens: tokens that are written, greedily, after a prompt of 16.
        seconds: time to spend on each of the two.
        seed: seed of the prompt's tokens.
        least_rounds: samples of each, at least.

    Returns:
        `rows`: a dict per variant with `variant`, `prefill` and `decode` in tokens per second (median, with `_low` and
        `_high` quartiles) and `prefill_speedup`, `decode_speedup` over the fastest original (no `prefill` for
        batched_mm, which is meant for few tokens), `weight_bytes`, and `peak_bytes`, the weights and the most that was
        allocated beside them while reading; and the two lengths.
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

    def calls(make: Callable[..., Callable[[int], object]], names: Sequence[str]) -> dict[str, Callable[[int], object]]:
        found = {f"original, {name}": make(original, name) for name in names}
        return found | {name: make(model, None) for name, model in compressed.items()}

    before = original.config._experts_implementation
    try:
        with torch.inference_mode():
            reading = calls(read, ("eager", "grouped_mm"))
            prefill = time_interleaved(reading, ids.device, seconds=seconds, least_rounds=least_rounds)
            peaks = {name: allocated_by(partial(call, 0), ids.device).peak for name, call in reading.items()}
            writing = calls(write, ("eager", "grouped_mm", "batched_mm"))
            decode = time_interleaved(writing, ids.device, seconds=seconds, least_rounds=least_rounds)
    finally:
        selected(original, before)
    rows: dict[str, dict[str, Any]] = {name: {"variant": name} for name in decode}
    for kind, tokens, timings in (("prefill", prefill_tokens, prefill), ("decode", decode_tokens, decode)):
        best = min(timing.median for name, timing in timings.items() if name not in compressed)
        for name, timing in timings.items():
            rows[name] |= {kind: tokens / timing.median, f"{kind}_low": tokens / timing.high}
            rows[name] |= {f"{kind}_high": tokens / timing.low, f"{kind}_speedup": best / timing.median}
    for name, peak in peaks.items():
        size = sum(parameter.nbytes for parameter in compressed.get(name, original).parameters())
        rows[name] |= {"weight_bytes": size, "peak_bytes": size + peak}
    return {"prefill_tokens": prefill_tokens, "decode_tokens": decode_tokens, "rows": list(rows.values())}
