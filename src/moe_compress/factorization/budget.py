"""Bytes of factorized projections, and ranks that fit a byte budget.

A projection of E experts costs E * out * in values as it is, and cores * out * in + E * R * (out + in) as core plus
delta of rank R; a wrapper of rank R / 2 per side costs the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from moe_compress.errors import UserError

Shape = tuple[int, int, int]  # E, out, in


def projection_bytes(experts: int, rows: int, columns: int, delta_rank: int, cores: int, bytes_per_value: int) -> int:
    """Bytes of core and deltas (or wrappers) of one projection of shape [experts, rows, columns]."""
    return (cores * rows * columns + experts * delta_rank * (rows + columns)) * bytes_per_value


def check_rank(name: str, shape: Shape, delta_rank: int, *, cores: int, parameterization: str) -> None:
    """Refuse a rank that makes no sense for a projection.

    Raises:
        UserError: the rank is not positive, odd for a wrapper, not below the dimensions of the weights, or so large
            that the factors cost as much as the original.
    """
    experts, rows, columns = shape
    unit = _unit(parameterization)
    if delta_rank < unit or delta_rank % unit:
        raise UserError(
            f"{name}: delta rank {delta_rank} must be a positive multiple of {unit}; change compression.rank"
        )
    most = largest_rank(shape, cores=cores, parameterization=parameterization)
    if most < unit:
        raise UserError(
            f"{name}: {experts} experts of {rows} x {columns} cannot be made smaller with {cores} core(s); "
            "leave this layer as it is"
        )
    hint = f"choose compression.rank of at most {most // 2}" if most >= 2 else "set compression.target_ratio instead"
    if delta_rank >= min(rows, columns):
        raise UserError(
            f"{name}: delta rank {delta_rank} is above the dimensions of {rows} x {columns} weights; {hint}"
        )
    if delta_rank > most:
        raise UserError(
            f"{name}: delta rank {delta_rank} costs as much as the original: {experts} x {rows} x {columns}; {hint}"
        )


def largest_rank(shape: Shape, *, cores: int, parameterization: str) -> int:
    """The largest delta rank that is cheaper than the original; 0 if none is.

    It is below both dimensions: R (out + in) < out * in leaves R < min(out, in).
    """
    experts, rows, columns = shape
    unit = _unit(parameterization)
    rank = ((experts - cores) * rows * columns - 1) // (experts * (rows + columns))
    return max(0, rank // unit * unit)


def rank_within(
    shape: Shape,
    budget: int,
    *,
    cores: int,
    bytes_per_value: int,
    rank_multiple: int = 1,
    parameterization: str = "delta",
) -> int:
    """The largest delta rank of one projection within a budget of bytes, rounded as in `uniform_ranks`; 0 if none."""
    unit = _unit(parameterization)
    multiple = math.lcm(max(1, rank_multiple), unit)
    fixed = projection_bytes(*shape, 0, cores, bytes_per_value)
    rank = (budget - fixed) // (projection_bytes(*shape, 1, cores, bytes_per_value) - fixed)
    rank = max(0, min(rank, largest_rank(shape, cores=cores, parameterization=parameterization)))
    return rank // multiple * multiple if rank >= multiple else rank // unit * unit


def break_even(projections: Sequence[tuple[int, int, int, int]], top_k: int, *, speedup: float) -> float:
    """By what the delta ranks of a layer may be multiplied until it is no faster than the original experts.

    The count is of multiply-adds per token: each core once, each of k experts' deltas; as many parameters are read for
    one token. What a multiply-add takes, compared with the original's, is known from a measured speed.

    Args:
        projections: (out, in, delta rank, cores) of each projection of the layer.
        top_k: experts per token k.
        speedup: how many times faster than the original the layer is at these ranks.

    Returns:
        A factor, 0 where the cores alone take longer than the original.
    """
    core = sum(min(cores, top_k) * rows * columns for rows, columns, _, cores in projections)
    delta = sum(top_k * rank * (rows + columns) for rows, columns, rank, _ in projections)
    # The time is in proportion to core + delta, and the original takes `speedup` times it.
    return max(0.0, ((core + delta) * speedup - core) / delta)


def uniform_ranks(
    shapes: Mapping[str, Shape],
    *,
    target_bytes: int | None = None,
    ratio: float | None = None,
    cores: int,
    bytes_per_value: int,
    rank_multiple: int = 8,
    parameterization: str = "delta",
    original_bytes_per_value: int | None = None,
) -> dict[str, int]:
    """Ranks with which every projection keeps the same share of its bytes, never above the target in total.

    A rank above `rank_multiple` is rounded down to a multiple of it. What rounding leaves goes, one multiple at a time,
    to the projection that is furthest below its share, until no further step fits any of them.

    Args:
        shapes: (E, out, in) of each projection.
        target_bytes: bytes that all factors may take together; either this or `ratio`.
        ratio: the same, as a share of the bytes of the original experts.
        cores: cores of each projection.
        bytes_per_value: of the stored factors.
        rank_multiple: see above; made even for wrappers.
        parameterization: "delta" or "wrapper" (even ranks only).
        original_bytes_per_value: of the original experts, if stored otherwise than the factors.

    Returns:
        The delta rank of each projection, in the order of `shapes`.

    Raises:
        UserError: the target cannot be met, with the nearest ratio that can.
        ValueError: neither or both targets are given, or no projections.
    """
    if (target_bytes is None) == (ratio is None) or not shapes:
        raise ValueError("uniform_ranks needs projections and either target_bytes or ratio")
    unit = _unit(parameterization)
    multiple = math.lcm(max(1, rank_multiple), unit)
    for name, shape in shapes.items():
        check_rank(name, shape, unit, cores=cores, parameterization=parameterization)
    most = {n: largest_rank(shape, cores=cores, parameterization=parameterization) for n, shape in shapes.items()}
    original = {n: math.prod(shape) * (original_bytes_per_value or bytes_per_value) for n, shape in shapes.items()}
    total = sum(original.values())
    share = Fraction(target_bytes, total) if target_bytes is not None else Fraction(str(ratio))
    target = math.floor(share * total)

    def cost(name: str, rank: int) -> int:
        return projection_bytes(*shapes[name], rank, cores, bytes_per_value)

    least = max(Fraction(cost(name, unit), original[name]) for name in shapes)
    greatest = Fraction(sum(cost(name, most[name]) for name in shapes), total)
    if share < least or share >= 1:
        nearest = math.ceil(least * 10**4)
        if share >= 1:
            nearest = max(nearest, math.floor(greatest * 10**4))
        reason = "is less than cores and rank-1 deltas need" if share < least else "would compress nothing"
        raise UserError(
            f"keeping {float(share):.4f} of the expert bytes ({target:,} of {total:,}) {reason}; the nearest feasible "
            f"compression.target_ratio is {nearest / 10**4:.4f} ({math.ceil(Fraction(nearest, 10**4) * total):,} bytes)"
        )

    ranks = {}
    for name in shapes:
        ranks[name] = rank_within(
            shapes[name],
            math.floor(share * original[name]),
            cores=cores,
            bytes_per_value=bytes_per_value,
            rank_multiple=rank_multiple,
            parameterization=parameterization,
        )
    left = target - sum(cost(name, rank) for name, rank in ranks.items())
    while True:
        steps = {name: multiple if rank >= multiple else unit for name, rank in ranks.items()}
        prices = {name: cost(name, steps[name]) - cost(name, 0) for name in ranks}
        open_to = [name for name in ranks if prices[name] <= left and ranks[name] + steps[name] <= most[name]]
        if not open_to:
            return ranks
        name = min(open_to, key=lambda name: Fraction(cost(name, ranks[name]), original[name]))
        ranks[name] += steps[name]
        left -= prices[name]


def _unit(parameterization: str) -> int:
    return 2 if parameterization == "wrapper" else 1
