"""Neuron alignment: permute the neurons of each expert so that all experts look alike before they share a core.

A neuron of an expert is one row of gate and up each and one column of down. Permuting the neurons leaves the
function of the expert unchanged and costs no bytes, but it decides how much the experts' mean has in common with
them. The matching is that of Git Re-Basin (Ainsworth et al. 2023, arXiv 2209.04836, section 3.2), for many models.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def neuron_rows(permutation: Tensor, *, interleaved: bool, gates: int) -> Tensor:
    """Rows of gate_up that belong to permuted neurons.

    Args:
        permutation: [E, I]; new neuron i of expert e is old neuron permutation[e, i].
        interleaved: rows are stored as gate 0, up 0, gate 1, ... (GPT-OSS) rather than all gates, then all ups.
        gates: rows per neuron, 2 with a gate and 1 without.

    Returns:
        [E, gates * I]: new row j of expert e is old row result[e, j].
    """
    experts, neurons = permutation.shape
    part = torch.arange(gates, device=permutation.device)
    if interleaved:
        return (permutation[:, :, None] * gates + part).reshape(experts, gates * neurons)
    return (permutation[:, None, :] + part[:, None] * neurons).reshape(experts, gates * neurons)


def permute_rows(rows: Tensor, permutation: Tensor, *, interleaved: bool, gates: int) -> Tensor:
    """Permute gate_up [E, gates * I, H], or its bias [E, gates * I], by a permutation [E, I] of the neurons."""
    expert = torch.arange(rows.shape[0], device=rows.device)[:, None]
    return rows[expert, neuron_rows(permutation.to(rows.device), interleaved=interleaved, gates=gates)]


def permute_columns(down: Tensor, permutation: Tensor) -> Tensor:
    """Permute down [E, H, I] by a permutation [E, I] of the neurons; its bias [E, H] stays as it is."""
    return torch.gather(down, 2, permutation.to(down.device)[:, None, :].expand_as(down))


def permute_neurons(
    gate_up: Tensor, down: Tensor, permutation: Tensor, *, interleaved: bool, gates: int
) -> tuple[Tensor, Tensor]:
    """Apply a permutation [E, I] to gate_up [E, gates * I, H] (or its bias [E, gates * I]) and down [E, H, I].

    Values are moved, never computed with: every expert remains the same function.
    """
    return permute_rows(gate_up, permutation, interleaved=interleaved, gates=gates), permute_columns(down, permutation)


def align_neurons(gate_up: Tensor, down: Tensor, *, interleaved: bool, gates: int, rounds: int = 4) -> Tensor:
    """Find the neuron order of each expert that makes the experts most alike.

    Maximizes the norm of the sum of the experts over permutations, which minimizes their squared distance to their
    mean. Starting from the expert of the largest norm, each expert is matched to the sum of those matched before; then
    each is matched to the sum of all others, for up to `rounds` rounds, none of which can make the result worse. When
    the order found is no better than the given one, the given one is returned.

    Args:
        gate_up: [E, gates * I, H], any floating type.
        down: [E, H, I].
        interleaved: layout of the rows of gate_up, see `neuron_rows`.
        gates: rows of gate_up per neuron, 2 with a gate and 1 without.
        rounds: passes over the experts after the first; passes end when nothing changes.

    Returns:
        Permutation [E, I] (int64, on the device of gate_up); new neuron i of expert e is old neuron result[e, i].

    Raises:
        ValueError: the shapes do not belong together.
    """
    experts, rows, hidden = gate_up.shape
    neurons = rows // gates
    if down.shape != (experts, hidden, neurons):
        raise ValueError(f"gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} are not of the same experts")

    def features(expert: int) -> Tensor:
        """[I, (gates + 1) * H]: everything that belongs to each neuron."""
        by_part = gate_up[expert].float()
        if interleaved:
            incoming = by_part.reshape(neurons, gates * hidden)
        else:
            incoming = by_part.reshape(gates, neurons, hidden).transpose(0, 1).reshape(neurons, gates * hidden)
        return torch.cat([incoming, down[expert].float().mT], dim=1)

    def match(reference: Tensor, expert_features: Tensor) -> Tensor:
        similarity = (reference @ expert_features.mT).cpu().numpy()
        return torch.from_numpy(linear_sum_assignment(similarity, maximize=True)[1]).to(gate_up.device)

    identity = torch.arange(neurons, device=gate_up.device).repeat(experts, 1)
    permutation = identity.clone()
    norms = gate_up.float().square().sum((1, 2)) + down.float().square().sum((1, 2))
    order = norms.argsort(descending=True, stable=True).tolist()
    given = total = torch.zeros_like(features(order[0]))
    for position, expert in enumerate(order):
        own = features(expert)
        given = given + own
        if position:
            permutation[expert] = match(total, own)
        total = total + own[permutation[expert]]
    for _ in range(rounds if experts > 1 else 0):
        before = permutation.clone()
        for expert in order:
            own = features(expert)
            others = total - own[permutation[expert]]
            permutation[expert] = match(others, own)
            total = others + own[permutation[expert]]
        if torch.equal(before, permutation):
            break
    return permutation if total.square().sum() > given.square().sum() else identity
