"""Experts in groups: planted groups are found, and each group is fitted around a core of its own."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.errors import UserError
from moe_compress.factorization import FitSpec, Form, align_neurons, error_curve, fit, group_experts, permute_neurons

PLANTED = torch.tensor([0, 1, 0, 2, 1, 1, 0, 2])


def around_cores(groups=PLANTED, rows=12, columns=10, noise=0.3, seed=0):
    """Experts [E, rows, columns] scattered around the core of their group."""
    generator = torch.Generator().manual_seed(seed)
    cores = torch.randn(int(groups.max()) + 1, rows, columns, generator=generator)
    return cores[groups] + noise * torch.randn(len(groups), rows, columns, generator=generator)


def spread(weights, groups):
    """The squared distances of the experts to the means of their groups."""
    means = [weights[groups == group].mean(0) for group in range(int(groups.max()) + 1)]
    return sum(float((weight - means[group]).square().sum()) for weight, group in zip(weights, groups, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_groups_are_found(dtype):
    found = group_experts(around_cores(noise=0.5).to(dtype), 3)
    assert found.dtype == torch.int64 and found.tolist() == PLANTED.tolist()


def test_the_gram_decides_what_is_alike(anisotropic_grams):
    """What the inputs never reach does not count."""
    weights = around_cores(noise=0.1)
    weights[:, :, 5:] = 10 * around_cores(groups=torch.arange(8) % 2, columns=5, noise=0.1, seed=1)
    gram = torch.diag(torch.tensor([1.0] * 5 + [0.0] * 5)).expand(8, -1, -1)
    assert group_experts(weights, 3, gram).tolist() == PLANTED.tolist()
    assert group_experts(weights, 2).tolist() == (torch.arange(8) % 2).tolist()


@settings(max_examples=30, deadline=None)
@given(experts=st.integers(2, 9), cores=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_no_group_is_empty_and_no_single_move_helps(experts, cores, seed):
    weights = torch.randn(experts, 5, 4, generator=torch.Generator().manual_seed(seed))
    cores = min(cores, experts)
    found = group_experts(weights, cores)
    assert sorted(set(found.tolist())) == list(range(cores))
    assert torch.equal(found, group_experts(weights, cores))
    best = spread(weights, found)
    for expert in range(experts):
        if int((found == found[expert]).sum()) > 1:
            for group in range(cores):
                moved = found.clone()
                moved[expert] = group
                assert spread(weights, moved) >= best * (1 - 1e-5)


def test_equal_experts_do_not_confuse_it():
    assert sorted(set(group_experts(torch.ones(6, 3, 4), 3).tolist())) == [0, 1, 2]


@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize(("method", "form"), [("closed_form", "delta"), ("closed_form", "wrapper"), ("adam", "delta")])
def test_each_group_is_fitted_like_experts_of_their_own(anisotropic_grams, method, form, with_gram):
    weights = around_cores()
    gram = anisotropic_grams(8, 10) if with_gram else None
    spec = FitSpec(method=method, parameterization=form, delta_rank=2, cores=3, iterations=2, num_steps=20)
    result = fit(weights, spec, gram, PLANTED)
    assert result.factors.cores == 3 and result.factors.groups.tolist() == PLANTED.tolist()
    error = result.relative_error if gram is None else result.data_error
    assert result.history[-1] == pytest.approx(error, rel=1e-3 if gram is None else 0.3)  # these grams are damped a lot
    for group in range(3):
        mask = group == PLANTED
        alone = fit(weights[mask], replace(spec, cores=1), None if gram is None else gram[mask])
        # The damping of Gram matrices depends a little on those beside them.
        tolerance = {} if gram is None else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(result.factors.materialize()[mask], alone.factors.materialize(), **tolerance)


def test_groups_beat_one_core_where_there_are_groups():
    weights = around_cores()
    errors = [fit(weights, FitSpec(delta_rank=2, cores=cores)).relative_error for cores in (1, 3)]
    assert errors[1] < 0.3 * errors[0]
    assert fit(weights, FitSpec(delta_rank=2, cores=3)).factors.groups.tolist() == PLANTED.tolist()


def test_the_curve_is_that_of_the_first_fit():
    weights = around_cores()
    curve = error_curve(weights, Form(3))
    for rank in (1, 4):
        result = fit(weights, FitSpec(delta_rank=rank, cores=3, iterations=1))
        assert float(curve[rank]) == pytest.approx(result.relative_error, rel=1e-3)


@pytest.mark.parametrize("cores", [-1, 8, 9])
def test_more_cores_than_make_sense(cores):
    with pytest.raises(UserError, match=f"compression.cores={cores}"):
        fit(around_cores(), FitSpec(delta_rank=2, cores=cores))


def shuffle(gate_up, down, seed=2):
    experts, neurons = len(down), down.shape[2]
    generator = torch.Generator().manual_seed(seed)
    planted = torch.stack([torch.randperm(neurons, generator=generator) for _ in range(experts)])
    return permute_neurons(gate_up, down, planted, interleaved=False, gates=2)


def test_neurons_are_aligned_within_the_groups():
    """Groups of gate_up, one core of down: an order serves both."""
    gate_up = around_cores(rows=24, columns=6, noise=0.1)
    down = around_cores(torch.zeros(8, dtype=torch.int64), 6, 12, noise=0.1, seed=1)
    given = shuffle(gate_up, down)
    found = align_neurons(*given, interleaved=False, gates=2, groups=(PLANTED, None))
    again = permute_neurons(*given, found, interleaved=False, gates=2)
    assert spread(again[0], PLANTED) == pytest.approx(spread(gate_up, PLANTED), rel=1e-4)
    everyone = torch.zeros(8, dtype=torch.int64)
    assert spread(again[1], everyone) == pytest.approx(spread(down, everyone), rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), common=st.sampled_from([0.0, 1.0]))
def test_alignment_within_groups_never_loses(seed, common):
    generator = torch.Generator().manual_seed(seed)
    groups = tuple(torch.randint(0, 2, (6,), generator=generator) for _ in range(2))
    for group in groups:
        group[:2] = torch.tensor([0, 1])
    noise = torch.randn(6, 10, 4, generator=generator), torch.randn(6, 4, 5, generator=generator)
    given = tuple(common * torch.randn(1, *part.shape[1:], generator=generator) + part for part in noise)
    order = align_neurons(*given, interleaved=False, gates=2, groups=groups)
    aligned = permute_neurons(*given, order, interleaved=False, gates=2)
    before, after = (sum(map(spread, pair, groups)) for pair in (given, aligned))
    assert after <= before * (1 + 1e-5)
