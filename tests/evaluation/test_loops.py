"""Loops: what counts as one, and what a model that can only repeat itself is told."""

from __future__ import annotations

import pytest
import torch

from moe_compress.evaluation.loops import ends_in_cycle, generate, loop_check, repeat_rate

from .conftest import make_model

TEXT = list(range(20))


@pytest.mark.parametrize(
    ("ids", "rate"),
    [([1, 2, 3, 4, 5, 6], 0.0), ([7] * 13, 0.9), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2), ([1, 2], 0.0), ([], 0.0)],
)
def test_repeat_rate(ids, rate):
    assert repeat_rate(ids) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        (TEXT, False),
        (TEXT + [7] * 12, True),
        (TEXT + [7] * 11, False),  # too short to tell from an underline or an indentation
        (TEXT + [1, 2, 3, 4, 5] * 3, True),
        (TEXT + [1, 2, 3, 4, 5] * 2, False),
        (TEXT + [1, 2, 3, 4, 5] * 3 + [1, 2], True),  # in the middle of the next turn
        ([1, 2, 3, 4, 5] * 3 + TEXT, False),  # it got out of it
        (TEXT * 3, True),
        ([], False),
    ],
)
def test_ends_in_cycle(ids, loops):
    assert ends_in_cycle(ids) is loops


def one_token_model(token: int):
    """A model that writes the same token for ever."""
    model = make_model()
    bias = torch.zeros(300)
    bias[token] = 50.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def test_a_model_that_repeats_itself_is_found_out():
    rows = torch.randint(1, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    found = loop_check(one_token_model(5), rows, samples=8, tokens=16, seed=0)
    assert found == {
        "loop_rate": 1.0,
        "loop_stderr": 0.0,
        "loop_samples": 8,
        "repeat_rate": pytest.approx(12 / 13),
    }
    healthy = loop_check(make_model(), rows, samples=8, tokens=16, seed=0)
    assert healthy["loop_rate"] < 1 and healthy["repeat_rate"] < 0.5


def test_texts_end_before_the_end_token_and_follow_the_seed():
    prompts = torch.tensor([[5, 6], [7, 8]])
    assert generate(one_token_model(0), prompts, 6, 0, do_sample=False) == [[], []]
    before = torch.get_rng_state()
    first, again, other = (generate(make_model(), prompts, 6, seed, do_sample=True) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())
