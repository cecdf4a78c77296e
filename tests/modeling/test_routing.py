"""Rows of tokens sorted by expert, and rounded to multiples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compress.modeling import expert_mm, experts, onednn
from moe_compress.modeling.routing import Routing, best_capacity
from tests.modeling.test_cores import grouped
from tests.modeling.test_experts import EXPERTS, KINDS, gradients, original, route, shared


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 30),
    top_k=st.integers(1, EXPERTS),
    multiple=st.integers(1, 16),
    per_gemm=st.sampled_from([0, 1, 8, 1000]),
    seed=st.integers(0, 99),
)
def test_rounded_and_batched_rows_go_to_their_experts_and_back(
    tokens: int, top_k: int, multiple: int, per_gemm: int, seed: int
) -> None:
    hidden, index, weights = route(tokens, top_k, seed=seed)
    index[0, 0] = EXPERTS  # padding
    with torch.no_grad():
        routing = Routing(index, weights, EXPERTS, round_to=multiple, rows_per_gemm=per_gemm)
        rows = routing.spread(hidden)
        own = torch.randn(len(rows), 1)  # something else for every row
        expected = torch.zeros(tokens, 1)
        for row, (token, weight) in enumerate(zip(routing.tokens.tolist(), routing.weights, strict=True)):
            expected[token] += weight * own[row]
        torch.testing.assert_close(routing.collect(own, routing.weights), expected)
        torch.testing.assert_close(routing.collect(rows), hidden * top_k)
    assert not (routing.offsets % multiple).any() and not routing.capacity % multiple
    front = EXPERTS * routing.capacity
    ends = [front, *(front + routing.offsets).tolist()]
    for expert in range(EXPERTS):
        own_rows = [
            *range(expert * routing.capacity, (expert + 1) * routing.capacity),
            *range(ends[expert], ends[expert + 1]),
        ]
        real = ~routing.padding[own_rows, 0]
        assert (routing.experts[own_rows][real] == expert).all()
        found = sorted(routing.tokens[own_rows][real].tolist())
        assert found == (index == expert).any(dim=1).nonzero()[:, 0].tolist()
    if per_gemm:
        assert len(rows) == ends[-1]
        return
    assert routing.capacity == 0
    assert routing.padding[ends[-1] :].all() if multiple > 1 else len(rows) == tokens * top_k
    assert len(rows) == len(Routing(index.flip(0), weights, EXPERTS, round_to=multiple).tokens)  # whatever the index


@given(
    counts=st.lists(st.integers(0, 200), min_size=1, max_size=20),
    multiple=st.sampled_from([1, 8, 32]),
    per_gemm=st.integers(1, 200),
)
def test_no_capacity_costs_less_than_the_best(counts: list[int], multiple: int, per_gemm: int) -> None:
    def cost(capacity: int) -> int:
        behind = [count - capacity for count in counts if count > capacity]
        return len(counts) * capacity + per_gemm * len(behind) + sum(behind)

    best = best_capacity(counts, multiple, per_gemm)
    assert best % multiple == 0
    assert cost(best) <= min(cost(capacity) for capacity in range(0, 225, multiple))


def test_alike_experts_share_one_gemm_and_the_odd_one_has_its_own() -> None:
    assert best_capacity([60] * 63 + [64], 32, 128) == 64
    assert best_capacity([60] * 63 + [2000], 32, 128) == 64
    assert best_capacity([0] * 60 + [500] * 4, 32, 128) == 0


def test_rows_are_rounded_where_onednn_compiles_for_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    side = torch.zeros(64, 4, 8, dtype=torch.bfloat16)

    def rounding(rows: int, *sides: Tensor, batched: bool = False) -> int:
        return expert_mm.row_rounding(64 * rows, sides, batched=batched)

    monkeypatch.setattr(onednn, "_FASTER", True)
    monkeypatch.setattr(onednn, "_SUPPORTED", {})
    monkeypatch.setattr(expert_mm, "_AMX", False)
    large = torch.zeros(64, 1, 1).expand(-1, 512, 512)
    with torch.no_grad():
        for batched in (False, True):
            assert [rounding(rows, side, batched=batched) for rows in (1, 16, 40, 64, 300)] == [8, 8, 8, 8, 32]
            assert rounding(1, side.float(), batched=batched) == rounding(1, side.to("meta"), batched=batched) == 1
        assert rounding(64, side.float(), large) == 8
        assert rounding(64, large.double()) == 1
    # With gradients only rows that are batched: what the last of the others hold is unknown.
    assert rounding(64, side) == 1 and rounding(64, side, batched=True) == 8
    monkeypatch.setattr(expert_mm, "_AMX", True)
    assert [rounding(rows, side, batched=True) for rows in (3, 11, 12, 300)] == [16, 16, 32, 32]
    monkeypatch.setattr(onednn, "_FASTER", False)
    with torch.no_grad():
        assert rounding(64, side) == 8 and rounding(64, side.float(), large) == 1
        monkeypatch.setattr(onednn, "_SUPPORTED", {torch.bfloat16: False})  # then it is a product of fp32
        assert rounding(64, side) == 1


def test_rows_of_16_bits_are_batched_on_a_cpu_that_multiplies_them(monkeypatch: pytest.MonkeyPatch) -> None:
    side = torch.zeros(64, 4, 8)
    monkeypatch.setattr(onednn, "_SUPPORTED", {torch.bfloat16: False})
    assert expert_mm.rows_per_gemm(side.half()) and not expert_mm.rows_per_gemm(side.bfloat16())
    monkeypatch.setattr(onednn, "_SUPPORTED", {})
    assert expert_mm.rows_per_gemm(side.bfloat16()) and expert_mm.rows_per_gemm(side.half())
    assert not expert_mm.rows_per_gemm(side) and not expert_mm.rows_per_gemm(side.bfloat16().to("meta"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not expert_mm.rows_per_gemm(side.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiple", [1, 4, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_batched_rows_and_rows_behind_them(
    kind: str, multiple: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens go to one expert among others, so that it has rows in the batch and rows of its own, or all have."""
    replacement = shared(original(kind, dtype))
    hidden, index, weights = route(40, 2)
    index[:, 0], index[:, 1] = 1, torch.arange(40) % 4 * (torch.arange(40) % 4 != 1)
    index[7, 1] = EXPERTS
    inputs = hidden.to(dtype), index, weights.to(dtype)
    monkeypatch.setattr(experts, "by_row", lambda *_: False)
    sizes = []
    kernel = expert_mm.grouped_mm

    def spy(rows: Tensor, *others: Tensor) -> Tensor:
        sizes.append(len(rows))
        return kernel(rows, *others)

    monkeypatch.setattr(experts, "rows_per_gemm", lambda *_: 0)
    expected, of_expected = gradients(replacement, replacement, inputs)
    monkeypatch.setattr(experts, "rows_per_gemm", lambda *_: 8)
    monkeypatch.setattr(experts, "row_rounding", lambda *_, **__: multiple)
    monkeypatch.setattr(expert_mm, "grouped_mm", spy)
    out, found = gradients(replacement, replacement, inputs)
    assert {*sizes} == {{1: 40, 4: 36, 64: 320}[multiple]}
    with torch.no_grad():
        quiet = replacement(*inputs)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    pairs = {name: (found[name], wanted) for name, wanted in of_expected.items()}
    for name, (value, wanted) in {**pairs, "out": (out, expected), "quiet": (quiet, expected)}.items():
        difference = torch.linalg.vector_norm(value.double() - wanted.double())
        assert difference <= tolerance * torch.linalg.vector_norm(wanted.double()), name


