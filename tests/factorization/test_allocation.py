"""The greedy division of a budget is the best there is, over ranks and over forms."""

import itertools
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_compress.errors import UserError
from moe_compress.factorization import (
    Budget,
    Choice,
    Form,
    check_rank,
    greedy_choices,
    projection_bytes,
    uniform_choices,
    uniform_ranks,
)

PLAIN = Form(0)


def greedy(curves, shapes, total, form=PLAIN, rank_multiple=1, parameterization="delta"):
    budget = Budget(shapes, total, 2, 2, rank_multiple, parameterization)
    found = greedy_choices({name: {form: curve} for name, curve in curves.items()}, budget)
    assert {choice.form for choice in found.values()} == {form}
    return {name: choice.delta_rank for name, choice in found.items()}


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
    form = Form(cores)
    rounding = {"rank_multiple": multiple, "parameterization": parameterization}
    try:
        even = uniform_ranks(shapes, target_bytes=budget, forms=form, bytes_per_value=2, **rounding)
    except UserError:
        return
    ranks = greedy(curves, shapes, budget, form, **rounding)
    assert list(ranks) == list(shapes)
    spent = sum(projection_bytes(shapes[name], rank, form, 2) for name, rank in ranks.items())
    assert spent <= budget
    for name, rank in ranks.items():
        check_rank(name, shapes[name], rank, form=form, parameterization=parameterization)
        assert rank % multiple == 0 or min(ranks.values()) < multiple
        step = max(multiple, least) if rank >= multiple else least
        price = projection_bytes(shapes[name], step, PLAIN, 2)
        assert price > budget - spent or rank + step > Budget(shapes, 0, 2, 2, **rounding).most(name, form)
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
    step = projection_bytes((4, 16, 16), 1, PLAIN, 2)
    budget = 9 * step
    ranks = greedy(curves, shapes, budget)
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
    price = {name: projection_bytes(shape, 1, PLAIN, 2) for name, shape in shapes.items()}
    budget = sum(price.values()) + 3 * price["small"]
    ranks = greedy({"large": curve, "small": curve}, shapes, budget)
    assert ranks == {"large": 1, "small": 4}


def test_too_small_a_budget_is_refused():
    shapes = {"a": (4, 16, 16)}
    with pytest.raises(UserError, match=r"100 bytes are less than .* \(768\)"):
        greedy({"a": [1.0] * 17}, shapes, 100, Form(1))


@settings(max_examples=40, deadline=None)
@example(starts=[[1.0, 0.25, 1.0]] * 3, decays=[0.5] * 3, ratio=0.3046875)  # all change their form at one price
@given(
    starts=st.lists(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), min_size=2, max_size=3),
    decays=st.lists(st.floats(0.3, 0.95), min_size=3, max_size=3),
    ratio=st.floats(0.3, 0.8),
)
def test_forms_are_chosen_with_the_ranks(starts, decays, ratio):
    """Against all combinations of forms and ranks, up to the last step of a budget that is not spent to the byte."""
    forms = (Form(0), Form(1), Form(0, 5))
    shapes = {str(number): (6, 12, 10) for number in range(len(starts))}
    curves = {
        name: {
            form: [start * decay**rank for rank in range(1 + min(12, form.basis or 10))]
            for form, start, decay in zip(forms, own, decays, strict=True)
        }
        for name, own in zip(shapes, starts, strict=True)
    }
    total = math.floor(ratio * len(shapes) * 6 * 12 * 10 * 2)
    budget = Budget(shapes, total, 2, 2, rank_multiple=1)
    found = greedy_choices(curves, budget)
    assert sum(budget.cost(name, choice) for name, choice in found.items()) <= total

    def error(choices):
        return sum(curves[name][choice.form][choice.delta_rank] for name, choice in choices.items())

    options = [
        Choice(form, rank)
        for form in forms
        for rank in range(1, 6)
        if rank <= budget.most("0", form) and rank < len(curves["0"][form])
    ]
    best = min(
        (
            dict(zip(shapes, choices, strict=True))
            for choices in itertools.product(options, repeat=len(shapes))
            if sum(map(budget.cost, shapes, choices)) <= total
        ),
        key=error,
    )
    # The Lagrangian bound: no choice is better than the chords of the best curves, one step of which may be missing.
    step = max(
        curve[rank] - curve[rank + 1]
        for own in curves.values()
        for curve in own.values()
        for rank in range(1, len(curve) - 1)
    )
    gap = max(min(c[1] for c in own.values()) - min(c[-1] for c in own.values()) for own in curves.values())
    assert error(found) <= error(best) + max(step, gap) + 1e-9


def test_each_projection_takes_its_own_form():
    shapes = {"shared": (8, 32, 32), "apart": (8, 32, 32)}
    low, high = [0.1 * 0.5**rank for rank in range(33)], [1 - rank / 32 for rank in range(33)]
    curves = {"shared": {Form(0): high, Form(1): low}, "apart": {Form(0): low, Form(1): high}}
    total = math.prod(shapes["apart"])  # half of both, in two bytes each
    for choose in (greedy_choices, uniform_choices):
        found = choose(curves, Budget(shapes, total, 2, 2, rank_multiple=1))
        assert {name: choice.form for name, choice in found.items()} == {"shared": Form(1), "apart": Form(0)}
        spent = sum(projection_bytes(shapes[name], c.delta_rank, c.form, 2) for name, c in found.items())
        assert total - projection_bytes((8, 32, 32), 1, PLAIN, 2) < spent <= total
