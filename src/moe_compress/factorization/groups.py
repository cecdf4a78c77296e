"""Which experts share a core: the experts of a projection in G groups, each around a mean of its own.

Clustering by the squared distance to the mean of the group, for which inner products between experts are all that is
needed: Ward's method (1963) merges single experts down to G groups, and Hartigan's exchange (1975, chapter 4) then
moves single experts as long as that lowers the sum. Lloyd's k-means would not do: experts are nearly orthogonal, so
that each is nearest to the mean that it is itself a part of, and none would ever move.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from moe_compress.factorization.grams import Metric, chunks

_SWEEPS = 100  # of the exchange; it ends long before


@torch.no_grad()
def group_experts(weights: Tensor, cores: int, gram: Tensor | None = None) -> Tensor:
    """Divide the experts of a projection into groups that are to share a core each; deterministic.

    Args:
        weights: [E, out, in] of any floating type.
        cores: number of groups, from 1 to E; none is left empty.
        gram: [E, in, in]; the experts are compared in the norm of its mean, without it in the Frobenius norm.

    Returns:
        [E] int64 on the CPU, the group of each expert; groups are numbered by their first expert.
    """
    products = _inner_products(weights, gram).cpu().numpy()
    squares = np.diag(products)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0))
    np.fill_diagonal(distances, 0.0)
    experts = len(distances)
    if cores >= experts:
        return torch.arange(experts)
    labels = cut_tree(linkage(squareform(distances, checks=False), "ward"), n_clusters=cores)[:, 0]
    labels = _exchange(products, labels.astype(np.int64), cores)
    order = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    return torch.tensor([order[label] for label in labels.tolist()])


def _inner_products(weights: Tensor, gram: Tensor | None) -> Tensor:
    """The inner products [E, E] of the experts in fp64, in the norm of the mean of the Gram matrices."""
    experts, rows, columns = weights.shape
    metric = Metric(None if gram is None else gram.mean(0, keepdim=True).to(weights.device))

    def features(part: slice) -> Tensor:
        return metric.whiten(weights[part].float(), slice(None)).flatten(1)

    products = torch.zeros(experts, experts, dtype=torch.float64, device=weights.device)
    parts = list(chunks(experts, 4 * rows * columns))
    for number, part in enumerate(parts):
        own = features(part)
        for other in parts[: number + 1]:
            block = (own @ (own if other == part else features(other)).mT).double()
            products[part, other] = block
            products[other, part] = block.mT
    return products


def _exchange(products: NDArray[np.float64], labels: NDArray[np.int64], cores: int) -> NDArray[np.int64]:
    """Move experts between groups while the squared norms of the groups' sums, each over its size, gain by it."""
    members = np.eye(cores)[labels].T  # [G, E]
    for _ in range(_SWEEPS):
        moved = False
        for expert in range(len(labels)):
            own = labels[expert]
            sizes = members.sum(1)
            if sizes[own] == 1:
                continue
            sums = members @ products  # [G, E]: of each group with each expert
            energy = (sums * members).sum(1)
            square = products[expert, expert]
            leaving = (energy[own] - 2 * sums[own, expert] + square) / (sizes[own] - 1) - energy[own] / sizes[own]
            joining = (energy + 2 * sums[:, expert] + square) / (sizes + 1) - energy / sizes
            joining[own] = -leaving
            best = int(joining.argmax())
            if joining[best] + leaving > 1e-9 * square:
                members[own, expert], members[best, expert], labels[expert] = 0.0, 1.0, best
                moved = True
        if not moved:
            break
    return labels
