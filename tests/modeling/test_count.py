"""Parameters and bytes, in all and per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_compress.modeling import ParameterCount, count_parameters


def test_an_original_model(tiny_model: Callable[..., Any]) -> None:
    # Mixtral: 2 layers of 4 experts of 3 * 16 * 32, 2 of them active.
    model = tiny_model("mixtral", torch.bfloat16)
    everything = sum(parameter.numel() for parameter in model.parameters())
    expert = 2 * 4 * 3 * 16 * 32
    active = everything - expert // 2
    expected = ParameterCount(everything, expert, active, 2 * everything, 2 * expert, 2 * active)
    assert count_parameters(model) == expected


@pytest.mark.parametrize(
    ("variant", "core", "per_expert"),
    [
        ("delta", 3 * 16 * 32, 8 * (64 + 48)),
        ("no_core", 0, 8 * (64 + 48)),
        ("wrapper", 3 * 16 * 32, 8 * (64 + 48)),  # rank 4 on each side is the delta rank 8
    ],
)
def test_a_compressed_model(
    tiny_model: Callable[..., Any], compressed: Callable[..., Any], variant: str, core: int, per_expert: int
) -> None:
    before = count_parameters(tiny_model("mixtral"))
    after = count_parameters(compressed(tiny_model("mixtral"), variant, rank=8))
    assert after.expert == 2 * (core + 4 * per_expert)
    assert after.total - after.expert == before.total - before.expert
    assert after.active == after.total - after.expert + 2 * (core + 2 * per_expert)
    assert (after.total_bytes, after.expert_bytes, after.active_bytes) == (
        4 * after.total,
        4 * after.expert,
        4 * after.active,
    )


def test_biases_count_with_their_expert(tiny_model: Callable[..., Any], compressed: Callable[..., Any]) -> None:
    before, after = (
        count_parameters(model) for model in (tiny_model("gpt_oss"), compressed(tiny_model("gpt_oss"), "delta"))
    )
    biases = 2 * 4 * (32 + 32)
    assert before.expert == 2 * 4 * 3 * 16 * 32 + biases
    assert after.expert == 2 * (3 * 16 * 32 + 4 * 8 * (64 + 48)) + biases
    assert after.total - after.active == 2 * 2 * 8 * (64 + 48) + biases // 2


def test_tied_embeddings_count_once_and_are_active(tiny_model: Callable[..., Any]) -> None:
    tied, untied = (count_parameters(tiny_model("olmoe", tie_word_embeddings=flag)) for flag in (True, False))
    assert untied.total - tied.total == 64 * 32
    assert untied.active - tied.active == 64 * 32
