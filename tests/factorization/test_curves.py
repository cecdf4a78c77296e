"""Error curves are those of the fits."""

import pytest
import torch

from moe_compress.factorization import FitSpec, Form, error_curve, error_curves, fit, shrink_grams


def experts(rows=20, columns=12, count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rows, columns, generator=generator) + torch.randn(rows, columns, generator=generator)


def grams_of(columns=12, count=5):
    inputs = torch.randn(count, 40, columns, generator=torch.Generator().manual_seed(3)) * torch.linspace(
        0.1, 3, columns
    )
    return shrink_grams(inputs.mT @ inputs, 0.1)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
@pytest.mark.parametrize("form", [Form(0), Form(1), Form(0, 12), Form(0, 11), Form(1, 11)], ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_curve_is_the_error_of_the_fit(shape, form, calibrated):
    weights = experts(*shape)
    if form.basis >= shape[1]:
        form = Form(form.cores, shape[1] - 1)
    gram = grams_of(shape[1]) if calibrated else None
    curve = error_curve(weights, form, gram)
    assert len(curve) == 1 + min(shape[0], form.basis or shape[1])
    assert (curve[-1] > 1e-4) if form.basis else abs(curve[-1]) < 1e-6
    assert (curve.diff() <= 0).all()
    assert (curve.diff().diff() >= -1e-7).all()  # convex
    if not form.cores:
        assert curve[0] == pytest.approx(1, abs=1e-5)
    for rank in (1, 4, 11):
        result = fit(weights, FitSpec(delta_rank=rank, cores=form.cores, basis=form.basis, iterations=1), gram)
        assert curve[rank] == pytest.approx(result.history[0], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("cores", [0, 1])
@pytest.mark.parametrize("shape", [(20, 12), (9, 20)])
def test_curves_of_several_bases_at_once_are_those_of_each(shape, cores):
    weights, gram, out_gram = experts(*shape), grams_of(shape[1]), grams_of(shape[0])
    forms = [Form(cores, 11), Form(cores), Form(cores, 3), Form(cores, 7)]
    together = error_curves(weights, forms, gram, out_gram)
    assert list(together) == forms
    for form in forms:
        alone = error_curve(weights, form, gram, out_gram)
        torch.testing.assert_close(together[form], alone, rtol=1e-4, atol=1e-6 * float(alone[0]))


def test_the_curve_of_equal_experts_is_zero():
    curve = error_curve(experts(count=1).expand(4, -1, -1), Form(1))
    assert curve.max() < 1e-6
