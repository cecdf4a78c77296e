"""Rows of tokens sorted by expert, and rounded to multiples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compress.modeling import expert_mm, experts, onednn
from moe_compress.modeling.routing import Routing
from tests.modeling.test_cores import grouped
from tests.modeling.test_experts import EXPERTS, KINDS, original, route, shared


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 30), top_k=st.integers(1, EXPERTS), multiple=st.integers(1, 16), seed=st.integers(0, 99))
def test_rounded_rows_go_to_their_experts_and_back(tokens: int, top_k: int, multiple: int, seed: int) -> None:
    hidden, index, weights = route(tokens, top_k, seed=seed)
    index[0, 0] = EXPERTS  # padding
    with torch.no_grad():
        routing = Routing(index, weights, EXPERTS, round_to=multiple)
        rows = routing.spread(hidden)
        own = torch.randn(len(rows), 1)  # something else for every row
        expected = torch.zeros(tokens, 1)
        for row, (token, weight) in enumerate(zip(routing.tokens.tolist(), routing.weights, strict=True)):
            expected[token] += weight * own[row]
        torch.testing.assert_close(routing.collect(own, routing.weights), expected)
        torch.testing.assert_close(routing.collect(rows), hidden * top_k)
    assert not (routing.offsets % multiple).any()
    starts = [0, *routing.offsets.tolist()[:-1]]
    for expert, (start, end) in enumerate(zip(starts, routing.offsets.tolist(), strict=True)):
        real = ~routing.padding[start:end, 0]
        assert (routing.experts[start:end][real] == expert).all()
        assert sorted(routing.tokens[start:end][real].tolist()) == (index == expert).any(dim=1).nonzero()[:, 0].tolist()
    assert routing.padding[routing.offsets[-1] :].all() if multiple > 1 else len(rows) == tokens * top_k
    assert len(rows) == len(Routing(index.flip(0), weights, EXPERTS, round_to=multiple).tokens)  # whatever the index


def test_rows_are_rounded_where_onednn_compiles_for_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    side = torch.zeros(64, 4, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        sizes = [expert_mm.row_rounding(64 * rows, [side]) for rows in (1, 16, 40, 64, 300)]
        assert sizes == [8, 8, 8, 8, 32]
        assert expert_mm.row_rounding(64, [side.float()]) == 1
        assert expert_mm.row_rounding(64, [side.to("meta")]) == 1
        monkeypatch.setattr(onednn, "_FASTER", True)
        large = torch.zeros(64, 1, 1).expand(-1, 512, 512)
        assert expert_mm.row_rounding(64 * 64, [side.float(), large]) == 8
        assert expert_mm.row_rounding(64 * 64, [large.double()]) == 1
        monkeypatch.setattr(onednn, "_FASTER", False)
        assert expert_mm.row_rounding(64 * 64, [side.float(), large]) == 1
    assert expert_mm.row_rounding(64, [side]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_are_not_rounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is multiplied by itself there: one that fills up would cost as much as any other."""
    replacement = shared(original(kind, torch.bfloat16))
    hidden, index, weights = route(6, 2)
    seen = []
    bags = expert_mm._bagged

    def spy(rows: Tensor, *others: Tensor) -> Tensor:
        seen.append(len(rows))
        return bags(rows, *others)

    monkeypatch.setattr(expert_mm, "_bagged", spy)
    with torch.no_grad():
        replacement(hidden.bfloat16(), index, weights.bfloat16())
    assert seen == [6 * 2] * 4


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
    kernel = expert_mm.grouped_mm

    def spy(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        out = kernel(rows, weight, offsets)
        seen.append((len(rows), offsets.diff().unique().tolist()))
        out[int(offsets[-1]) :] = float("nan")
        return out

    with torch.no_grad():
        monkeypatch.setattr(experts, "row_rounding", lambda *_: 1)
        expected = replacement(*inputs)
        monkeypatch.setattr(experts, "row_rounding", lambda *_: 8)
        monkeypatch.setattr(expert_mm, "grouped_mm", spy)
        out = replacement(*inputs)
    assert seen and all(rows == 18 + 7 * EXPERTS and {*counts} <= {0, 8, 16} for rows, counts in seen)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
