"""Text that models write, greedily and at a low temperature, and how much of it is going round in circles."""

from __future__ import annotations

from typing import Any

import torch

LOW_TEMPERATURE = 0.3
_LOOP_LENGTH = 4


def write_samples(model: Any, tokenizer: Any, prompts: list[str], tokens: int, seed: int) -> list[dict[str, Any]]:
    """Continue each prompt greedily and at a temperature of 0.3; the same seed writes the same text.

    Args:
        model: a causal language model of Transformers.
        tokenizer: its tokenizer.
        prompts: texts to continue. White space at their end is left to the model: byte-pair tokens begin with their
            space, so that a prompt that ends with one is like nothing the model has seen.
        tokens: new tokens at most.
        seed: seed of the sampling.

    Returns:
        Dicts with `prompt`, `decoding`, `text` (the continuation alone) and `loop_rate`.
    """
    model.eval()
    written = []
    for given in prompts:
        prompt = given.rstrip() or given
        encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        encoded.pop("token_type_ids", None)
        for decoding, options in (
            ("greedy", {"do_sample": False}),
            (f"temperature {LOW_TEMPERATURE}", {"do_sample": True, "temperature": LOW_TEMPERATURE, "top_k": 0}),
        ):
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(seed)
                ids = model.generate(**encoded, max_new_tokens=tokens, pad_token_id=tokenizer.eos_token_id, **options)[
                    0, encoded["input_ids"].shape[1] :
                ].tolist()
            written.append(
                {
                    "prompt": prompt,
                    "decoding": decoding,
                    "text": tokenizer.decode(ids, skip_special_tokens=True),
                    "loop_rate": loop_rate(ids),
                }
            )
    return written


def loop_rate(ids: list[int]) -> float:
    """Share of the 4-grams of a text that occurred earlier in it: 0 never repeats, near 1 is a loop."""
    grams = [tuple(ids[start : start + _LOOP_LENGTH]) for start in range(len(ids) - _LOOP_LENGTH + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
