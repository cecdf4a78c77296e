"""The error of a projection at each rank, all from one set of singular values: less than one fit costs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_compress.factorization.basis import SharedBasis
from moe_compress.factorization.budget import Form
from moe_compress.factorization.closed_form import CoreSolver, squared_norm
from moe_compress.factorization.eigen import eigenvalues
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
    curves: dict[Form, Tensor] = {}
    for cores in {form.cores for form in forms}:
        bases = sorted({form.basis for form in forms if form.cores == cores})
        if cores > 1:
            curves[Form(cores)] = _tails_of_groups(weights, cores, metric)
        else:
            tails = _tails(weights, _core(weights, metric) if cores else None, bases, metric)
            curves |= {Form(cores, basis): tail for basis, tail in zip(bases, tails, strict=True)}
    return {form: unit * curves[form] for form in forms}


def error_curve(weights: Tensor, form: Form, gram: Tensor | None = None, out_gram: Tensor | None = None) -> Tensor:
    """That of one form, see `error_curves`."""
    return error_curves(weights, [form], gram, out_gram)[form]


def _core(weights: Tensor, metric: Metric) -> Tensor:
    """The best core [out, in] of some experts without deltas; fp32."""
    solver = CoreSolver(weights, metric, list(chunks(weights.shape[0], 4 * weights[0].numel())))
    return solver.solve(solver.moment).float()


def _tails_of_groups(weights: Tensor, cores: int, metric: Metric) -> Tensor:
    """The squared error at every rank where groups of experts have a core each."""
    groups = group_experts(weights, cores, metric.gram).to(weights.device)
    tails = torch.zeros(1 + min(weights.shape[1:]), dtype=torch.float64)
    for group in range(cores):
        own, norm = weights[groups == group], metric.select(groups == group)
        tails += _tails(own, _core(own, norm), [0], norm)[0]
    return tails


def _tails(weights: Tensor, core: Tensor | None, bases: list[int], metric: Metric) -> list[Tensor]:
    """The squared error at every rank, in the norm of the metric, for bases of ascending sizes; 0 is none.

    The directions of a basis are in order of their weight, so that a smaller one is the beginning of the largest.
    """
    experts, rows, columns = weights.shape
    parts = list(chunks(experts, 4 * rows * columns))
    shared = SharedBasis(weights, core, bases[-1], metric, parts) if bases[-1] else None
    squares = [torch.zeros(min(rows, basis or columns), dtype=torch.float64) for basis in bases]
    outside = [0.0 for _ in bases]
    for part in parts:
        rest = residual(weights, core, part)
        inside = None if shared is None else shared.inside(rest, part)
        for number, basis in enumerate(bases):
            if inside is None or not basis:
                within = metric.whiten(rest, part)
            else:
                within = inside.matrix[..., :basis]
                beyond = inside.matrix[..., basis:].square().sum(dtype=torch.float64)
                outside[number] += inside.outside + float(beyond)
            small = within @ within.mT if rows <= within.shape[2] else within.mT @ within
            squares[number] += eigenvalues(small).clamp_min(0).sum(0, dtype=torch.float64).cpu()
    zero = torch.zeros(1, dtype=torch.float64)
    # Eigenvalues ascend: the sums are those of what lower ranks leave, from the smallest on.
    return [torch.cat([zero, own.cumsum(0)]).flip(0) + beyond for own, beyond in zip(squares, outside, strict=True)]
