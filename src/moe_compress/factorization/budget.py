"""Bytes of factorized projections, and ranks that fit a byte budget.

A projection of E experts costs E * out * in values as it is, and cores * out * in + E * R * (out + in) as core plus
delta of rank R; a wrapper of rank R / 2 per side costs the same. With a shared basis of s directions of the input it is
cores * out * in + s * in + E * R * (out + s).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from moe_compress.errors import UserError

Shape = tuple[int, int, int]  # E, out, in


@dataclass(frozen=True, order=True)
class Form:
    """What is stored of a projection, but for the rank.

    Attributes:
        cores: G, how many cores the experts share between them; 0 for plain low rank.
        basis: s, how many directions of the input all deltas read; 0 for all, without a basis.
    """

    cores: int = 1
    basis: int = 0

    def cost(self, shape: Shape, delta_rank: int) -> int:
        """Values that are stored of a projection of shape (E, out, in)."""
        experts, rows, columns = shape
        fixed = self.cores * rows * columns + self.basis * columns
        return fixed + experts * delta_rank * (rows + (self.basis or columns))


def projection_bytes(shape: Shape, delta_rank: int, form: Form, bytes_per_value: int) -> int:
    """Bytes of what is stored of one projection."""
    return form.cost(shape, delta_rank) * bytes_per_value


def check_rank(name: str, shape: Shape, delta_rank: int, *, form: Form, parameterization: str) -> None:
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
    most = largest_rank(shape, form=form, parameterization=parameterization)
    if most < unit:
        raise UserError(
            f"{name}: {experts} experts of {rows} x {columns} cannot be made smaller with {form.cores} core(s)"
            f"{f' and a basis of {form.basis}' if form.basis else ''}; leave this layer as it is"
        )
    hint = "set compression.target_ratio"
    if most >= 2:
        hint = f"choose compression.rank of at most {most // 2}, or {hint}"
    if delta_rank >= min(rows, columns):
        raise UserError(
            f"{name}: delta rank {delta_rank} is above the dimensions of {rows} x {columns} weights; {hint}"
        )
    if delta_rank > (form.basis or delta_rank):
        raise UserError(f"{name}: delta rank {delta_rank} is above its shared input basis of {form.basis}; {hint}")
    if delta_rank > most:
        raise UserError(
            f"{name}: delta rank {delta_rank} costs as much as the original: {experts} x {rows} x {columns}; {hint}"
        )


def largest_rank(shape: Shape, *, form: Form, parameterization: str) -> int:
    """The largest delta rank that is cheaper than the original, and not above a basis; 0 if none is.

    It is below both dimensions: R (out + in) < out * in leaves R < min(out, in).
    """
    experts, rows, columns = shape
    unit = _unit(parameterization)
    left = math.prod(shape) - 1 - form.cost(shape, 0)
    rank = min(left // (experts * (rows + (form.basis or columns))), form.basis or columns)
    return max(0, min(rank, rows - 1) // unit * unit)


def rank_within(
    shape: Shape,
    budget: int,
    *,
    form: Form,
    bytes_per_value: int,
    rank_multiple: int = 1,
    parameterization: str = "delta",
) -> int:
    """The largest delta rank of one projection within a budget of bytes, rounded as in `uniform_ranks`; 0 if none."""
    unit = _unit(parameterization)
    multiple = math.lcm(max(1, rank_multiple), unit)
    fixed = projection_bytes(shape, 0, form, bytes_per_value)
    rank = (budget - fixed) // (projection_bytes(shape, 1, form, bytes_per_value) - fixed)
    rank = max(0, min(rank, largest_rank(shape, form=form, parameterization=parameterization)))
    return rank // multiple * multiple if rank >= multiple else rank // unit * unit


def active_values(shape: Shape, form: Form, delta_rank: int, top_k: int) -> tuple[int, int]:
    """Values that one token is multiplied with: of what the experts share, at most, and of the deltas of k experts."""
    _, rows, columns = shape
    shared = min(form.cores, top_k) * rows * columns + form.basis * columns
    return shared, top_k * delta_rank * (rows + (form.basis or columns))


def break_even(projections: Sequence[tuple[Shape, Form, int]], top_k: int, *, speedup: float) -> float:
    """By what the delta ranks of a layer may be multiplied until it is no faster than the original experts.

    The count is of multiply-adds per token: cores and basis once, each of k experts' deltas; as many parameters are
    read for one token. What a multiply-add takes, compared with the original's, is known from a measured speed.

    Args:
        projections: shape, form and delta rank of each projection of the layer.
        top_k: experts per token k.
        speedup: how many times faster than the original the layer is at these ranks.

    Returns:
        A factor, 0 where what is shared alone takes longer than the original.
    """
    parts = [active_values(shape, form, rank, top_k) for shape, form, rank in projections]
    shared, delta = sum(part[0] for part in parts), sum(part[1] for part in parts)
    # The time is in proportion to shared + delta, and the original takes `speedup` times it.
    return max(0.0, ((shared + delta) * speedup - shared) / delta)


def uniform_ranks(
    shapes: Mapping[str, Shape],
    *,
    target_bytes: int | None = None,
    ratio: float | None = None,
    forms: Form | Mapping[str, Form],
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
        forms: of each projection, or of all.
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
    forms = dict.fromkeys(shapes, forms) if isinstance(forms, Form) else forms
    for name, shape in shapes.items():
        check_rank(name, shape, unit, form=forms[name], parameterization=parameterization)
    most = {n: largest_rank(shapes[n], form=forms[n], parameterization=parameterization) for n in shapes}
    original = {n: math.prod(shape) * (original_bytes_per_value or bytes_per_value) for n, shape in shapes.items()}
    total = sum(original.values())
    share = Fraction(target_bytes, total) if target_bytes is not None else Fraction(str(ratio))
    target = math.floor(share * total)

    def cost(name: str, rank: int) -> int:
        return projection_bytes(shapes[name], rank, forms[name], bytes_per_value)

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
            form=forms[name],
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
