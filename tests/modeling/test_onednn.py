"""fp32 products by oneDNN: the same as those of PyTorch's own kernels, wherever they are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_compress.modeling import expert_mm, experts, onednn
from moe_compress.modeling.experts import SharedCoreExperts
from moe_compress.modeling.routing import Routing
from tests.modeling.test_cores import grouped
from tests.modeling.test_experts import EXPERTS, KINDS, original, route, shared

pytestmark = [
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN"),
    pytest.mark.usefixtures("by_pytorch"),
]


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


class Multiplied(TorchDispatchMode):
    """The types of all matrices that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in ("mm", "bmm", "addmm", "_grouped_mm", "_linear_pointwise"):
            self.dtypes |= {value.dtype for value in args if isinstance(value, Tensor) and value.is_floating_point()}
        return func(*args, **(kwargs or {}))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [shared, grouped])
def test_types_that_the_cpu_cannot_multiply_go_through_fp32(
    dtype: torch.dtype,
    training: bool,
    make: Callable[[nn.Module], SharedCoreExperts],
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The products are made in fp32, of the layer's own values, and come back in the type of the layer."""
    replacement = make(original("gated", dtype))
    exact = make(original("gated", dtype)).double()
    exact.load_state_dict(replacement.state_dict())
    monkeypatch.setattr(experts, "by_row", lambda *_: False)
    monkeypatch.setattr(onednn, "_SUPPORTED", {dtype: False})
    hidden, index, weights = route(70, 2)
    hidden, weights = hidden.to(dtype), weights.to(dtype)
    with torch.set_grad_enabled(training):
        expected = exact(hidden.double(), index, weights.double())
        with Multiplied() as multiplied:
            out = replacement(hidden, index, weights)
    assert multiplied.dtypes == {torch.float32} and out.dtype == dtype
    assert bool(calls) != training
    close = {"rtol": 0.02, "atol": 0.02 * float(expected.detach().abs().max()), "check_dtype": False}
    torch.testing.assert_close(out, expected, **close)
    if training:
        out.sum().backward()
        expected.sum().backward()
        for (name, parameter), of_exact in zip(replacement.named_parameters(), exact.parameters(), strict=True):
            if parameter.numel():
                assert parameter.grad is not None and of_exact.grad is not None and parameter.grad.dtype == dtype, name
                torch.testing.assert_close(
                    parameter.grad.double(), of_exact.grad, rtol=0.05, atol=0.02 * float(of_exact.grad.abs().max())
                )


def test_what_the_cpu_multiplies_is_asked_of_onednn() -> None:
    weight = torch.zeros(2, 2)
    for dtype, supported in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    ):
        assert onednn.product_dtype(weight.to(dtype)) == (dtype if supported else torch.float32)
        assert onednn.product_dtype(weight.to(dtype).to("meta")) == dtype
    assert onednn.product_dtype(weight.double()) == torch.float64


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
