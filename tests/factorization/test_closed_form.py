"""The closed-form fit of core plus delta."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.factorization import FitSpec, closed_form, fit, grams
from moe_compress.factorization.closed_form import CoreSolver, leading_left_vectors


def random_experts(experts, rows, columns, seed=0):
    return torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(seed))


def non_increasing(history, tolerance=1e-5):
    return all(after <= before * (1 + tolerance) + 1e-9 for before, after in pairwise(history))


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (2, 9, 9)])
def test_leading_vectors_are_those_of_the_svd(shape):
    matrix = random_experts(*shape)
    rank = 4
    left = leading_left_vectors(matrix, rank)
    expected = torch.linalg.svd(matrix, full_matrices=False)
    kept = (left.mT @ matrix).square().sum((1, 2))
    torch.testing.assert_close(kept, expected.S[:, :rank].square().sum(1))
    torch.testing.assert_close(left.mT @ left, torch.eye(rank).expand(shape[0], -1, -1), atol=1e-5, rtol=0)


def test_first_iteration_is_mean_plus_truncated_svd():
    weights = random_experts(5, 12, 16)
    result = fit(weights, FitSpec(delta_rank=4, iterations=1))
    rest = weights - weights.mean(0)
    torch.testing.assert_close(result.factors.core, weights.mean(0))
    tail = torch.linalg.svdvals(rest)[:, 4:].square().sum()
    assert result.relative_error == pytest.approx(float(tail / weights.square().sum()), rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    experts=st.integers(1, 6),
    rows=st.integers(2, 14),
    columns=st.integers(2, 14),
    rank=st.integers(1, 6),
    with_gram=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_alternation_never_increases_the_objective(anisotropic_grams, experts, rows, columns, rank, with_gram, seed):
    rank = min(rank, rows, columns)
    gram = anisotropic_grams(experts, columns, seed=seed) if with_gram else None
    result = fit(random_experts(experts, rows, columns, seed), FitSpec(delta_rank=rank, iterations=8), gram)
    assert len(result.history) == 8
    assert non_increasing(result.history)


@pytest.mark.parametrize(("rows", "columns"), [(24, 32), (32, 24)])
@pytest.mark.parametrize("with_gram", [False, True])
def test_alternation_helps(anisotropic_grams, rows, columns, with_gram):
    gram = anisotropic_grams(8, columns) if with_gram else None
    history = fit(random_experts(8, rows, columns), FitSpec(delta_rank=8, iterations=8), gram).history
    assert history[-1] < 0.97 * history[0]


@settings(max_examples=12, deadline=None)
@given(
    experts=st.integers(6, 12),
    shape=st.sampled_from([(24, 32), (32, 24), (28, 28)]),
    rank=st.integers(1, 3),
    with_gram=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_planted_structure_is_recovered(random_delta, anisotropic_grams, experts, shape, rank, with_gram, seed):
    """Experts that are a core plus a delta of rank R come back to a relative error of the norm below 1e-4.

    The planted core is not unique (a part of rank R may move to all deltas), their sum is.
    """
    weights = random_delta(experts, *shape, rank, seed=seed).materialize()
    gram = None
    if with_gram:
        gram = anisotropic_grams(experts, shape[1], seed=seed)
        gram = gram + 0.1 * torch.eye(shape[1]) * gram.diagonal(dim1=1, dim2=2).mean()
    result = fit(weights, FitSpec(delta_rank=rank, iterations=60), gram)
    assert result.relative_error < 1e-8
    assert (result.factors.materialize() - weights).norm() < 1e-4 * weights.norm()


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24)])
def test_without_core_it_is_the_truncated_svd_of_each_expert(rows, columns):
    weights = random_experts(4, rows, columns)
    result = fit(weights, FitSpec(delta_rank=5, cores=0))
    assert result.factors.core is None
    left, values, right = torch.linalg.svd(weights, full_matrices=False)
    best = (left[..., :5] * values[:, None, :5]) @ right[:, :5]
    torch.testing.assert_close(result.factors.materialize(), best, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24)])
def test_without_core_it_is_the_whitened_truncated_svd(anisotropic_grams, rows, columns, monkeypatch):
    """The least error in the Gram norm that any matrices of this rank can have."""
    monkeypatch.setattr(grams, "_DAMPING", 1e-6)
    weights, gram = random_experts(4, rows, columns), anisotropic_grams(4, columns)
    result = fit(weights, FitSpec(delta_rank=5, cores=0), gram)
    root = torch.linalg.cholesky(gram.double())
    tail = torch.linalg.svdvals(weights.double() @ root)
    expected = tail[:, 5:].square().sum() / tail.square().sum()
    assert result.data_error == pytest.approx(float(expected), rel=1e-3)


def test_core_of_a_gram_fit_is_the_weighted_mean(anisotropic_grams, monkeypatch):
    monkeypatch.setattr(grams, "_DAMPING", 1e-9)
    weights, gram = random_experts(4, 10, 12), anisotropic_grams(4, 12).double()
    core = fit(weights, FitSpec(delta_rank=2, iterations=1), gram).factors.core
    expected = (weights.double() @ gram).sum(0) @ torch.linalg.inv(gram.sum(0))
    torch.testing.assert_close(core.double(), expected, atol=1e-2, rtol=1e-2)
    assert (core - weights.mean(0)).norm() > 0.1 * core.norm()


@pytest.mark.parametrize("cores", [0, 1])
@pytest.mark.parametrize(("rows", "columns"), [(24, 32), (32, 24)])
def test_data_aware_beats_weight_only_in_the_gram_norm(anisotropic_grams, rows, columns, cores):
    weights, gram = random_experts(8, rows, columns), anisotropic_grams(8, columns)
    spec = FitSpec(delta_rank=6, cores=cores)
    aware, plain = fit(weights, spec, gram), fit(weights, spec)
    difference = plain.factors.materialize() - weights
    plain_error = float((difference @ gram * difference).sum() / (weights @ gram * weights).sum())
    assert aware.data_error < 0.8 * plain_error
    assert plain.relative_error < aware.relative_error
    assert plain.data_error is None


def test_components_are_balanced():
    delta = fit(random_experts(4, 12, 16), FitSpec(delta_rank=5)).factors
    torch.testing.assert_close(delta.delta_out.norm(dim=1), delta.delta_in.norm(dim=2))


def test_a_core_beats_none_on_alike_experts_at_equal_rank(random_delta):
    weights = random_delta(8, 20, 24, 6).materialize()
    assert (
        fit(weights, FitSpec(delta_rank=4)).relative_error
        < 0.5 * fit(weights, FitSpec(delta_rank=4, cores=0)).relative_error
    )


@pytest.mark.parametrize("with_gram", [False, True])
def test_chunks_do_not_change_the_result(anisotropic_grams, monkeypatch, with_gram):
    weights = random_experts(7, 12, 16)
    gram = anisotropic_grams(7, 16) if with_gram else None
    whole = fit(weights, FitSpec(delta_rank=4), gram)
    monkeypatch.setattr(grams, "CHUNK_BYTES", 3 * 12 * 16 * 4)
    assert len(list(grams.chunks(7, 12 * 16 * 4))) == 3
    parts = fit(weights, FitSpec(delta_rank=4), gram)
    torch.testing.assert_close(parts.factors.materialize(), whole.factors.materialize(), atol=1e-4, rtol=1e-4)
    assert parts.relative_error == pytest.approx(whole.relative_error, rel=1e-5)


def weighed_error(weights, dense, gram, out_gram):
    """The Fisher norm by its definition: the sum of tr(S_e D G_e D^T) / tr(S_e)."""
    difference = (weights - dense).double()
    squares = (out_gram.double() @ difference @ gram.double() * difference).sum((1, 2))
    return float((squares / out_gram.double().diagonal(dim1=1, dim2=2).sum(1)).sum())


@pytest.mark.parametrize("cores", [0, 1])
def test_weighed_outputs_are_fitted_better_than_without_their_weights(anisotropic_grams, cores, monkeypatch):
    if not cores:  # so that the exact minimum is known
        monkeypatch.setattr(grams, "_DAMPING", 1e-6)
    weights = random_experts(6, 14, 10) + 2 * random_experts(1, 14, 10, seed=1)
    gram, out_gram = anisotropic_grams(6, 10), anisotropic_grams(6, 14, seed=2)
    spec = FitSpec(delta_rank=3, cores=cores, iterations=20)
    plain, weighed = fit(weights, spec, gram), fit(weights, spec, gram, out_gram=out_gram)
    error, norm = (weighed_error(weights, dense, gram, out_gram) for dense in (weighed.factors.materialize(), 0.0))
    assert weighed.data_error == pytest.approx(error / norm, rel=1e-2)
    assert error < 0.8 * weighed_error(weights, plain.factors.materialize(), gram, out_gram)
    assert non_increasing(weighed.history)
    if cores == 0:
        roots = [torch.linalg.cholesky(each.double()) for each in (gram, out_gram)]
        tails = torch.linalg.svdvals(roots[1].mT @ weights.double() @ roots[0])[:, 3:].square().sum(1)
        best = float((tails / out_gram.double().diagonal(dim1=1, dim2=2).sum(1)).sum())
        assert error == pytest.approx(best, rel=1e-2)
        assert weighed.history[-1] == pytest.approx(error / norm, rel=1e-2)


def test_the_core_is_the_best_one_where_outputs_are_weighed(anisotropic_grams, monkeypatch):
    monkeypatch.setattr(grams, "_DAMPING", 1e-6)
    weights = random_experts(5, 12, 9)
    gram, out_gram = anisotropic_grams(5, 9), anisotropic_grams(5, 12, seed=3)
    metric = grams.Metric(gram, out_gram)
    solver = CoreSolver(weights, metric, [slice(0, 2), slice(2, 5)])
    core = solver.best_core(torch.zeros(5, 12, 1), torch.zeros(5, 1, 9))
    least = weighed_error(weights, core, gram, out_gram)
    for seed in range(4):
        direction = random_experts(1, 12, 9, seed)[0]
        for step in (1e-2, -1e-2):
            assert weighed_error(weights, core + step * direction, gram, out_gram) > least


def test_outputs_that_weigh_alike_change_nothing(anisotropic_grams):
    weights, gram = random_experts(4, 8, 10), anisotropic_grams(4, 10)
    out_gram = 3.0 * torch.eye(8).expand(4, -1, -1)
    spec = FitSpec(delta_rank=3, iterations=3)
    found = [fit(weights, spec, gram, out_gram=given).factors.materialize() for given in (None, out_gram)]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 40, 24)])
def test_leading_vectors_near_a_start(shape):
    """They capture no less than the start does, next to all from near the true ones, and are orthonormal."""
    matrix, rank = random_experts(*shape), 6

    def kept(span):
        return (span.mT @ matrix).square().sum()

    best = kept(leading_left_vectors(matrix, rank))
    far = torch.linalg.qr(random_experts(shape[0], shape[1], rank, seed=1)).Q
    near = leading_left_vectors(matrix + 0.05 * random_experts(*shape, seed=2), rank)
    for start, least in ((far, kept(far)), (near, 0.995 * best)):
        found = leading_left_vectors(matrix, rank, 3.0 * start)
        torch.testing.assert_close(found.mT @ found, torch.eye(rank).expand(shape[0], -1, -1), atol=1e-5, rtol=0)
        assert least < kept(found) <= best * 1.0001


def test_later_alternations_end_where_whole_factorizations_would(anisotropic_grams, monkeypatch):
    weights, gram = random_experts(6, 32, 48), anisotropic_grams(6, 48)
    spec = FitSpec(delta_rank=6, iterations=30)
    found = fit(weights, spec, gram).history[-1]
    monkeypatch.setattr(
        closed_form, "leading_left_vectors", lambda matrix, rank, start: leading_left_vectors(matrix, rank)
    )
    assert found == pytest.approx(fit(weights, spec, gram).history[-1], rel=5e-3)
