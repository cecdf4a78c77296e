"""Encoders: random draws are unbiased, deterministic and small; padding of the vocabulary does not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_compress.config import GenerationConfig
from moe_compress.distillation import encoders
from moe_compress.distillation.encoders import SampleEncoder, TopKEncoder, encoder_settings, make_encoder
from moe_compress.distillation.losses import divergence
from moe_compress.distillation.targets import DenseTargets, SampledTargets
from moe_compress.errors import UserError

IDS = 40
# Standard errors; with the fixed seeds each test either always passes or always fails.
SIGMAS = 5.0


def logits_of(tokens: int, *, seed: int = 0, scale: float = 2.0, ids: int = IDS) -> Tensor:
    return torch.randn(tokens, ids, generator=torch.Generator().manual_seed(seed)) * scale


def targets_of(encoder: SampleEncoder | TopKEncoder, logits: Tensor, sequence: int = 0) -> SampledTargets:
    record = encoder.encode(logits, sequence)
    return encoder.decode({name: torch.from_numpy(array) for name, array in record.items()})


def dense(targets: SampledTargets, temperature: float, ids: int = IDS) -> Tensor:
    """The weights over the whole vocabulary `[tokens, ids]`."""
    weights, _ = targets.at(temperature)
    return torch.zeros(len(weights), ids).scatter_add_(1, targets.indices, weights)


def assert_mean(samples: Tensor, expected: Tensor) -> None:
    """The mean over the first dimension is `expected` up to chance (and fp16 rounding of what is stored)."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() <= SIGMAS * error + 1e-3 * expected.abs() + 1e-5).all()


@pytest.mark.parametrize(("drawn_at", "asked_at"), [(1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (0.8, 1.0)])
def test_the_expected_target_and_gradient_are_the_dense_ones(drawn_at: float, asked_at: float) -> None:
    # Few draws, where every bias would be large: that of renormalized weights is of the order of 1 / samples.
    encoder = SampleEncoder(samples=3, sample_temperature=drawn_at, seed=1, vocab_size=IDS)
    teacher, student = logits_of(1), logits_of(1, seed=9)[0]
    repeats = 20000
    targets = targets_of(encoder, teacher.expand(repeats, IDS))
    p = (teacher[0] / asked_at).softmax(-1)
    assert_mean(dense(targets, asked_at), p)

    asked = student.expand(repeats, IDS).clone().requires_grad_()
    estimate = divergence(asked, targets, asked_at)
    (slopes,) = torch.autograd.grad(estimate.sum(), asked)
    exact = student[None].clone().requires_grad_()
    truth = divergence(exact, DenseTargets(teacher), asked_at)
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    assert_mean(slopes, slope[0])
    assert_mean(estimate.detach()[:, None], truth.detach())


def test_draws_depend_on_seed_and_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(50)
    encoder = SampleEncoder(samples=20, sample_temperature=1.0, seed=1, vocab_size=IDS)
    first = encoder.encode(logits, 7)
    monkeypatch.setattr(encoders, "_CHUNK_BYTES", 4 * IDS * 3)
    again = encoder.encode(logits, 7)
    assert first.keys() == again.keys() and all(np.array_equal(first[name], again[name]) for name in first)
    other_seed = SampleEncoder(samples=20, sample_temperature=1.0, seed=2, vocab_size=IDS)
    for other in (encoder.encode(logits, 8), other_seed.encode(logits, 7)):
        assert not np.array_equal(first["indices"], other["indices"])


def test_a_record_of_draws_is_whole_and_small() -> None:
    encoder = SampleEncoder(samples=30, sample_temperature=1.0, seed=1, vocab_size=70000)
    record = encoder.encode(logits_of(64, ids=70000, scale=6.0), 0)
    assert {name: array.dtype for name, array in record.items()} == {
        "entries": np.uint8,
        "indices": np.uint32,
        "counts": np.uint8,
        "entropy": np.float16,
    }
    for row in range(64):
        entries = int(record["entries"][row])
        ids, counts = record["indices"][row], record["counts"][row]
        assert 1 <= entries <= 30 and (np.diff(ids[:entries].astype(np.int64)) > 0).all()
        assert counts[:entries].all() and counts.sum() == 30
        assert not counts[entries:].any() and not ids[entries:].any()


def test_a_certain_teacher_is_drawn_exactly() -> None:
    logits = torch.full((4, IDS), -math.inf)
    logits[:, 5] = 3.0
    encoder = SampleEncoder(samples=9, sample_temperature=1.0, seed=1, vocab_size=IDS)
    record = encoder.encode(logits, 0)
    assert record["entries"].tolist() == [1] * 4 and record["indices"][:, 0].tolist() == [5] * 4
    assert record["counts"][:, 0].tolist() == [9] * 4 and not record["entropy"].any()


def test_draws_say_nothing_of_other_temperatures() -> None:
    targets = targets_of(SampleEncoder(5, 2.0, 1, IDS), logits_of(2))
    with pytest.raises(UserError, match="draws at temperature 2, which say nothing of temperature 1.5"):
        targets.at(1.5)


@pytest.mark.parametrize("encoder", [TopKEncoder(IDS, IDS + 6), SampleEncoder(400, 1.0, 1, IDS + 6)])
def test_padding_of_the_vocabulary_is_left_out(encoder: TopKEncoder | SampleEncoder) -> None:
    """Six ids that no token uses, two of them among the k; the student has none of them, or more."""
    logits = torch.cat([logits_of(30), torch.full((30, 6), -60.0)], -1)
    logits[:, -2:] = -20.0
    student = logits_of(30, seed=4)
    targets = targets_of(encoder, logits)
    assert targets.vocab_size == IDS + 6
    narrow = type(encoder)(**{**vars(encoder), "vocab_size": IDS})
    torch.testing.assert_close(
        divergence(student, targets, 1.0),
        divergence(student, targets_of(narrow, logits[:, :IDS]), 1.0),
        atol=3e-3,
        rtol=1e-3,
    )


@pytest.mark.parametrize(
    "encoder", [TopKEncoder(8, IDS), SampleEncoder(50, 1.0, 1, IDS), SampleEncoder(50, 2.0, 1, IDS)]
)
def test_distance_tells_the_same_teacher_from_another(encoder: TopKEncoder | SampleEncoder) -> None:
    logits = logits_of(200)
    targets = targets_of(encoder, logits)
    assert encoder.distance(targets, logits + 3.0) < 0.005
    assert encoder.distance(targets, logits + 0.7 * logits_of(200, seed=3)) > 0.1
    # Same entropies, other ids: only the draws themselves can tell.
    assert encoder.distance(targets, logits.roll(1, -1)) > 0.1


def test_settings_make_the_encoder_again() -> None:
    for generation, made in (
        (GenerationConfig(top_k=7), TopKEncoder(7, IDS)),
        (GenerationConfig(encoder="sample", samples=9, sample_temperature=2.0), SampleEncoder(9, 2.0, 3, IDS)),
    ):
        settings = encoder_settings(generation, 3)
        assert make_encoder({**settings, "vocab_size": IDS}) == made
    with pytest.raises(UserError, match="unknown encoder 'dense'.*topk, sample"):
        make_encoder({"encoder": "dense"})
    with pytest.raises(UserError, match="does not say samples, seed"):
        make_encoder({"encoder": "sample", "sample_temperature": 1.0, "vocab_size": IDS})
