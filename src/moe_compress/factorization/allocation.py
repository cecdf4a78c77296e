"""Forms and ranks of all projections under one budget of bytes, from the error that each has in each form at each rank.

The squared singular values fall, hence each curve of errors is convex, and taking the step of the largest drop per byte
again and again is optimal but for the last step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from moe_compress.errors import UserError
from moe_compress.factorization.budget import Form, Shape, largest_rank, projection_bytes, rank_within, uniform_ranks

_BISECTIONS = 60  # of the price of a byte


@dataclass(frozen=True)
class Choice:
    """What a projection becomes: its form, and the rank of its deltas."""

    form: Form
    delta_rank: int


Curves = Mapping[str, Mapping[Form, Sequence[float]]]  # projection to the error of each form at delta rank 0, 1, ...


@dataclass(frozen=True)
class Budget:
    """Bytes that may be spent, and how ranks are rounded.

    Attributes:
        shapes: (E, out, in) of each projection.
        total: bytes that all cores, bases and factors may take together.
        bytes_per_value: of what is stored.
        original_bytes_per_value: of the original experts.
        rank_multiple: ranks above it are multiples of it.
        parameterization: "delta" or "wrapper" (even ranks only).
    """

    shapes: Mapping[str, Shape]
    total: int
    bytes_per_value: int
    original_bytes_per_value: int
    rank_multiple: int = 8
    parameterization: str = "delta"

    @property
    def unit(self) -> int:
        """The least rank."""
        return 2 if self.parameterization == "wrapper" else 1

    @property
    def multiple(self) -> int:
        return math.lcm(max(1, self.rank_multiple), self.unit)

    def cost(self, name: str, choice: Choice) -> int:
        """Bytes of a projection."""
        return projection_bytes(self.shapes[name], choice.delta_rank, choice.form, self.bytes_per_value)

    def most(self, name: str, form: Form) -> int:
        """The largest rank that makes sense."""
        return largest_rank(self.shapes[name], form=form, parameterization=self.parameterization)


def greedy_choices(curves: Curves, budget: Budget) -> dict[str, Choice]:
    """The forms and ranks that make the sum of all errors small, never above the budget in total.

    Relative errors make every projection count the same, whatever its size; errors of the predictions add up as they
    are. At a given price of a byte each projection has a best form and rank by itself; the price that spends the budget
    (Everett 1963, generalized Lagrange multipliers) settles the forms, and the steps of the largest drop per byte then
    the ranks. Ranks are multiples of `rank_multiple` where the budget reaches that far for all projections, as in
    `uniform_ranks`.

    Args:
        curves: see `error_curve`; the forms of a projection are those that it may take.
        budget: what may be spent.

    Raises:
        UserError: not even deltas of the least rank fit.
    """
    forms = _forms_by_price(curves, budget)
    ranks = greedy_ranks({name: curves[name][form] for name, form in forms.items()}, forms, budget)
    return {name: Choice(forms[name], rank) for name, rank in ranks.items()}


def _forms_by_price(curves: Curves, budget: Budget) -> dict[str, Form]:
    """The form of each projection at the lowest price of a byte at which the best choices stay within the budget."""
    options: dict[str, list[tuple[Form, Tensor, Tensor]]] = {}  # form, its costs and its errors at each rank
    for name, by_form in curves.items():
        options[name] = []
        for form, curve in by_form.items():
            ranks = range(budget.unit, min(budget.most(name, form), len(curve) - 1) + 1)
            if ranks:
                costs = [budget.cost(name, Choice(form, rank)) for rank in ranks]
                errors = [float(curve[rank]) for rank in ranks]
                options[name].append(
                    (form, torch.tensor(costs, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64))
                )
        if not options[name]:
            raise UserError(f"{name}: experts of {budget.shapes[name]} cannot be made smaller; leave them as they are")

    def best(price: float) -> dict[str, tuple[Form, float]]:
        """The form of each projection, and what it costs at the rank that is best for it."""
        found = {}
        for name, tried in options.items():
            values = [errors + price * costs for _, costs, errors in tried]
            least = min(range(len(tried)), key=lambda number: float(values[number].min()))
            form, costs, _ = tried[least]
            found[name] = form, float(costs[int(values[least].argmin())])
        return found

    def spent(found: Mapping[str, tuple[Form, float]]) -> float:
        return sum(cost for _, cost in found.values())

    low = min(float(errors[-1]) for tried in options.values() for _, _, errors in tried) * 1e-15 + 1e-300
    high = max(float(errors[0]) for tried in options.values() for _, _, errors in tried) + 1e-300
    for _ in range(_BISECTIONS):  # of the logarithm: `high` stays within the budget where anything does
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = (low, middle) if spent(best(middle)) <= budget.total else (middle, high)
    found, dearer = best(high), best(low)
    for name in found:  # several may change at one price, and the budget reach for some of them
        changed = found | {name: dearer[name]}
        found = changed if spent(changed) <= budget.total else found
    return {name: form for name, (form, _) in found.items()}


def uniform_choices(curves: Curves, budget: Budget) -> dict[str, Choice]:
    """The form of the least error for each projection at the same share of its bytes, and the ranks of `uniform_ranks`.

    Args:
        curves: see `error_curve`; the forms of a projection are those that it may take.
        budget: what may be spent.

    Raises:
        UserError: the share cannot be reached, with the nearest one that can.
    """
    original = {name: math.prod(shape) * budget.original_bytes_per_value for name, shape in budget.shapes.items()}
    share = Fraction(budget.total, sum(original.values()))
    forms: dict[str, Form] = {}
    for name, by_form in curves.items():
        errors = {}
        for form, curve in by_form.items():
            rank = rank_within(
                budget.shapes[name],
                math.floor(share * original[name]),
                form=form,
                bytes_per_value=budget.bytes_per_value,
                parameterization=budget.parameterization,
            )
            if rank:
                errors[form] = float(curve[rank])
        forms[name] = min(errors, key=errors.__getitem__) if errors else min(by_form)
    ranks = uniform_ranks(
        budget.shapes,
        target_bytes=budget.total,
        forms=forms,
        bytes_per_value=budget.bytes_per_value,
        original_bytes_per_value=budget.original_bytes_per_value,
        rank_multiple=budget.rank_multiple,
        parameterization=budget.parameterization,
    )
    return {name: Choice(forms[name], rank) for name, rank in ranks.items()}


def greedy_ranks(curves: Mapping[str, Sequence[float]], forms: Mapping[str, Form], budget: Budget) -> dict[str, int]:
    """The ranks of projections whose form is settled, see `greedy_choices`.

    Each curve is convex, so that the step of the largest drop per byte is optimal but for the last.

    Raises:
        UserError: not even deltas of the least rank fit.
    """
    unit, multiple = budget.unit, budget.multiple
    most = {name: min(budget.most(name, form), len(curves[name]) - 1) for name, form in forms.items()}

    def spent(ranks: Mapping[str, int]) -> int:
        return sum(budget.cost(name, Choice(forms[name], rank)) for name, rank in ranks.items())

    def price(name: str, step: int) -> int:
        return budget.cost(name, Choice(forms[name], step)) - budget.cost(name, Choice(forms[name], 0))

    ranks = {name: multiple if most[name] >= multiple else unit for name in forms}
    if spent(ranks) > budget.total:
        ranks = dict.fromkeys(forms, unit)
    left = budget.total - spent(ranks)
    if left < 0:
        raise UserError(
            f"{budget.total:,} bytes are less than deltas of the least rank and what the experts share need "
            f"({budget.total - left:,}); raise compression.target_ratio or compression.target_bytes"
        )
    queue: list[tuple[float, int, str, int]] = []
    order = {name: position for position, name in enumerate(forms)}

    def offer(name: str) -> None:
        step = multiple if ranks[name] >= multiple else unit
        if ranks[name] + step <= most[name]:
            drop = float(curves[name][ranks[name]] - curves[name][ranks[name] + step])
            heapq.heappush(queue, (-drop / price(name, step), order[name], name, step))

    for name in forms:
        offer(name)
    while queue:
        _, _, name, step = heapq.heappop(queue)
        if price(name, step) <= left:  # if it does not fit now it never will: steps do not become smaller
            left -= price(name, step)
            ranks[name] += step
            offer(name)
    return ranks
