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


def align_neurons(
    gate_up: Tensor,
    down: Tensor,
    *,
    interleaved: bool,
    gates: int,
    rounds: int = 4,
    groups: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Find the neuron order of each expert that makes the experts that share a core most alike.

    Maximizes the norm of the sum of the experts over permutations, which minimizes their squared distance to their
    mean; with groups, the squared norms of the sums of all groups of both projections, each over its size. Starting
    from the expert of the largest norm, each expert is matched to the sum of those matched before; then each is matched
    to the sum of all others, for up to `rounds` rounds, none of which can make the result worse. When the order found
    is no better than the given one, the given one is returned.

    Args:
        gate_up: [E, gates * I, H], any floating type.
        down: [E, H, I].
        interleaved: layout of the rows of gate_up, see `neuron_rows`.
        gates: rows of gate_up per neuron, 2 with a gate and 1 without.
        rounds: passes over the experts after the first; passes end when nothing changes.
        groups: [E] for gate_up and for down, the core of each expert; None where all share one.

    Returns:
        Permutation [E, I] (int64, on the device of gate_up); new neuron i of expert e is old neuron result[e, i].

    Raises:
        ValueError: the shapes do not belong together.
    """
    experts, rows, hidden = gate_up.shape
    neurons = rows // gates
    if down.shape != (experts, hidden, neurons):
        raise ValueError(f"gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} are not of the same experts")

    def features(expert: int) -> tuple[Tensor, Tensor]:
        """Everything that belongs to each neuron, [I, gates * H] and [I, H]."""
        by_part = gate_up[expert].float()
        if interleaved:
            incoming = by_part.reshape(neurons, gates * hidden)
        else:
            incoming = by_part.reshape(gates, neurons, hidden).transpose(0, 1).reshape(neurons, gates * hidden)
        return incoming, down[expert].float().mT

    def add(totals: list[Tensor], expert: int, own: tuple[Tensor, Tensor], sign: int = 1) -> None:
        for slot, part in zip(slots[expert], own, strict=True):
            totals[slot] = totals[slot] + sign * part[permutation[expert]]

    def match(expert: int, own: tuple[Tensor, Tensor]) -> Tensor:
        similarity = sum(totals[slot] @ part.mT / sizes[slot] for slot, part in zip(slots[expert], own, strict=True))
        assert isinstance(similarity, Tensor)
        if not bool(similarity.any()):  # the first expert of its groups
            return identity[expert]
        return torch.from_numpy(linear_sum_assignment(similarity.cpu().numpy(), maximize=True)[1]).to(gate_up.device)

    def energy(totals: list[Tensor]) -> float:
        return sum(float(total.square().sum()) / size for total, size in zip(totals, sizes, strict=True))

    # One sum of experts for each group of gate_up, then for each of down; an expert adds to one of each.
    own_groups = [[0] * experts if group is None else group.tolist() for group in groups]
    first_down = max(own_groups[0]) + 1
    slots = [(up, first_down + down) for up, down in zip(*own_groups, strict=True)]
    sizes = [sum(slot in pair for pair in slots) for slot in range(first_down + max(own_groups[1]) + 1)]
    zero = torch.zeros((), device=gate_up.device)
    given = [zero.expand(neurons, hidden * (gates if slot < first_down else 1)) for slot in range(len(sizes))]
    totals = list(given)

    identity = torch.arange(neurons, device=gate_up.device).repeat(experts, 1)
    permutation = identity.clone()
    norms = [sum(float(part.square().sum()) for part in features(expert)) for expert in range(experts)]
    order = torch.tensor(norms).argsort(descending=True, stable=True).tolist()
    for expert in order:
        own = features(expert)
        add(given, expert, own)
        permutation[expert] = match(expert, own)
        add(totals, expert, own)
    for _ in range(rounds if experts > 1 else 0):
        before = permutation.clone()
        for expert in order:
            own = features(expert)
            add(totals, expert, own, sign=-1)
            permutation[expert] = match(expert, own)
            add(totals, expert, own)
        if torch.equal(before, permutation):
            break
    return permutation if energy(totals) > energy(given) else identity
