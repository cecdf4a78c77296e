"""The error of a projection at each rank, all from one set of singular values: less than one fit costs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_compress.factorization.basis import SharedBasis
from moe_compress.factorization.budget import Form
from moe_compress.factorization.closed_form import CoreSolver, squared_norm
from moe_compress.factorization.grams import Metric, chunks, residual
from moe_compress.factorization.groups import group_experts


@torch.no_grad()
def error_curves(
    weights: Tensor, forms: Iterable[Form], gram: Tensor | None = None, out_gram: Tensor | None = None
) -> dict[Form, Tensor]:
    """The squared error of core plus delta at every rank of the delta: relative, but of a known unit with `out_gram`.

    The core is the (weighted) mean of the experts, as in the first iteration of the closed form; further iterations
    and the wrapper parameterization lie close by.

    Args:
        weights: [E, out, in], any floating type.
        forms: cores and shared basis of each curve, as in `FitSpec`.
        gram: [E, in, in], already shrunk; with it the error is that of the outputs, see `Metric`.
        out_gram: [E, out, out], likewise; then the error is that of the predictions, twice the nats over the text, the
            same unit for every projection and layer.

    Returns:
        By form, [min(out, in) + 1] in fp64 on the CPU, [min(out, s) + 1] with a basis: all experts together with deltas
        of rank 0, 1, ...; ends at 0, or at what the basis does not reach.
    """
    experts, rows, columns = weights.shape
    metric = Metric(*(None if each is None else each.detach().to(weights.device) for each in (gram, out_gram)))
    unit = metric.unit
    if out_gram is None:
        unit = 1 / squared_norm(weights, metric, list(chunks(experts, 4 * rows * columns)))
    forms = list(forms)
    core = _core(weights, metric) if any(form.cores == 1 for form in forms) else None
    return {form: unit * _tails(weights, form, core if form.cores == 1 else None, metric) for form in forms}


def error_curve(weights: Tensor, form: Form, gram: Tensor | None = None, out_gram: Tensor | None = None) -> Tensor:
    """That of one form, see `error_curves`."""
    return error_curves(weights, [form], gram, out_gram)[form]


def _tails(weights: Tensor, form: Form, core: Tensor | None, metric: Metric) -> Tensor:
    """The squared error at every rank, in the norm of the metric; `core` [out, in] is that of all experts."""
    _, rows, columns = weights.shape
    squares = torch.zeros(min(rows, form.basis or columns), dtype=torch.float64)
    outside = 0.0
    if form.cores > 1:
        groups = group_experts(weights, form.cores, metric.gram).to(weights.device)
        for group in range(form.cores):
            own, norm = weights[groups == group], metric.select(groups == group)
            squares += _residual_squares(own, _core(own, norm), 0, norm)[0]
    else:
        squares, outside = _residual_squares(weights, core, form.basis, metric)
    tails = torch.cat([torch.zeros(1, dtype=torch.float64), squares.cumsum(0)]) + outside  # smallest ones first
    return tails.flip(0)


def _core(weights: Tensor, metric: Metric) -> Tensor:
    """The best core [out, in] of some experts without deltas; fp32."""
    solver = CoreSolver(weights, metric, list(chunks(weights.shape[0], 4 * weights[0].numel())))
    return solver.solve(solver.moment).float()


def _residual_squares(weights: Tensor, core: Tensor | None, basis: int, metric: Metric) -> tuple[Tensor, float]:
    """The squared singular values of what the core of some experts leaves, within a basis, summed over them.

    Returns:
        Those, ascending, in fp64 on the CPU; and the squared norm of what lies outside of the basis.
    """
    experts, rows, columns = weights.shape
    parts = list(chunks(experts, 4 * rows * columns))
    shared = SharedBasis(weights, core, basis, metric, parts) if basis else None
    squares = torch.zeros(min(rows, basis or columns), dtype=torch.float64)
    outside = 0.0
    for part in parts:
        rest = residual(weights, core, part)
        if shared is None:
            whitened = metric.whiten(rest, part)
        else:
            inside = shared.inside(rest, part)
            whitened, outside = inside.matrix, outside + inside.outside
        small = whitened @ whitened.mT if rows <= whitened.shape[2] else whitened.mT @ whitened
        squares += torch.linalg.eigvalsh(small).clamp_min(0).sum(0, dtype=torch.float64).cpu()
    return squares, outside
