"""A shared basis of the inputs: found where it is, and the best of its kind."""

import pytest
import torch

from moe_compress.errors import UserError
from moe_compress.factorization import FitSpec, fit, shrink_grams

EXPERTS, ROWS, COLUMNS, SIZE, RANK = 5, 12, 20, 8, 6


def planted(noise=0.0, seed=0):
    """Experts of rank 6 that all read the same 8 directions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    inner = normal(EXPERTS, ROWS, RANK) @ normal(EXPERTS, RANK, SIZE)
    return inner @ normal(SIZE, COLUMNS) + noise * normal(EXPERTS, ROWS, COLUMNS)


def grams(features, seed=1):
    inputs = torch.randn(EXPERTS, 50, features, generator=torch.Generator().manual_seed(seed))
    return shrink_grams((inputs * torch.linspace(0.2, 3, features)).mT @ inputs, 0.1)


def metric(kind):
    if kind == "frobenius":
        return {}
    gram = grams(COLUMNS)
    gram = gram + gram.mT + 50 * torch.eye(COLUMNS)
    if kind == "gram":
        return {"gram": gram}
    out = torch.randn(EXPERTS, 40, ROWS, generator=torch.Generator().manual_seed(5)) * torch.linspace(0.2, 2, ROWS)
    return {"gram": gram, "out_gram": out.mT @ out}


@pytest.mark.parametrize("kind", ["frobenius", "gram", "fisher"])
def test_a_planted_basis_is_found(kind):
    result = fit(planted(), FitSpec(delta_rank=RANK, cores=0, basis=SIZE), **metric(kind))
    assert result.relative_error < 1e-6
    assert result.factors.basis.shape == (SIZE, COLUMNS) and result.factors.delta_in.shape == (EXPERTS, RANK, SIZE)


@pytest.mark.parametrize("kind", ["frobenius", "gram", "fisher"])
@pytest.mark.parametrize("cores", [0, 1])
def test_the_error_is_that_of_the_factors(kind, cores):
    norms = metric(kind)
    result = fit(planted(0.5), FitSpec(delta_rank=4, cores=cores, basis=SIZE, iterations=3), **norms)
    if kind == "frobenius":
        assert result.history[-1] == pytest.approx(result.relative_error, rel=1e-3)
    else:  # the error that is minimized has damped matrices
        assert result.history[-1] == pytest.approx(result.data_error, rel=0.1)


def test_given_the_basis_the_deltas_are_the_best_in_the_norm_of_each_expert():
    norms = metric("gram")
    result = fit(planted(0.5), FitSpec(delta_rank=4, cores=0, basis=SIZE), **norms)
    weights, factors = planted(0.5), result.factors
    for expert in range(EXPERTS):
        gram = norms["gram"][expert]
        gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(COLUMNS)
        left = factors.delta_out[expert].clone().requires_grad_()
        right = factors.delta_in[expert].clone().requires_grad_()
        rest = weights[expert] - left @ right @ factors.basis
        (rest @ gram * rest).sum().backward()
        scale = float((weights[expert] @ gram * weights[expert]).sum())
        assert left.grad.abs().max() < 1e-3 * scale and right.grad.abs().max() < 1e-3 * scale


def test_at_equal_bytes_it_beats_factors_of_their_own():
    weights = planted(0.1)
    own = fit(weights, FitSpec(delta_rank=4, cores=0))  # 5 * 4 * 32 = 640 values
    shared = fit(weights, FitSpec(delta_rank=4, cores=0, basis=SIZE))  # 8 * 20 + 5 * 4 * 20 = 560
    assert shared.relative_error < 1.05 * own.relative_error


@pytest.mark.parametrize(
    "changes",
    [
        {"cores": 2},
        {"parameterization": "wrapper", "cores": 1},
        {"method": "adam"},
        {"delta_rank": 9},
        {"basis": COLUMNS},
    ],
)
def test_what_a_basis_does_not_go_with(changes):
    with pytest.raises(UserError, match="basis"):
        fit(planted(), FitSpec(**{"delta_rank": 4, "cores": 0, "basis": SIZE} | changes))
