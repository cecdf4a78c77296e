"""Text that models write, greedily and at a low temperature, to be read side by side."""

from __future__ import annotations

from typing import Any

from moe_compress.evaluation.loops import LOW_TEMPERATURE, generate, repeat_rate


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
        Dicts with `prompt`, `decoding`, `text` (the continuation alone) and `repeat_rate`.
    """
    written = []
    for given in prompts:
        prompt = given.rstrip() or given
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        for decoding, options in (
            ("greedy", {"do_sample": False}),
            (f"temperature {LOW_TEMPERATURE}", {"do_sample": True, "temperature": LOW_TEMPERATURE, "top_k": 0}),
        ):
            (text,) = generate(model, ids, tokens, seed, **options)
            written.append(
                {
                    "prompt": prompt,
                    "decoding": decoding,
                    "text": tokenizer.decode(text, skip_special_tokens=True),
                    "repeat_rate": repeat_rate(text),
                }
            )
    return written
