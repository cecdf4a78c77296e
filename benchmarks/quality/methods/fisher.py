"""A candidate for our own recipe: low-rank experts in the norm of the Fisher information, a rank for each expert.

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
from benchmarks.quality.forms import Form, Ragged
from benchmarks.quality.methods.base import Task, method

_SHRINKAGE = 0.1  # of each expert's matrices towards the mean of the layer
_DAMPING = 1e-2  # of the mean diagonal


class Whitened:
    """One projection of a layer in the norm of its Fisher information.

    Attributes:
        values: [E, R] squared singular values in nats, largest first.
        price: values that one rank of one expert takes.
        fixed: values that are stored whatever the ranks.
    """

    def __init__(self, weight: Tensor, inputs: Tensor, outputs: Tensor, basis_size: int | None = None) -> None:
        """`weight` [E, out, in], `inputs` [E, in, in] and `outputs` [E, out, out] with their product in nats.

        With `basis_size` s the rows of all experts lie in one space of s dimensions: the leading ones of all whitened
        experts together, in the norm of the mean input matrix.
        """
        _, rows, columns = weight.shape
        self.root_in, self.root_out = _root(inputs), _root(outputs)
        weighed = self.root_out.mT @ weight.double()
        self.basis: Tensor | None = None
        if basis_size is None:
            self.price, self.fixed = rows + columns, 0
            self.left, self.singular, self.right = torch.linalg.svd(weighed @ self.root_in, full_matrices=False)
        else:
            self.price, self.fixed = rows + basis_size, basis_size * columns
            mean_root = _root(inputs.mean(0, keepdim=True))[0]
            stacked = (weighed @ mean_root).flatten(0, 1)
            leading = torch.linalg.eigh(stacked.mT @ stacked).eigenvectors[:, -basis_size:]
            self.basis = torch.linalg.solve_triangular(mean_root, leading.mT, upper=False, left=False)
            # [E, in, s] orthonormal, basis root_in = triangle^T span^T: the space as each expert's norm sees it.
            self.span, self.triangle = torch.linalg.qr((self.basis @ self.root_in).mT)
            inside = weighed @ self.root_in @ self.span
            self.left, self.singular, self.right = torch.linalg.svd(inside, full_matrices=False)
        self.values = self.singular.square() / 2
        self.lost = float((weighed @ self.root_in).square().sum() / 2 - self.values.sum())

    def factors(self, ranks: Tensor) -> Ragged:
        """The best factors of rank `ranks` [E]."""
        scale = self.singular.sqrt()
        out = torch.linalg.solve_triangular(self.root_out.mT, self.left * scale[:, None], upper=True)
        into = self.right * scale[:, :, None]
        if self.basis is None:
            into = torch.linalg.solve_triangular(self.root_in, into, upper=False, left=False)
        else:
            into = torch.linalg.solve_triangular(self.triangle.mT, into, upper=False, left=False)
        kept = torch.arange(self.values.shape[1]) < ranks[:, None]
        basis = None if self.basis is None else self.basis.float()
        return Ragged(out.mT[kept].float(), into[kept].float(), ranks, basis)


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


Key = tuple[str, str]  # name of the layer's experts, and of the projection


def whitened_layers(task: Task, basis_size: int | None) -> dict[Key, Whitened]:
    """All projections, those that read the hidden states with a basis; computed once for all ratios."""
    for size in {None, basis_size}:
        if ("fisher", size) in task.shared:
            continue
        found = task.shared["fisher", size] = {}
        for layer in task.layers:
            for name, factors in layer.kept("fisher", lambda layer=layer: fisher_factors(layer)).items():
                if size is None or name == layer.up_name:
                    found[layer.name, name] = Whitened(layer.weights[name], *factors, size)
    return task.shared["fisher", None] | task.shared["fisher", basis_size]


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


def allocate(task: Task, whitened: dict[Key, Whitened]) -> tuple[dict[Key, Tensor], float]:
    """The ranks [E] of each projection within the budget, and the nats (per token) that they leave."""
    budget = sum(task.budget(layer.weights[name]) for layer in task.layers for name in layer.weights)
    budget -= sum(each.fixed + len(each.values) for each in whitened.values())  # bases and tables of ranks
    prices = {key: each.price for key, each in whitened.items()}
    ranks = best_ranks({key: each.values for key, each in whitened.items()}, prices, budget)
    left = 0.0
    for key, each in whitened.items():
        cut = torch.arange(each.values.shape[1]) >= ranks[key][:, None]
        left += each.lost + float(each.values[cut].sum())
    return ranks, left


@method("fisher-experts", version=1)
@method("fisher-experts-basis", bases=(1 / 3, 1 / 2), version=1)
def fisher(task: Task, bases: tuple[float, ...] = ()) -> Any:
    """Low-rank experts without a core, with ranks for each expert: what the product does but for that.

    Args:
        bases: sizes of a shared input basis to try, as shares of the hidden size; the one that leaves the least wins.
    """
    hidden = task.layers[0].inputs.shape[1]
    tried = []
    for size in (None, *(round(share * hidden) for share in bases)):
        whitened = whitened_layers(task, size)
        ranks, left = allocate(task, whitened)
        tried.append((left, whitened, ranks))
    _, whitened, ranks = min(tried, key=lambda each: each[0])

    def forms(layer: Layer) -> dict[str, Form]:
        return {name: whitened[layer.name, name].factors(ranks[layer.name, name]) for name in layer.weights}

    return task.with_forms(forms)
