"""fp32 products by oneDNN: the same as those of PyTorch's own kernels, wherever they are taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe_compress.modeling import expert_mm, experts, onednn
from moe_compress.modeling.experts import SharedCoreExperts
from moe_compress.modeling.routing import Routing
from tests.modeling.test_cores import grouped
from tests.modeling.test_experts import EXPERTS, KINDS, original, route, shared

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """oneDNN for products of any size, on any CPU; the rows of each call."""
    seen: list[int] = []
    product = onednn._product

    def spy(rows: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(rows))
        return product(rows, weight)

    monkeypatch.setattr(onednn, "_FASTER", True)
    monkeypatch.setattr(onednn, "_WORTH_A_CALL", 0)
    monkeypatch.setattr(onednn, "_product", spy)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [shared, grouped])
@pytest.mark.parametrize("tokens", [9, 70])
def test_a_layer_is_the_same(
    kind: str,
    make: Callable[[nn.Module], SharedCoreExperts],
    tokens: int,
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replacement = make(original(kind))
    monkeypatch.setattr(experts, "by_row", lambda *_: False)
    hidden, index, weights = route(tokens, 2)
    index[0, 0] = index[-1, 0] = index[-1, 1] = EXPERTS
    with torch.no_grad():
        out = replacement(hidden, index, weights)
        assert len(calls) >= 4 * index[index < EXPERTS].unique().numel()
        monkeypatch.setattr(onednn, "_FASTER", False)
        expected = replacement(hidden, index, weights)  # compared with the original in test_experts.py
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("strided", [False, True])
def test_groups_without_rows_and_rows_without_group(strided: bool, calls: list[int]) -> None:
    weight = torch.randn(4, 5, 7).mT.contiguous().mT if strided else torch.randn(4, 5, 7)
    rows = torch.randn(9, 5)
    with torch.no_grad():
        out = onednn.grouped_linear(rows, weight, torch.tensor([0, 3, 3, 7], dtype=torch.int32))
    expected = torch.cat([rows[:3] @ weight[1], rows[3:7] @ weight[3], torch.zeros(2, 7)])
    torch.testing.assert_close(out, expected)
    assert calls == [3, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_gradients_are_not_its_business(dtype: torch.dtype, calls: list[int]) -> None:
    rows, weight = torch.randn(8, 8), torch.randn(8, 8)
    with torch.no_grad():
        onednn.linear(rows.to(dtype), weight.to(dtype))
    onednn.linear(rows.requires_grad_(), weight).sum().backward()
    assert rows.grad is not None and not calls


def test_numbers_of_rows_that_are_not_rounded_are_not_either(calls: list[int]) -> None:
    """In training each would have a kernel compiled for it."""
    weight, weights = torch.randn(EXPERTS, 8, 8), torch.ones(40, 1)
    with torch.no_grad():
        for rounding in (1, 8):
            routing = Routing(torch.arange(40)[:, None] % EXPERTS, weights, EXPERTS, round_to=rounding)
            expert_mm.expert_mm(torch.randn(len(routing.tokens), 8), weight, routing)
            assert calls == ([] if rounding == 1 else [8] * EXPERTS)


def test_small_products_are_not_worth_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_FASTER", True)
    weight = torch.zeros(64, 1, 1).expand(-1, 128, 128)
    with torch.no_grad():
        assert onednn.takes(128, weight) and not onednn.takes(127, weight)
        assert expert_mm.row_rounding(64 * 128, [weight], batched=False) > 1
        assert expert_mm.row_rounding(64 * 127, [weight], batched=False) == 1
