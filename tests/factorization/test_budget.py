"""Byte budgets: never exceeded, used up, the same share everywhere, and refused with the nearest feasible ratio."""

import math
import re
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_compress.errors import UserError
from moe_compress.factorization import FitSpec, Form, check_rank, fit, largest_rank, projection_bytes, uniform_ranks

shapes_of_models = st.dictionaries(
    st.sampled_from([f"layers.{i}.{p}" for i in range(3) for p in ("gate_up_proj", "down_proj")]),
    st.tuples(st.integers(2, 64), st.integers(8, 300), st.integers(8, 300)),
    min_size=1,
)
settings_of_budgets = {
    "forms": st.builds(Form, st.integers(0, 1), st.sampled_from([0, 0, 3, 40])),
    "bytes_per_value": st.sampled_from([2, 4]),
    "rank_multiple": st.sampled_from([1, 3, 8, 16]),
    "parameterization": st.sampled_from(["delta", "wrapper"]),
}


def total_bytes(shapes, ranks, form, width):
    return sum(projection_bytes(shapes[name], rank, form, width) for name, rank in ranks.items())


def test_bytes_are_those_of_the_tensors():
    import torch

    weights = torch.randn(5, 12, 20, generator=torch.Generator().manual_seed(0))
    for form, parameterization in (
        (Form(0), "delta"),
        (Form(1), "delta"),
        (Form(1), "wrapper"),
        (Form(0, 7), "delta"),
        (Form(1, 7), "delta"),
    ):
        spec = FitSpec(parameterization=parameterization, delta_rank=4, cores=form.cores, basis=form.basis)
        tensors = [tensor for tensor in vars(fit(weights, spec).factors).values() if tensor is not None]
        stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert stored == projection_bytes((5, 12, 20), 4, form, 4)


@settings(max_examples=200, deadline=None)
@given(shapes=shapes_of_models, ratio=st.floats(0.02, 0.98), budget=st.fixed_dictionaries(settings_of_budgets))
def test_budget_is_kept_and_used_up(shapes, ratio, budget):
    width, form = budget["bytes_per_value"], budget["forms"]
    unit = 2 if budget["parameterization"] == "wrapper" else 1
    multiple = math.lcm(budget["rank_multiple"], unit)
    # Exactly: 0.3333333333333333 of 7,056 bytes are less than 2,352, which is what floats round them to.
    allowed = Fraction(str(ratio)) * sum(math.prod(shape) * width for shape in shapes.values())
    try:
        ranks = uniform_ranks(shapes, ratio=ratio, **budget)
    except UserError:
        assume(False)
    assert list(ranks) == list(shapes)
    spent = total_bytes(shapes, ranks, form, width)
    assert spent <= allowed
    for name, rank in ranks.items():
        check_rank(name, shapes[name], rank, form=form, parameterization=budget["parameterization"])
        assert rank % unit == 0 and (rank < multiple or rank % multiple == 0)
        step = multiple if rank >= multiple else unit
        more = total_bytes(shapes, {**ranks, name: rank + step}, form, width)
        at_most = largest_rank(shapes[name], form=form, parameterization=budget["parameterization"])
        assert more > allowed or rank + step > at_most, f"{name} could have had {rank + step}"


@settings(max_examples=100, deadline=None)
@given(shapes=shapes_of_models, ratio=st.floats(0.1, 0.9), cores=st.integers(0, 1))
def test_every_projection_keeps_the_same_share(shapes, ratio, cores):
    """Up to the two steps that rounding down and what it leaves may move it."""
    try:
        ranks = uniform_ranks(shapes, ratio=ratio, forms=Form(cores), bytes_per_value=2, rank_multiple=1)
    except UserError:
        assume(False)
    for name, rank in ranks.items():
        experts, rows, columns = shapes[name]
        share = Fraction(str(ratio))
        exact = (share * experts * rows * columns - cores * rows * columns) / (experts * (rows + columns))
        most = largest_rank(shapes[name], form=Form(cores), parameterization="delta")
        assert rank >= min(math.floor(exact), most)
    if len(shapes) == 1:
        assert rank == min(math.floor(exact), most)


@settings(max_examples=100, deadline=None)
@given(
    shapes=shapes_of_models,
    ratio=st.one_of(st.floats(-0.5, 0.2), st.floats(1.0, 2.0)),
    budget=st.fixed_dictionaries(settings_of_budgets),
)
def test_refusal_names_a_ratio_that_works_and_is_the_nearest(shapes, ratio, budget):
    try:
        uniform_ranks(shapes, ratio=ratio, **budget)
    except UserError as error:
        message = str(error)
    else:
        assume(False)
    assert "\n" not in message
    if "cannot be made smaller" in message or "above the dimensions" in message:
        return  # one projection has no rank at all, whatever the ratio
    nearest, byte_count = re.search(r"target_ratio is ([\d.]+) \(([\d,]+) bytes\)", message).groups()
    assert uniform_ranks(shapes, ratio=float(nearest), **budget)
    assert uniform_ranks(shapes, target_bytes=int(byte_count.replace(",", "")), **budget)
    if ratio < 1:
        with pytest.raises(UserError):
            uniform_ranks(shapes, ratio=float(nearest) - 1.01e-4, **budget)


