"""Neuron alignment: exact for the function of every expert, and it finds planted orders."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_compress.factorization import align_neurons, neuron_rows, permute_neurons, permute_rows

layouts = st.sampled_from([(False, 2), (True, 2), (False, 1), (True, 1)])


def expert_output(inputs, gate_up, gate_up_bias, down, down_bias, *, interleaved, gates):
    """One expert as its model computes it, [T, H] to [T, H]."""
    rows = inputs @ gate_up.T + gate_up_bias
    if gates == 1:
        hidden = torch.relu(rows) ** 2
    else:
        gate, up = (rows[:, 0::2], rows[:, 1::2]) if interleaved else rows.chunk(2, dim=1)
        hidden = torch.nn.functional.silu(gate) * up
    return hidden @ down.T + down_bias


def random_orders(experts, neurons, generator):
    return torch.stack([torch.randperm(neurons, generator=generator) for _ in range(experts)])


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(1, 4),
    neurons=st.integers(1, 9),
    hidden=st.integers(1, 6),
    layout=layouts,
    seed=st.integers(0, 2**31),
)
def test_permuted_experts_compute_the_same_function(experts, neurons, hidden, layout, seed):
    interleaved, gates = layout
    generator = torch.Generator().manual_seed(seed)
    normal = {"generator": generator, "dtype": torch.float64}
    gate_up = torch.randn(experts, gates * neurons, hidden, **normal)
    gate_up_bias = torch.randn(experts, gates * neurons, **normal)
    down = torch.randn(experts, hidden, neurons, **normal)
    down_bias = torch.randn(experts, hidden, **normal)
    inputs = torch.randn(5, hidden, **normal)
    orders = random_orders(experts, neurons, generator)
    new_gate_up, new_down = permute_neurons(gate_up, down, orders, interleaved=interleaved, gates=gates)
    new_bias = permute_rows(gate_up_bias, orders, interleaved=interleaved, gates=gates)
    same_bias, _ = permute_neurons(gate_up_bias, down, orders, interleaved=interleaved, gates=gates)
    assert torch.equal(new_bias, same_bias)
    for e in range(experts):
        torch.testing.assert_close(
            expert_output(
                inputs, new_gate_up[e], new_bias[e], new_down[e], down_bias[e], interleaved=interleaved, gates=gates
            ),
            expert_output(
                inputs, gate_up[e], gate_up_bias[e], down[e], down_bias[e], interleaved=interleaved, gates=gates
            ),
        )


def test_rows_of_both_layouts():
    order = torch.tensor([[2, 0, 1]])
    assert neuron_rows(order, interleaved=False, gates=2).tolist() == [[2, 0, 1, 5, 3, 4]]
    assert neuron_rows(order, interleaved=True, gates=2).tolist() == [[4, 5, 0, 1, 2, 3]]
    assert neuron_rows(order, interleaved=False, gates=1).tolist() == order.tolist()


@settings(max_examples=25, deadline=None)
@given(
    experts=st.integers(2, 6),
    neurons=st.integers(2, 24),
    layout=layouts,
    noise=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_planted_permutations_are_undone(experts, neurons, layout, noise, dtype, seed):
    """Permuted noisy copies of one expert come back in one common order."""
    interleaved, gates = layout
    hidden = 32
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(1, gates * neurons, hidden, generator=generator).repeat(experts, 1, 1)
    down = torch.randn(1, hidden, neurons, generator=generator).repeat(experts, 1, 1)
    gate_up += noise * torch.randn(gate_up.shape, generator=generator)
    down += noise * torch.randn(down.shape, generator=generator)
    planted = random_orders(experts, neurons, generator)
    shuffled = permute_neurons(gate_up.to(dtype), down.to(dtype), planted, interleaved=interleaved, gates=gates)
    found = align_neurons(*shuffled, interleaved=interleaved, gates=gates)
    assert found.shape == (experts, neurons) and found.dtype == torch.int64
    original = torch.gather(planted, 1, found)  # the neuron of the unshuffled expert that is now at each place
    assert torch.equal(original, original[:1].expand_as(original))


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 6),
    neurons=st.integers(1, 12),
    layout=layouts,
    common=st.sampled_from([0.0, 1.0]),
    rounds=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
@example(experts=5, neurons=4, layout=(False, 1), common=1.0, rounds=0, seed=292)  # one pass finds a worse order
@example(experts=4, neurons=3, layout=(False, 1), common=1.0, rounds=0, seed=296)
def test_alignment_never_loses(experts, neurons, layout, common, rounds, seed):
    """The result is a permutation, and the sum of the experts is no smaller than before."""
    interleaved, gates = layout
    generator = torch.Generator().manual_seed(seed)

    def alike(*shape):
        return common * torch.randn(1, *shape, generator=generator) + torch.randn(experts, *shape, generator=generator)

    gate_up, down = alike(gates * neurons, 3), alike(3, neurons)
    found = align_neurons(gate_up, down, interleaved=interleaved, gates=gates, rounds=rounds)
    assert torch.equal(found.sort(dim=1).values, torch.arange(neurons).expand(experts, neurons))
    aligned = permute_neurons(gate_up, down, found, interleaved=interleaved, gates=gates)

    def energy(pair):
        return sum(float(weights.sum(0).square().sum()) for weights in pair)

    assert energy(aligned) >= energy((gate_up, down)) * (1 - 1e-5)


def test_more_rounds_help_on_unrelated_experts():
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(8, 48, 16, generator=generator), torch.randn(8, 16, 24, generator=generator)
    energies = []
    for rounds in (0, 1, 5):
        order = align_neurons(*pair, interleaved=False, gates=2, rounds=rounds)
        aligned = permute_neurons(*pair, order, interleaved=False, gates=2)
        energies.append(sum(float(weights.sum(0).square().sum()) for weights in aligned))
    given_energy = sum(float(weights.sum(0).square().sum()) for weights in pair)
    assert energies[0] > 1.5 * given_energy
    assert energies[0] < energies[1] < energies[2]


def test_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match="not of the same experts"):
        align_neurons(torch.zeros(2, 8, 3), torch.zeros(2, 3, 5), interleaved=False, gates=2)
