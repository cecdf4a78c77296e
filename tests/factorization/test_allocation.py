"""Error curves are those of the fits, and the greedy division of a budget is the best there is."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.errors import UserError
from moe_compress.factorization import (
    FitSpec,
    check_rank,
    error_curve,
    fit,
    greedy_ranks,
    largest_rank,
    projection_bytes,
    shrink_grams,
    uniform_ranks,
)


def experts(rows=20, columns=12, count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rows, columns, generator=generator) + torch.randn(rows, columns, generator=generator)


def grams_of(columns=12, count=5):
    inputs = torch.randn(count, 40, columns, generator=torch.Generator().manual_seed(3)) * torch.linspace(
        0.1, 3, columns
    )
    return shrink_grams(inputs.mT @ inputs, 0.1)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
@pytest.mark.parametrize("cores", [0, 1])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_curve_is_the_error_of_the_fit(shape, cores, calibrated):
    weights = experts(*shape)
    gram = grams_of(shape[1]) if calibrated else None
    curve = error_curve(weights, cores=cores, gram=gram)
    assert len(curve) == 13
    assert abs(curve[-1]) < 1e-6
    assert (curve.diff() <= 0).all()
    assert (curve.diff().diff() >= -1e-7).all()  # convex
    if not cores:
        assert curve[0] == pytest.approx(1, abs=1e-5)
    for rank in (1, 4, 11):
        result = fit(weights, FitSpec(delta_rank=rank, cores=cores, iterations=1), gram)
        assert curve[rank] == pytest.approx(result.history[0], rel=1e-3, abs=1e-6)


def test_the_curve_of_equal_experts_is_zero():
    curve = error_curve(experts(count=1).expand(4, -1, -1), cores=1)
    assert curve.max() < 1e-6


def curves_of(shapes, draws):
    found = {}
    for (name, (_, rows, columns)), drops in zip(shapes.items(), draws, strict=True):
        squares = sorted((drops * (min(rows, columns) // len(drops) + 1))[: min(rows, columns)], reverse=True)
        found[name] = [sum(squares[rank:]) for rank in range(len(squares) + 1)]
    return found


@settings(max_examples=60, deadline=None)
@given(
    draws=st.lists(st.lists(st.floats(0.01, 10), min_size=3, max_size=12), min_size=2, max_size=4),
    ratio=st.floats(0.3, 0.9),
    cores=st.integers(0, 1),
    multiple=st.sampled_from([1, 4]),
    parameterization=st.sampled_from(["delta", "wrapper"]),
)
def test_budget_is_kept_and_used(draws, ratio, cores, multiple, parameterization):
    cores = 1 if parameterization == "wrapper" else cores
    shapes = {f"layer.{i}": (6, 24 + 8 * i, 40) for i in range(len(draws))}
    curves = curves_of(shapes, draws)
    budget = math.floor(ratio * sum(2 * math.prod(shape) for shape in shapes.values()))
    least = 2 if parameterization == "wrapper" else 1
    common = {"cores": cores, "bytes_per_value": 2, "rank_multiple": multiple, "parameterization": parameterization}
    try:
        even = uniform_ranks(shapes, target_bytes=budget, **common)
    except UserError:
        return
    ranks = greedy_ranks(curves, shapes, budget=budget, **common)
    assert list(ranks) == list(shapes)
    spent = sum(projection_bytes(*shapes[name], rank, cores, 2) for name, rank in ranks.items())
    assert spent <= budget
    for name, rank in ranks.items():
        check_rank(name, shapes[name], rank, cores=cores, parameterization=parameterization)
        assert rank % multiple == 0 or min(ranks.values()) < multiple
        step = max(multiple, least) if rank >= multiple else least
        price = projection_bytes(*shapes[name], step, 0, 2)
        assert price > budget - spent or rank + step > largest_rank(
            shapes[name], cores=cores, parameterization=parameterization
        )
    if multiple == 1:
        # Convex curves: no division is better by more than one step, the one that does not fit any more.
        error, even_error = (sum(curves[name][rank] for name, rank in found.items()) for found in (ranks, even))
        assert error <= even_error + max(curve[least] - curve[2 * least] for curve in curves.values()) + 1e-9


def test_the_best_division_is_found():
    """Against all divisions; equal prices, so that the greedy choice is exactly optimal."""
    shapes = {name: (4, 16, 16) for name in "abc"}
    curves = {
        "a": [100.0 * 0.5**rank for rank in range(17)],
        "b": [10.0 - 10 * rank / 16 for rank in range(17)],
        "c": [1.0 * 0.9**rank for rank in range(17)],
    }
    step = projection_bytes(4, 16, 16, 1, 0, 2)
    budget = 9 * step
    ranks = greedy_ranks(curves, shapes, budget=budget, cores=0, bytes_per_value=2, rank_multiple=1)
    best = min(
        (division for division in itertools.product(range(1, 8), repeat=3) if sum(division) <= 9),
        key=lambda division: sum(curves[name][rank] for name, rank in zip("abc", division, strict=True)),
    )
    assert tuple(ranks.values()) == best
    assert ranks["c"] == 1


def test_cheaper_bytes_come_first():
    """The same drop costs half as much in the smaller projection."""
    shapes = {"large": (4, 64, 32), "small": (4, 32, 16)}
    curve = [1 - rank / 16 for rank in range(17)]
    price = {name: projection_bytes(*shape, 1, 0, 2) for name, shape in shapes.items()}
    budget = sum(price.values()) + 3 * price["small"]
    ranks = greedy_ranks(
        {"large": curve, "small": curve}, shapes, budget=budget, cores=0, bytes_per_value=2, rank_multiple=1
    )
    assert ranks == {"large": 1, "small": 4}


def test_too_small_a_budget_is_refused():
    shapes = {"a": (4, 16, 16)}
    with pytest.raises(UserError, match=r"100 bytes are less than .* \(768\)"):
        greedy_ranks({"a": [1.0] * 17}, shapes, budget=100, cores=1, bytes_per_value=2)