def test_reference_shapes():
    """The shipped model: 64 experts of 128 x 192 and 192 x 64, a quarter of the bytes."""
    shapes = {f"{i}.{p}": s for i in range(4) for p, s in (("up", (64, 128, 192)), ("down", (64, 192, 64)))}
    ranks = uniform_ranks(shapes, ratio=0.25, forms=Form(1), bytes_per_value=2, rank_multiple=1)
    # (0.25 * 64 - 1) * out * in / (64 * (out + in)) is 18.0 and 11.25; the quarters make one more of down.
    assert {name: rank for name, rank in ranks.items() if name.endswith("up")} == {f"{i}.up": 18 for i in range(4)}
    assert sorted(rank for name, rank in ranks.items() if name.endswith("down")) == [11, 11, 11, 12]


def test_left_over_bytes_go_to_further_multiples():
    """Rounding 15 down to 8 in two layers leaves enough for one of them to have 16."""
    shapes = {"a": (10, 100, 100), "b": (10, 100, 100)}
    target = 2 * projection_bytes((10, 100, 100), 15, Form(1), 2)
    assert uniform_ranks(shapes, target_bytes=target, forms=Form(1), bytes_per_value=2, rank_multiple=8) == {
        "a": 16,
        "b": 8,
    }
    assert uniform_ranks(shapes, target_bytes=target, forms=Form(1), bytes_per_value=2, rank_multiple=1) == {
        "a": 15,
        "b": 15,
    }


def test_left_over_bytes_go_where_most_was_rounded_away():
    """A share of 0.3 is a rank of 15 of a and c, rounded down to 8, and of exactly 24 of b, which needs no more."""
    shapes = {"b": (10, 160, 160), "a": (10, 100, 100), "c": (10, 100, 100)}
    ranks = uniform_ranks(shapes, ratio=0.3, forms=Form(0), bytes_per_value=2, rank_multiple=8)
    assert ranks == {"b": 24, "a": 16, "c": 8}


def test_bytes_and_ratio_are_the_same_budget():
    shapes = {"a": (8, 64, 128), "b": (8, 128, 32)}
    total = sum(math.prod(shape) * 2 for shape in shapes.values())
    common = {"forms": Form(1), "bytes_per_value": 2, "rank_multiple": 1}
    assert uniform_ranks(shapes, ratio=0.5, **common) == uniform_ranks(shapes, target_bytes=total // 2, **common)
    wide = uniform_ranks(shapes, ratio=0.5, **{**common, "bytes_per_value": 4}, original_bytes_per_value=2)
    assert wide == uniform_ranks(shapes, ratio=0.25, **{**common, "bytes_per_value": 4})


def test_target_must_be_given_once():
    for wrong in ({}, {"ratio": 0.5, "target_bytes": 5}):
        with pytest.raises(ValueError, match="either"):
            uniform_ranks({"a": (8, 64, 128)}, forms=Form(1), bytes_per_value=2, **wrong)
    with pytest.raises(ValueError, match="projections"):
        uniform_ranks({}, forms=Form(1), bytes_per_value=2, ratio=0.5)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 64), st.integers(1, 300), st.integers(1, 300)),
    form=st.builds(Form, st.integers(0, 1), st.sampled_from([0, 0, 3, 40])),
    parameterization=st.sampled_from(["delta", "wrapper"]),
)
def test_largest_rank_is_the_last_that_saves_anything(shape, form, parameterization):
    most = largest_rank(shape, form=form, parameterization=parameterization)
    unit = 2 if parameterization == "wrapper" else 1
    assert most % unit == 0
    above = most + unit > (form.basis or most + unit) or most + unit >= shape[1]
    assert above or projection_bytes(shape, most + unit, form, 1) >= math.prod(shape)
    if most:
        assert projection_bytes(shape, most, form, 1) < math.prod(shape)
        assert most < shape[1] and most <= (form.basis or shape[2] - 1)
        check_rank("x", shape, most, form=form, parameterization=parameterization)
    with pytest.raises(UserError):
        check_rank("x", shape, most + unit, form=form, parameterization=parameterization)


@pytest.mark.parametrize(
    ("shape", "rank", "parameterization", "words"),
    [
        ((8, 64, 128), 64, "delta", "above the dimensions of 64 x 128 weights; choose compression.rank of at most 18"),
        ((8, 64, 128), 40, "delta", "costs as much as the original"),
        ((8, 64, 128), 0, "delta", "positive multiple of 1"),
        ((8, 64, 128), 7, "wrapper", "positive multiple of 2"),
        ((1, 64, 128), 2, "delta", "cannot be made smaller"),
    ],
)
def test_ranks_that_make_no_sense(shape, rank, parameterization, words):
    with pytest.raises(UserError, match=f"layers.0: .*{words}") as error:
        check_rank("layers.0", shape, rank, form=Form(1), parameterization=parameterization)
    assert "\n" not in str(error.value)
