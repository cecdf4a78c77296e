"""The Triton kernel against the PyTorch path, in Triton's interpreter: no GPU is needed.

The interpreter has to be chosen before anything imports Triton, so the checks run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with PyTorch's CUDA builds)")
def test_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(Path(__file__))], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "12 cases and padding\n"


def equals_the_torch_path(dtype: torch.dtype, features: int, rank: int, tokens: int) -> None:
    from moe_compress.modeling.expert_mm import expert_mm, out_side
    from moe_compress.modeling.routing import Routing
    from moe_compress.modeling.triton_mm import row_mm

    generator = torch.Generator().manual_seed(0)
    delta_in, delta_out, rows = (
        torch.randn(size, generator=generator).to(dtype)
        for size in ((4, features, rank), (4, rank, features), (2 * tokens, features))
    )
    index = torch.tensor([[1, 3], [0, 4], [2, 1]])[:tokens]  # 4 is padding
    weights = torch.rand(tokens, 2, generator=generator).to(dtype)
    routing = Routing(index, weights, 4, by_row=True)
    for scale in (None, routing.weights):
        exact = None if scale is None else scale.double()
        inner = expert_mm(rows.double(), delta_in.double(), routing)
        expected = out_side(inner, delta_out.double(), routing, scale=exact)
        inner = row_mm(rows, delta_in, routing.experts)
        out = row_mm(inner, delta_out, routing.experts, scale=scale, padding=routing.padding)
        assert out.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def padding_may_be_infinite() -> None:
    from moe_compress.modeling.triton_mm import row_mm

    weight = torch.full((1, 4, 4), float("inf"))
    out = row_mm(torch.ones(2, 4), weight, torch.zeros(2, dtype=torch.long), padding=torch.tensor([[True], [False]]))
    assert not out[0].any() and out[1].isinf().all()


if __name__ == "__main__":
    cases = list(product((torch.float32, torch.float16, torch.bfloat16), ((64, 8), (70, 130)), (1, 3)))
    with torch.no_grad():
        for dtype, (features, rank), tokens in cases:
            equals_the_torch_path(dtype, features, rank, tokens)
        padding_may_be_infinite()
    print(f"{len(cases)} cases and padding")
