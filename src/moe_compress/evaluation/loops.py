"""A check for degeneration: how many of the texts that a model writes at a low temperature end in a loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LOW_TEMPERATURE = 0.3
_PROMPT_TOKENS = 32
_GRAM = 4
_REPEATS = 3
_LEAST_TOKENS = 12


def loop_check(model: Any, rows: Tensor, samples: int, tokens: int, seed: int) -> dict[str, Any]:
    """Continue the beginnings of held-out rows at a temperature of 0.3; the same seed writes the same texts.

    Args:
        model: a causal language model of Transformers.
        rows: `[N, L]`, int64; their first 32 tokens are the prompts (half of them where rows are short). With fewer
            rows than samples a row is continued several times.
        samples: texts to write.
        tokens: new tokens of each at most.
        seed: seed of the sampling.

    Returns:
        `loop_rate` (share of texts that end in a cycle, see `ends_in_cycle`), `loop_stderr` (binomial), `loop_samples`
        and `repeat_rate` (mean share of repeated 4-grams).
    """
    length = min(_PROMPT_TOKENS, max(1, rows.shape[1] // 2))
    prompts = rows[torch.arange(samples) * len(rows) // samples, :length]
    texts = generate(model, prompts, tokens, seed, do_sample=True, temperature=LOW_TEMPERATURE, top_k=0)
    rate = sum(map(ends_in_cycle, texts)) / samples
    return {
        "loop_rate": rate,
        "loop_stderr": math.sqrt(rate * (1 - rate) / samples),
        "loop_samples": samples,
        "repeat_rate": sum(map(repeat_rate, texts)) / samples,
    }


def generate(model: Any, prompts: Tensor, tokens: int, seed: int, **options: Any) -> list[list[int]]:
    """Continue prompts `[B, T]` of equal length, by `options` of `model.generate`; each text ends before its end token.

    The generator of random numbers is left as it was.
    """
    model.eval()
    config = model.generation_config
    ends = config.eos_token_id if config.eos_token_id is not None else []
    ends = set(ends if isinstance(ends, list) else [ends])
    pad = config.pad_token_id if config.pad_token_id is not None else min(ends, default=0)
    prompts = prompts.to(model.device)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        written = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            pad_token_id=pad,
            **options,
        )[:, prompts.shape[1] :].tolist()
    texts = []
    for ids in written:
        stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        texts.append(ids[:stop])
    return texts


def ends_in_cycle(ids: list[int]) -> bool:
    """Whether a text ends in the same n-gram three times in a row or more, over at least twelve tokens."""
    for period in range(1, len(ids) // _REPEATS + 1):
        same = 0
        while same < len(ids) - period and ids[-1 - same] == ids[-1 - same - period]:
            same += 1
        if same + period >= max(_REPEATS * period, _LEAST_TOKENS):
            return True
    return False


def repeat_rate(ids: list[int]) -> float:
    """Share of the 4-grams of a text that occurred earlier in it: 0 never repeats, near 1 is a loop."""
    grams = [tuple(ids[start : start + _GRAM]) for start in range(len(ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
