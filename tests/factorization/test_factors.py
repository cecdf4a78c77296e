"""Fold and materialize: the same weights in every form, and the same gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.factorization import DeltaFactors, WrapperFactors
from moe_compress.factorization.factors import merge_groups, split_groups

sizes = st.integers(1, 7)


def wrapper_of(experts, rows, columns, side_rank, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, columns)] + [(experts, n, side_rank) for n in (rows, rows, columns, columns)]
    return WrapperFactors(*(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes))


@settings(max_examples=60, deadline=None)
@given(experts=sizes, rows=sizes, columns=sizes, side_rank=sizes, seed=st.integers(0, 2**31))
def test_fold_and_materialize_are_the_wrapper(experts, rows, columns, side_rank, seed):
    wrapper = wrapper_of(experts, rows, columns, side_rank, seed)
    by_definition = torch.stack(
        [
            (torch.eye(rows) + wrapper.u_out[e] @ wrapper.v_out[e].T)
            @ wrapper.core
            @ (torch.eye(columns) + wrapper.u_in[e] @ wrapper.v_in[e].T)
            for e in range(experts)
        ]
    )
    folded = wrapper.fold()
    assert folded.core is wrapper.core
    assert folded.delta_out.shape == (experts, rows, 2 * side_rank)
    assert folded.delta_in.shape == (experts, 2 * side_rank, columns)
    assert folded.delta_rank == wrapper.delta_rank == 2 * side_rank
    torch.testing.assert_close(folded.core + folded.delta_out @ folded.delta_in, by_definition)
    torch.testing.assert_close(folded.materialize(), by_definition)
    torch.testing.assert_close(wrapper.materialize(), by_definition)


def test_gradients_pass_through_the_fold():
    wrapper = wrapper_of(2, 3, 4, 2, seed=0)
    tensors = [t.requires_grad_() for t in vars(wrapper).values() if t is not None]
    assert torch.autograd.gradcheck(lambda *t: WrapperFactors(*t).fold().materialize(), tensors)


@pytest.mark.parametrize("cores", [0, 1])
def test_materialize_some_experts(random_delta, cores):
    delta = random_delta(5, 6, 7, 2, cores=cores)
    assert (delta.core is None) == (cores == 0)
    torch.testing.assert_close(delta.materialize(slice(1, 3)), delta.materialize()[1:3])
    torch.testing.assert_close(delta.materialize(), (delta.core if cores else 0) + delta.delta_out @ delta.delta_in)
    assert delta.fold() is delta


def test_materialize_some_experts_of_a_wrapper(random_wrapper):
    wrapper = random_wrapper(5, 6, 7, 2)
    torch.testing.assert_close(wrapper.materialize(slice(3, 5)), wrapper.materialize()[3:])


def test_factors_are_immutable(random_delta):
    delta = random_delta(2, 3, 4, 1)
    with pytest.raises(AttributeError):
        delta.core = None
    assert isinstance(delta, DeltaFactors)


@pytest.mark.parametrize("kind", ["delta", "wrapper"])
def test_each_group_has_its_core(random_delta, kind):
    groups = torch.tensor([1, 0, 2, 1, 0, 1])
    parts = [
        random_delta(int((groups == g).sum()), 5, 4, 2, seed=g)
        if kind == "delta"
        else wrapper_of(int((groups == g).sum()), 5, 4, 1, seed=g)
        for g in range(3)
    ]
    merged = merge_groups(parts, groups)
    assert merged.cores == 3 and merged.core.shape == (15, 4) and merged.delta_rank == 2
    for group, part in enumerate(parts):
        torch.testing.assert_close(merged.materialize()[groups == group], part.materialize())
        torch.testing.assert_close(merged.fold().materialize()[groups == group], part.materialize())
    torch.testing.assert_close(merged.materialize(slice(2, 5)), merged.materialize()[2:5])
    for part, back in zip(parts, split_groups(merged), strict=True):
        torch.testing.assert_close(back.materialize(), part.materialize())
