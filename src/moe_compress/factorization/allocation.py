"""Ranks per projection under one budget of bytes, from the error that each projection has at each rank.

The error of a truncated SVD at every rank follows from one set of singular values, so that a whole curve costs less
than one fit. The squared singular values fall, hence each curve is convex, and taking the step of the largest drop per
byte again and again is optimal but for the last step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_compress.errors import UserError
from moe_compress.factorization.budget import Shape, largest_rank, projection_bytes
from moe_compress.factorization.closed_form import CoreSolver, squared_norm
from moe_compress.factorization.grams import Metric, chunks
from moe_compress.factorization.groups import group_experts


@torch.no_grad()
def error_curve(weights: Tensor, *, cores: int, gram: Tensor | None = None, out_gram: Tensor | None = None) -> Tensor:
    """The squared error of core plus delta at every rank of the delta: relative, but of a known unit with `out_gram`.

    The core is the (weighted) mean of the experts, as in the first iteration of the closed form; further iterations
    and the wrapper parameterization lie close by.

    Args:
        weights: [E, out, in], any floating type.
        cores: 1 for a shared core, 0 for truncated SVD of each expert alone, more for groups of experts.
        gram: [E, in, in], already shrunk; with it the error is that of the outputs, see `Metric`.
        out_gram: [E, out, out], likewise; then the error is that of the predictions, twice the nats over the text, the
            same unit for every projection and layer.

    Returns:
        [min(out, in) + 1] in fp64 on the CPU: all experts together with deltas of rank 0, 1, ...; ends at 0.
    """
    experts, rows, columns = weights.shape
    metric = Metric(*(None if each is None else each.detach().to(weights.device) for each in (gram, out_gram)))
    squares = torch.zeros(min(rows, columns), dtype=torch.float64)
    if cores > 1:
        groups = group_experts(weights, cores, metric.gram).to(weights.device)
        for group in range(cores):
            squares += _residual_squares(weights[groups == group], True, metric.select(groups == group))
    else:
        squares += _residual_squares(weights, bool(cores), metric)
    tails = torch.cat([torch.zeros(1, dtype=torch.float64), squares.cumsum(0)])  # the smallest ones come first
    if out_gram is not None:
        return tails.flip(0) * metric.unit
    return tails.flip(0) / squared_norm(weights, metric, list(chunks(experts, 4 * rows * columns)))


def _residual_squares(weights: Tensor, with_core: bool, metric: Metric) -> Tensor:
    """The squared singular values of what the core of some experts leaves, summed over them; ascending, fp64, CPU."""
    experts, rows, columns = weights.shape
    parts = list(chunks(experts, 4 * rows * columns))
    core = None
    if with_core:
        solver = CoreSolver(weights, metric, parts)
        core = solver.solve(solver.moment).float()
    squares = torch.zeros(min(rows, columns), dtype=torch.float64)
    for part in parts:
        rest = weights[part].float() if core is None else weights[part].float() - core
        whitened = metric.whiten(rest, part)
        small = whitened @ whitened.mT if rows <= columns else whitened.mT @ whitened
        squares += torch.linalg.eigvalsh(small).clamp_min(0).sum(0, dtype=torch.float64).cpu()
    return squares


def greedy_ranks(
    curves: Mapping[str, Sequence[float]],
    shapes: Mapping[str, Shape],
    *,
    budget: int,
    cores: int,
    bytes_per_value: int,
    rank_multiple: int = 8,
    parameterization: str = "delta",
) -> dict[str, int]:
    """The delta ranks that make the sum of all errors small, never above the budget in total.

    Relative errors make every projection count the same, whatever its size; errors of the predictions add up as they
    are. Ranks are multiples of `rank_multiple` where the budget reaches that far for all projections, as in
    `uniform_ranks`.

    Args:
        curves: for each projection, its error at delta rank 0, 1, ...; see `error_curve`.
        shapes: (E, out, in) of each projection.
        budget: bytes that all cores and factors may take together.
        cores, bytes_per_value, rank_multiple, parameterization: as for `uniform_ranks`.

    Returns:
        The delta rank of each projection, in the order of `shapes`.

    Raises:
        UserError: not even deltas of the least rank fit.
    """
    unit = 2 if parameterization == "wrapper" else 1
    multiple = math.lcm(max(1, rank_multiple), unit)
    most = {n: largest_rank(shape, cores=cores, parameterization=parameterization) for n, shape in shapes.items()}

    def cost(name: str, rank: int, cores: int = cores) -> int:
        return projection_bytes(*shapes[name], rank, cores, bytes_per_value)

    ranks = {name: multiple if most[name] >= multiple else unit for name in shapes}
    if sum(cost(name, rank) for name, rank in ranks.items()) > budget:
        ranks = dict.fromkeys(shapes, unit)
    left = budget - sum(cost(name, rank) for name, rank in ranks.items())
    if left < 0:
        raise UserError(
            f"{budget:,} bytes are less than cores and deltas of the least rank need ({budget - left:,}); "
            "raise compression.target_ratio or compression.target_bytes"
        )
    queue: list[tuple[float, int, str, int]] = []
    order = {name: position for position, name in enumerate(shapes)}

    def offer(name: str) -> None:
        step = multiple if ranks[name] >= multiple else unit
        if ranks[name] + step <= most[name]:
            drop = float(curves[name][ranks[name]] - curves[name][ranks[name] + step])
            heapq.heappush(queue, (-drop / cost(name, step, 0), order[name], name, step))

    for name in shapes:
        offer(name)
    while queue:
        _, _, name, step = heapq.heappop(queue)
        if cost(name, step, 0) <= left:  # if it does not fit now it never will: steps do not become smaller
            left -= cost(name, step, 0)
            ranks[name] += step
            offer(name)
    return ranks
