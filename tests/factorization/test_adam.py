"""The Adam fit, and how it compares with the closed form."""

import pytest
import torch

from moe_compress.factorization import FitSpec, fit, grams
from moe_compress.factorization.adam import fit_adam
from moe_compress.factorization.grams import Metric


def random_experts(experts, rows, columns, seed=0):
    return torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(seed))


def adam(parameterization, rank, **changes):
    return FitSpec(method="adam", parameterization=parameterization, delta_rank=rank, **changes)


@pytest.mark.parametrize("parameterization", ["delta", "wrapper"])
def test_planted_wrapper_is_found(random_wrapper, parameterization):
    weights = random_wrapper(6, 16, 20, 2).materialize() * 0.02  # the size of trained weights
    result = fit(weights, adam(parameterization, 4, num_steps=400, lr=3e-2))
    assert result.relative_error < 2e-3
    assert result.history[-1] == pytest.approx(result.relative_error, rel=1e-2, abs=1e-8)
    assert result.history[0] > 20 * result.history[-1]


@pytest.mark.parametrize("parameterization", ["delta", "wrapper"])
def test_starts_from_the_mean(parameterization):
    """The first error reported is that of the mean alone."""
    weights = random_experts(5, 12, 16) * 3
    history = fit(weights, adam(parameterization, 4, num_steps=3)).history
    alone = (weights - weights.mean(0)).square().sum() / weights.square().sum()
    assert history[0] == pytest.approx(float(alone), rel=1e-4)
    assert history[-1] < history[0]


@pytest.mark.parametrize(("shape", "with_gram"), [((24, 32), False), ((32, 24), True)])
@pytest.mark.parametrize("parameterization", ["delta", "wrapper"])
def test_closed_form_beats_adam_at_equal_rank(anisotropic_grams, parameterization, shape, with_gram):
    """With the default number of alternations, steps and learning rate."""
    weights = random_experts(8, *shape)
    gram = anisotropic_grams(8, shape[1]) if with_gram else None
    closed = fit(weights, FitSpec(parameterization=parameterization, delta_rank=8), gram)
    slow = fit(weights, adam(parameterization, 8), gram)
    assert closed.history[-1] < slow.history[-1]
    assert slow.history[-1] < 0.8 * slow.history[0]


def test_gram_norm_is_what_is_minimized(anisotropic_grams, monkeypatch):
    monkeypatch.setattr(grams, "_DAMPING", 1e-6)
    weights, gram = random_experts(4, 12, 16), anisotropic_grams(4, 16)
    spec = adam("delta", 4, num_steps=200, lr=3e-2)
    aware, plain = fit(weights, spec, gram), fit(weights, spec)
    difference = plain.factors.materialize() - weights
    plain_error = float((difference @ gram * difference).sum() / (weights @ gram * weights).sum())
    assert aware.data_error < 0.8 * plain_error
    assert aware.history[-1] == pytest.approx(aware.data_error, rel=1e-2)


def test_without_core_adam_approaches_the_truncated_svd():
    weights = random_experts(4, 12, 16)
    best = fit(weights, FitSpec(delta_rank=4, cores=0))
    result = fit(weights, adam("delta", 4, cores=0, num_steps=400, lr=3e-2))
    assert result.factors.core is None
    assert best.relative_error < result.relative_error < 1.02 * best.relative_error


@pytest.mark.parametrize("parameterization", ["delta", "wrapper"])
def test_deterministic_given_the_seed(parameterization):
    weights = random_experts(3, 8, 10)
    torch.manual_seed(1)
    one = fit(weights, adam(parameterization, 4, num_steps=5))
    torch.manual_seed(2)
    same = fit(weights, adam(parameterization, 4, num_steps=5))
    other = fit(weights, adam(parameterization, 4, num_steps=5, seed=1))
    ones, sames = ([t for t in vars(fit.factors).values() if t is not None] for fit in (one, same))
    assert all(torch.equal(a, b) for a, b in zip(ones, sames, strict=True))
    assert not torch.equal(one.factors.materialize(), other.factors.materialize())
    assert not any(t.requires_grad for t in ones)


def test_gradients_add_up_over_chunks(monkeypatch):
    weights = random_experts(5, 8, 10)
    whole = fit(weights, adam("wrapper", 4, num_steps=10))
    monkeypatch.setattr(grams, "CHUNK_BYTES", 2 * 8 * 10 * 4)
    parts = fit(weights, adam("wrapper", 4, num_steps=10))
    assert parts.history == pytest.approx(whole.history, rel=1e-4)


def test_progress_is_reported():
    steps = []
    fit_adam(
        random_experts(2, 6, 8),
        2,
        parameterization="delta",
        cores=1,
        num_steps=7,
        lr=1e-3,
        seed=0,
        metric=Metric(),
        on_step=lambda step, error: steps.append((step, error)),
    )
    assert [step for step, _ in steps] == list(range(1, 8))
    assert steps[-1][1] < steps[0][1]
