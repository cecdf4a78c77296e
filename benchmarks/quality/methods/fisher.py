"""Candidates for our own recipe: low-rank experts in the norm of the Fisher information, ranks where they count.

The second-order change of KL(teacher || student) when expert e's matrix changes by D follows from the Fisher
information of the matrix; Kronecker-factored (K-FAC, Martens and Grosse 2015, arXiv 1503.05671) it is

    1/2 tr(S_e D G_e D^T) / s_e,    S_e = sum d d^T,  G_e = sum |d|^2 x x^T,  s_e = sum |d|^2,

over the tokens routed to e, with input x and gradient d of the log-likelihood (routing weight included) with respect
to the output. So a truncated SVD of S_e^{1/2} W_e G_e^{1/2} is optimal, its squared singular values are nats, the same
unit for every expert, projection and layer, and the best ranks under a budget take the largest value per byte first.
"""

from __future__ import annotations

import heapq
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.calibration import Layer
from benchmarks.quality.forms import VALUE_BYTES, Form, Ragged
from benchmarks.quality.methods.base import Task, method

_SHRINKAGE = 0.1  # of each expert's matrices towards the mean of the layer
_DAMPING = 1e-2  # of the mean diagonal


class Whitened:
    """One projection of a layer in the norm of its Fisher information.

    Attributes:
        values: [E, min(out, in)] squared singular values in nats, largest first.
    """

    def __init__(self, weight: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        """`weight` [E, out, in], `inputs` [E, in, in] and `outputs` [E, out, out] with their product in nats."""
        self.root_in, self.root_out = _root(inputs), _root(outputs)
        self.left, singular, self.right = torch.linalg.svd(
            self.root_out.mT @ weight.double() @ self.root_in, full_matrices=False
        )
        self.singular, self.values = singular, singular.square() / 2

    def factors(self, ranks: Tensor) -> Ragged:
        """The best factors of rank `ranks` [E]."""
        scale = self.singular.sqrt()
        out = torch.linalg.solve_triangular(self.root_out.mT, self.left * scale[:, None], upper=True)
        into = torch.linalg.solve_triangular(self.root_in, self.right * scale[:, :, None], upper=False, left=False)
        kept = torch.arange(self.values.shape[1]) < ranks[:, None]
        return Ragged(out.mT[kept].float(), into[kept].float(), ranks)


def _root(grams: Tensor) -> Tensor:
    """Cholesky factors of damped matrices [E, n, n]."""
    diagonal = grams.diagonal(dim1=1, dim2=2).mean(1)
    damping = _DAMPING * diagonal.clamp_min(_DAMPING * float(diagonal.mean()))
    return torch.linalg.cholesky(grams + damping[:, None, None] * torch.eye(grams.shape[-1], dtype=grams.dtype))


def fisher_factors(layer: Layer) -> dict[str, tuple[Tensor, Tensor]]:
    """For each projection G_e / s_e [E, in, in] and S_e [E, out, out], shrunk, per token of the calibration; fp64."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    sums: dict[str, list[tuple[Tensor, Tensor, float]]] = {name: [] for name in layer.weights}
    for expert in range(layer.num_experts):
        for name, (inputs, gradients) in layer.seen(expert).items():
            norms = gradients.square().sum(1)
            scaled = inputs * norms.sqrt()[:, None]
            sums[name].append((scaled.mT @ scaled, gradients.mT @ gradients, float(norms.sum())))
    for name, parts in sums.items():
        inputs, outputs = (torch.stack([part[i] for part in parts]).double() for i in (0, 1))  # type: ignore[misc]
        trace = torch.tensor([part[2] for part in parts]).double()
        inputs, outputs = (torch.lerp(each, each.mean(0, keepdim=True), _SHRINKAGE) for each in (inputs, outputs))
        trace = torch.lerp(trace, trace.mean(), _SHRINKAGE)
        found[name] = inputs / trace[:, None, None], outputs / len(layer.inputs)
    return found


def whitened_layers(task: Task) -> dict[tuple[str, str], Whitened]:
    """All projections, computed once for all ratios."""
    if "fisher" not in task.shared:
        task.shared["fisher"] = {
            (layer.name, name): Whitened(layer.weights[name], *factors)
            for layer in task.layers
            for name, factors in fisher_factors(layer).items()
        }
    return task.shared["fisher"]


def best_ranks(values: dict[Any, Tensor], prices: dict[Any, int], budget: int) -> dict[Any, Tensor]:
    """The ranks that keep the most, by the largest value per byte first, which is optimal but for the last step.

    Args:
        values: [n, R] for each key: what each further rank of n rows keeps, falling along R.
        prices: what a rank of one row costs.
        budget: what all ranks may cost.

    Returns:
        [n] ranks for each key.
    """
    ranks = {key: torch.zeros(len(value), dtype=torch.int64) for key, value in values.items()}
    queue = [
        (-float(value[row, 0]) / prices[key], number, key, row)
        for number, (key, value) in enumerate(values.items())
        for row in range(len(value))
    ]
    heapq.heapify(queue)
    while queue:
        _, number, key, row = heapq.heappop(queue)
        if prices[key] > budget:
            continue
        budget -= prices[key]
        ranks[key][row] += 1
        rank = int(ranks[key][row])
        if rank < values[key].shape[1]:
            heapq.heappush(queue, (-float(values[key][row, rank]) / prices[key], number, key, row))
    return ranks


@method("fisher", allocation="uniform", version=1)
@method("fisher-projections", allocation="projections", version=1)
@method("fisher-experts", allocation="experts", version=1)
def fisher(task: Task, allocation: str) -> Any:
    """Low-rank experts without a core: the same share for all, ranks for each projection, or for each expert."""
    whitened = whitened_layers(task)
    weights = {(layer.name, name): weight for layer in task.layers for name, weight in layer.weights.items()}
    budget = VALUE_BYTES * sum(task.budget(weight) for weight in weights.values())
    prices = {key: VALUE_BYTES * sum(weight.shape[1:]) for key, weight in weights.items()}
    if allocation == "experts":
        budget -= sum(2 * len(weight) for weight in weights.values())  # the table of ranks
        ranks = best_ranks({key: each.values for key, each in whitened.items()}, prices, budget)
    elif allocation == "projections":
        together = {key: each.values.sum(0, keepdim=True) for key, each in whitened.items()}
        rows = {key: prices[key] * len(weights[key]) for key in prices}
        ranks = {key: rank.expand(len(weights[key])) for key, rank in best_ranks(together, rows, budget).items()}
    else:
        ranks = {
            key: torch.full((len(weight),), VALUE_BYTES * task.budget(weight) // (prices[key] * len(weight)))
            for key, weight in weights.items()
        }

    def forms(layer: Layer) -> dict[str, Form]:
        return {name: whitened[layer.name, name].factors(ranks[layer.name, name]) for name in layer.weights}

    return task.with_forms(forms)