@pytest.mark.usefixtures("by_pytorch")
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_are_not_rounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is multiplied by itself there: one that fills up would cost as much as any other."""
    replacement = shared(original(kind, torch.bfloat16))
    hidden, index, weights = route(4, 2)
    seen = []
    bags = expert_mm._bagged

    def spy(rows: Tensor, *others: Tensor) -> Tensor:
        seen.append(len(rows))
        return bags(rows, *others)

    monkeypatch.setattr(expert_mm, "_bagged", spy)
    with torch.no_grad():
        replacement(hidden.bfloat16(), index, weights.bfloat16())
    assert seen == [4 * 2] * 4


@pytest.mark.usefixtures("by_pytorch")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [shared, grouped])
def test_what_fills_up_may_hold_anything(kind: str, make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel leaves what belongs to no expert as it was; here it is not a number."""
    replacement = make(original(kind, torch.bfloat16))  # type: ignore[operator]
    hidden, index, weights = route(9, 2)
    index[3, 0] = index[5, 0] = index[5, 1] = EXPERTS
    inputs = hidden.bfloat16(), index, weights.bfloat16()
    seen = []
    monkeypatch.setattr(experts, "by_row", lambda *_: False)
    monkeypatch.setattr(experts, "rows_per_gemm", lambda *_: 0)
    kernel = expert_mm.grouped_mm

    def spy(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        out = kernel(rows, weight, offsets)
        seen.append((len(rows), offsets.diff().unique().tolist()))
        out[int(offsets[-1]) :] = float("nan")
        return out

    with torch.no_grad():
        monkeypatch.setattr(experts, "row_rounding", lambda *_, **__: 1)
        expected = replacement(*inputs)
        monkeypatch.setattr(experts, "row_rounding", lambda *_, **__: 8)
        monkeypatch.setattr(expert_mm, "grouped_mm", spy)
        out = replacement(*inputs)
    assert seen and all(rows == 18 + 7 * EXPERTS and {*counts} <= {0, 8, 16} for rows, counts in seen)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
