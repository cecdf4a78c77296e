"""The interface to all fits: same facts for every method, types, edge cases, and mistakes in one line."""

import pytest
import torch

from moe_compress.errors import UserError
from moe_compress.factorization import METHODS, DeltaFactors, FitSpec, WrapperFactors, fit, grams

METHODS_AND_FORMS = [(m, p) for m in ("closed_form", "adam") for p in ("delta", "wrapper")]


def random_experts(experts, rows, columns, seed=0):
    return torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(seed))


def short(method, parameterization, rank, **changes):
    return FitSpec(method=method, parameterization=parameterization, delta_rank=rank, num_steps=20, **changes)


def test_methods_are_registered():
    assert set(METHODS) == {"closed_form", "adam"}


@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize(
    ("method", "parameterization", "cores"),
    [(*names, 1) for names in METHODS_AND_FORMS] + [("closed_form", "delta", 0), ("adam", "delta", 0)],
)
def test_reported_errors_are_those_of_the_factors(
    anisotropic_grams, monkeypatch, method, parameterization, with_gram, cores
):
    monkeypatch.setattr(grams, "_DAMPING", 1e-6)  # history is in the damped norm, data_error is not
    weights = random_experts(4, 10, 12)
    gram = anisotropic_grams(4, 12) if with_gram else None
    result = fit(weights, short(method, parameterization, 4, cores=cores), gram)
    assert isinstance(result.factors, WrapperFactors if parameterization == "wrapper" else DeltaFactors)
    assert result.factors.delta_rank == 4
    difference = result.factors.materialize() - weights
    error = difference.square().sum() / weights.square().sum()
    assert result.relative_error == pytest.approx(float(error), rel=1e-5)
    torch.testing.assert_close(
        result.expert_errors, difference.square().sum((1, 2)) / weights.square().sum((1, 2)), rtol=1e-4, atol=1e-7
    )
    if gram is None:
        assert result.data_error is None
        assert result.history[-1] == pytest.approx(result.relative_error, rel=1e-3)
    else:
        data_error = (difference @ gram * difference).sum() / (weights @ gram * weights).sum()
        assert result.data_error == pytest.approx(float(data_error), rel=1e-4)
        assert result.history[-1] == pytest.approx(result.data_error, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("method", "parameterization"), METHODS_AND_FORMS)
def test_fp32_inside_whatever_the_type(anisotropic_grams, method, parameterization, dtype):
    weights = random_experts(4, 10, 12).to(dtype)
    gram = anisotropic_grams(4, 12)
    result = fit(weights, short(method, parameterization, 4), gram)
    same = fit(weights.float(), short(method, parameterization, 4), gram)
    for name, tensor in vars(result.factors).items():
        if tensor is None:
            continue
        assert tensor.dtype == torch.float32, name
        torch.testing.assert_close(tensor, getattr(same.factors, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "parameterization"), METHODS_AND_FORMS)
def test_one_expert_is_its_core(method, parameterization):
    weights = random_experts(1, 8, 12)
    result = fit(weights, short(method, parameterization, 4))
    assert result.relative_error < (1e-9 if method == "closed_form" else 1e-4)
    assert bool(torch.isfinite(result.factors.materialize()).all())


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (6, 6)])
@pytest.mark.parametrize("cores", [0, 1])
def test_full_rank_is_exact(shape, cores):
    result = fit(random_experts(4, *shape), FitSpec(delta_rank=6, cores=cores))
    assert result.relative_error < 1e-9


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (6, 6)])
def test_full_rank_wrapper_is_finite(shape):
    """Not exact: half of the rank on each side has to pass through the core."""
    result = fit(random_experts(4, *shape), short("closed_form", "wrapper", 6))
    assert result.relative_error < 0.2


@pytest.mark.parametrize(("method", "parameterization"), METHODS_AND_FORMS)
def test_zero_weights(method, parameterization):
    result = fit(torch.zeros(3, 6, 8), short(method, parameterization, 2))
    assert result.relative_error == 0
    assert bool(torch.isfinite(result.factors.materialize()).all())


def test_input_is_left_alone_and_autograd_does_not_follow(anisotropic_grams):
    weights, gram = random_experts(3, 8, 10).requires_grad_(), anisotropic_grams(3, 10)
    before = weights.detach().clone(), gram.clone()
    for method, parameterization in METHODS_AND_FORMS:
        result = fit(weights, short(method, parameterization, 4), gram)
        assert not result.factors.materialize().requires_grad
    assert torch.equal(weights, before[0]) and torch.equal(gram, before[1]) and weights.grad is None


def test_weights_need_not_be_contiguous(anisotropic_grams):
    weights, gram = random_experts(3, 12, 8), anisotropic_grams(3, 12)
    strided = fit(weights.mT, FitSpec(delta_rank=4), gram)
    copied = fit(weights.mT.contiguous(), FitSpec(delta_rank=4), gram)
    torch.testing.assert_close(strided.factors.materialize(), copied.factors.materialize(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "magic"}, "closed_form"),
        ({"parameterization": "magic"}, "delta or wrapper"),
        ({"cores": 2}, "compression.cores=2"),
        ({"parameterization": "wrapper", "cores": 0}, "no core to wrap"),
        ({"parameterization": "wrapper", "delta_rank": 3}, "even"),
        ({"delta_rank": 9}, "8 x 10.*from 1 to 8"),
        ({"delta_rank": 0}, "from 1 to 8"),
        ({"parameterization": "wrapper", "delta_rank": 0}, "from 2 to 8"),
        ({"iterations": 0}, "compression.iterations=0"),
        ({"num_steps": -1}, "compression.num_steps=-1"),
        ({"lr": float("nan")}, "compression.lr=nan"),
    ],
)
def test_mistakes_in_the_settings(changes, words):
    with pytest.raises(UserError, match=words) as error:
        fit(random_experts(2, 8, 10), FitSpec(**{"delta_rank": 4, **changes}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights(value):
    weights = random_experts(2, 8, 10)
    weights[1, 3, 4] = value
    with pytest.raises(UserError, match="NaN or infinity"):
        fit(weights, FitSpec(delta_rank=4))


def test_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match="gram"):
        fit(random_experts(2, 8, 10), FitSpec(delta_rank=4), torch.eye(8).repeat(2, 1, 1))
    with pytest.raises(ValueError, match="weights"):
        fit(torch.zeros(8, 10), FitSpec(delta_rank=4))
    with pytest.raises(ValueError, match="weights"):
        fit(torch.zeros(2, 8, 10, dtype=torch.int64), FitSpec(delta_rank=4))
