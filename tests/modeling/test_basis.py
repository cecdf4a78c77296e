"""A basis that the deltas of all experts share: the forward pass, gradients, layouts and counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moe_compress.errors import UserError
from moe_compress.modeling import SharedCoreConfig, count_parameters
from moe_compress.modeling.experts import SharedCoreExperts
from tests.modeling.test_experts import EXPERTS, KINDS, PATHS, assert_same, force, original, route, shared


def with_basis(module: Any, cores: int = 0) -> Any:
    """Both projections with a basis, larger than the rank and smaller than the inputs."""
    layout = shared(module, "delta").layout
    for projection, own in layout.items():
        columns = getattr(module, projection).shape[1 if module.is_transposed else 2]
        own |= {"cores": cores, "basis": columns - 3, "delta_rank": min(own["delta_rank"], columns - 4)}
    replacement = SharedCoreExperts(module, layout)
    generator = torch.Generator().manual_seed(3)
    for parameter in replacement.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * max(1, parameter.shape[-1]) ** -0.5
    return replacement


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cores", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_materialized_experts(kind: str, cores: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(path, monkeypatch)
    module = original(kind)
    replacement = with_basis(module, cores)
    assert replacement.gate_up_proj_basis.requires_grad if hasattr(replacement, "gate_up_proj_basis") else True
    assert_same(module, replacement, route(7, 2))


def test_padding_reaches_no_basis() -> None:
    replacement = with_basis(original("gated"), 1)
    hidden, index, weights = route(6, 2)
    index[0], hidden[0] = EXPERTS, float("nan")
    out = replacement(hidden, index, weights)
    assert not out[0].any() and out[1:].isfinite().all()
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in replacement.parameters())


def test_every_token_meets_the_basis(tiny_model: Any, compressed: Any) -> None:
    model = tiny_model("olmoe")
    dense = count_parameters(model)
    counted = count_parameters(compressed(model, "basis"))
    experts, top_k, rank = 4, 2, 8
    sides = ((32, 32, 16), (32, 16, 8))  # out, in, basis of gate_up_proj and down_proj
    shared_values = sum(size * columns for _, columns, size in sides)
    own = sum(rank * (rows + size) for rows, _, size in sides)
    assert counted.expert == 2 * (shared_values + experts * own)
    assert counted.active == dense.total - dense.expert + 2 * (shared_values + top_k * own)


@pytest.mark.parametrize("basis", [7, 8.5, "16"])
def test_a_basis_is_a_number_not_below_the_rank(basis: Any) -> None:
    with pytest.raises(UserError, match="at least delta_rank"):
        SharedCoreConfig(layers={"x": {"down_proj": {"delta_rank": 8, "cores": 0, "basis": basis}}})


def test_a_wrapper_has_no_basis() -> None:
    with pytest.raises(UserError, match="no basis"):
        SharedCoreConfig(
            layers={"x": {"down_proj": {"delta_rank": 8, "cores": 1, "basis": 8}}}, parameterization="wrapper"
        )


def test_compiles_whole() -> None:
    replacement = with_basis(original("gated"))
    inputs = route(7, 2)
    compiled: nn.Module = torch.compile(replacement, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), replacement(*inputs))
