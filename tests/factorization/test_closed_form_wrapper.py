"""The closed-form fit of the wrapper."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.factorization import FitSpec, WrapperFactors, fit, grams
from moe_compress.factorization.closed_form import fit_delta
from moe_compress.factorization.closed_form_wrapper import _row_filter, _solve_side, _WrapperFit
from moe_compress.factorization.grams import Metric

SHAPES = [(24, 32), (32, 24), (28, 28)]


def random_experts(experts, rows, columns, seed=0):
    return torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(seed))


def well_conditioned(gram):
    return gram + 0.1 * torch.eye(gram.shape[1]) * gram.diagonal(dim1=1, dim2=2).mean()


def wrapper_spec(rank, **changes):
    return FitSpec(**{"parameterization": "wrapper", "delta_rank": rank, **changes})


@pytest.mark.parametrize("shape", [(3, 6, 10), (3, 10, 6), (2, 7, 7)])
def test_row_filter(shape):
    source = random_experts(*shape).double()
    front, back = _row_filter(source, 0.1)
    mu = 0.1 * source.square().sum((1, 2)) / min(shape[1:])
    inverse = torch.linalg.inv(source @ source.mT + mu[:, None, None] * torch.eye(shape[1]))
    torch.testing.assert_close(front @ front.mT, source.mT @ inverse @ source)
    torch.testing.assert_close(back @ front.mT, inverse @ source)


@pytest.mark.parametrize("shape", [(3, 6, 10), (3, 10, 6)])
def test_side_solution_cannot_be_improved(shape):
    """Gradient descent from the solution finds nothing better, and from elsewhere nothing better either."""
    source, target, rank, ridge = random_experts(*shape, 1).double(), random_experts(*shape, 2).double(), 2, 0.05
    mu = ridge * source.square().sum((1, 2)) / min(shape[1:])

    def objective(u, v):
        u, mixing = torch.linalg.qr(u)
        u = u * mixing.diagonal(dim1=1, dim2=2).sign()[:, None, :]  # QR may turn columns around
        return (target - u @ v.mT @ source).square().sum() + (mu * v.square().sum((1, 2))).sum()

    solution = _solve_side(source, target, rank, ridge)
    best = objective(*solution).item()
    assert best < target.square().sum()
    generator = torch.Generator().manual_seed(0)
    for start in (solution, [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in solution]):
        tensors = [t.clone().requires_grad_() for t in start]
        optimizer = torch.optim.Adam(tensors, lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            loss = objective(*tensors)
            loss.backward()
            optimizer.step()
            assert loss.item() >= best * (1 - 1e-9)


@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize("shape", [(12, 16), (16, 12)])
def test_core_step_finds_the_core_of_known_sides(random_wrapper, anisotropic_grams, shape, with_gram):
    truth = random_wrapper(6, *shape, 2)
    weights = truth.materialize()
    gram = well_conditioned(anisotropic_grams(6, shape[1])) if with_gram else None
    metric = Metric(gram)
    delta, history = fit_delta(weights, 4, cores=1, iterations=1, metric=metric)
    state = _WrapperFit(weights, delta, history[0], metric)
    state.u_out, state.v_out, state.u_in, state.v_in = truth.u_out, truth.v_out, truth.u_in, truth.v_in
    before = (state.core - truth.core).norm()
    for _ in range(10):
        state._improve_core()
    assert (state.core - truth.core).norm() < 1e-2 * before


@settings(max_examples=10, deadline=None)
@given(
    experts=st.integers(8, 12),
    shape=st.sampled_from(SHAPES),
    side_rank=st.integers(1, 2),
    with_gram=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_planted_structure_is_recovered(random_wrapper, anisotropic_grams, experts, shape, side_rank, with_gram, seed):
    """Experts that are wrappers of one core come back to a relative squared error below 1e-4, mostly far below."""
    weights = random_wrapper(experts, *shape, side_rank, seed=seed).materialize()
    gram = None
    if with_gram:
        gram = well_conditioned(anisotropic_grams(experts, shape[1], seed=seed))
    result = fit(weights, wrapper_spec(2 * side_rank, iterations=30), gram)
    assert isinstance(result.factors, WrapperFactors)
    assert result.relative_error < 1e-4
    direct = (result.factors.materialize() - weights).square().sum() / weights.square().sum()
    assert float(direct) == pytest.approx(result.relative_error, rel=1e-2, abs=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_reported_error_is_that_of_the_wrapper_and_no_better_than_a_delta(shape):
    weights = random_experts(8, *shape)
    wrapper = fit(weights, wrapper_spec(8))
    delta = fit(weights, FitSpec(delta_rank=8, iterations=60))
    assert min(wrapper.history) == pytest.approx(wrapper.relative_error, rel=1e-3)
    assert delta.relative_error < wrapper.relative_error < 1.35 * delta.relative_error
    assert wrapper.relative_error < 0.985 * wrapper.history[0]


@pytest.mark.parametrize("shape", [(24, 32), (32, 24)])
def test_data_aware_beats_weight_only_in_the_gram_norm(anisotropic_grams, shape):
    weights, gram = random_experts(8, *shape), anisotropic_grams(8, shape[1])
    aware, plain = fit(weights, wrapper_spec(8), gram), fit(weights, wrapper_spec(8))
    difference = plain.factors.materialize() - weights
    plain_error = float((difference @ gram * difference).sum() / (weights @ gram * weights).sum())
    assert aware.data_error < 0.8 * plain_error


def test_sides_are_balanced_and_of_moderate_size():
    wrapper = fit(random_experts(8, 24, 32), wrapper_spec(8)).factors
    torch.testing.assert_close(wrapper.u_out.norm(dim=1), wrapper.v_out.norm(dim=1))
    torch.testing.assert_close(wrapper.u_in.norm(dim=1), wrapper.v_in.norm(dim=1))
    assert max(float(t.abs().max()) for t in (wrapper.u_out, wrapper.u_in)) < 10


@pytest.mark.parametrize("with_gram", [False, True])
def test_chunks_do_not_change_the_result(anisotropic_grams, monkeypatch, with_gram):
    weights = random_experts(7, 12, 16)
    gram = anisotropic_grams(7, 16) if with_gram else None
    whole = fit(weights, wrapper_spec(4), gram)
    monkeypatch.setattr(grams, "CHUNK_BYTES", 3 * 12 * 16 * 4)
    parts = fit(weights, wrapper_spec(4), gram)
    assert parts.relative_error == pytest.approx(whole.relative_error, rel=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(24, 32), (32, 24)])
def test_core_of_low_rank(rows, columns):
    """A core that spans neither side, with wrappers inside its span: nothing divides by its zeros."""
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(rows, 6, generator=generator) @ torch.randn(6, columns, generator=generator)
    sides = [torch.randn(8, n, 1, generator=generator) / n**0.5 for n in (rows, rows, columns, columns)]
    weights = WrapperFactors(core, *sides).materialize()
    result = fit(weights, wrapper_spec(2, iterations=40))
    assert result.relative_error < 1e-3
    assert all(bool(torch.isfinite(t).all()) for t in vars(result.factors).values() if t is not None)
