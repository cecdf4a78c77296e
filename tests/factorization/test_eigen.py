"""A driver that does not converge in fp32 stops neither fits nor curves."""

from functools import partial

import pytest
import torch

from moe_compress.factorization import FitSpec, Form, error_curve, fit


@pytest.mark.parametrize("parameterization", ["delta", "wrapper"])
def test_what_does_not_converge_in_fp32_is_done_in_fp64(parameterization, monkeypatch):
    weights = torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(0))
    spec = FitSpec(delta_rank=4, parameterization=parameterization)
    expected = fit(weights, spec).relative_error, error_curve(weights, Form(1))

    def refuse(real, symmetric):
        if symmetric.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return real(symmetric)

    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, partial(refuse, getattr(torch.linalg, name)))
    assert fit(weights, spec).relative_error == pytest.approx(expected[0], rel=1e-2)
    torch.testing.assert_close(error_curve(weights, Form(1)), expected[1], rtol=1e-4, atol=1e-6)
