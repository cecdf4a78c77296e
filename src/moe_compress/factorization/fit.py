"""One interface to all fits: `fit(weights, spec, gram)`. A new method is a function under `@method(name)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_compress.errors import UserError
from moe_compress.factorization.adam import fit_adam
from moe_compress.factorization.closed_form import fit_delta, squared_norm
from moe_compress.factorization.closed_form_wrapper import fit_wrapper
from moe_compress.factorization.factors import Factors, merge_groups
from moe_compress.factorization.grams import Metric, chunks
from moe_compress.factorization.groups import group_experts

PARAMETERIZATIONS = ("delta", "wrapper")


@dataclass(frozen=True)
class FitSpec:
    """What to fit and how.

    Attributes:
        method: a key of `METHODS`.
        parameterization: "delta" (core + A B) or "wrapper" ((I + U V^T) core (I + U V^T)).
        delta_rank: inner size R of the folded delta, at most min(out, in); a wrapper has rank R / 2 per side.
        cores: 1 for a shared core, 0 for none (delta only), more for groups of experts with a core each.
        basis: size s of a basis of the inputs that all deltas share, 0 for none; not with more than one core.
        iterations: alternations of the closed form.
        num_steps: Adam steps.
        lr: Adam learning rate, for weights scaled to unit mean square.
        seed: of the random start of Adam.
    """

    method: str = "closed_form"
    parameterization: str = "delta"
    delta_rank: int = 128
    cores: int = 1
    basis: int = 0
    iterations: int = 5
    num_steps: int = 1000
    lr: float = 1e-3
    seed: int = 42


@dataclass(frozen=True)
class FitResult:
    """Factors and how well they fit.

    Attributes:
        factors: in fp32, on the device of the weights.
        relative_error: squared Frobenius error over squared norm, all experts together.
        expert_errors: [E], the same for each expert; fp32 on the CPU.
        data_error: like relative_error in the norm of the Gram matrices, or None without them.
        history: relative squared error in the norm that was minimized (with Gram matrices, slightly damped ones), after
            each iteration or some of the steps.
    """

    factors: Factors
    relative_error: float
    expert_errors: Tensor
    data_error: float | None
    history: list[float]


Method = Callable[[Tensor, FitSpec, Metric], tuple[Factors, list[float]]]
METHODS: dict[str, Method] = {}


def method(name: str) -> Callable[[Method], Method]:
    """Register a fit under the name that `compression.method` selects."""

    def register(function: Method) -> Method:
        METHODS[name] = function
        return function

    return register


@method("closed_form")
def _closed_form(weights: Tensor, spec: FitSpec, metric: Metric) -> tuple[Factors, list[float]]:
    if spec.parameterization == "wrapper":
        return fit_wrapper(weights, spec.delta_rank, iterations=spec.iterations, metric=metric)
    return fit_delta(
        weights, spec.delta_rank, cores=spec.cores, iterations=spec.iterations, metric=metric, basis=spec.basis
    )


@method("adam")
def _adam(weights: Tensor, spec: FitSpec, metric: Metric) -> tuple[Factors, list[float]]:
    return fit_adam(
        weights,
        spec.delta_rank,
        parameterization=spec.parameterization,
        cores=spec.cores,
        num_steps=spec.num_steps,
        lr=spec.lr,
        seed=spec.seed,
        metric=metric,
    )


@torch.no_grad()
def fit(
    weights: Tensor,
    spec: FitSpec,
    gram: Tensor | None = None,
    groups: Tensor | None = None,
    out_gram: Tensor | None = None,
) -> FitResult:
    """Factorize one projection of all experts of a layer.

    Args:
        weights: [E, out, in] of any floating type, y = W_e x.
        spec: see `FitSpec`.
        gram: [E, in, in], sum of g^2 x x^T over the inputs of each expert (already shrunk, see `shrink_grams`); with
            it the error of the outputs is minimized rather than that of the weights.
        groups: [E], which of several cores each expert gets; None lets `group_experts` choose.
        out_gram: [E, out, out], sum of d d^T over the gradients of the outputs, see `grams`; only with `gram`.

    Raises:
        UserError: a setting is out of range, a rank above the dimensions, NaN or infinity in the weights.
        ValueError: the shapes do not belong together.
    """
    _check(weights, spec, gram, out_gram)
    weights = weights.detach()
    metric = Metric(*(None if each is None else each.detach().to(weights.device) for each in (gram, out_gram)))
    if spec.cores > 1:
        groups = group_experts(weights, spec.cores, metric.gram) if groups is None else groups
        factors, history = _fit_groups(weights, spec, metric, groups.to(weights.device))
    else:
        factors, history = METHODS[spec.method](weights, spec, metric)
    return _measure(weights, factors, history, gram, out_gram)


def _fit_groups(weights: Tensor, spec: FitSpec, metric: Metric, groups: Tensor) -> tuple[Factors, list[float]]:
    """Fit the experts of each group [E] around a core of their own."""
    parts: list[Any] = []
    errors = torch.zeros(0)
    norms = 0.0
    for group in range(spec.cores):
        mask = groups == group
        own, own_metric = weights[mask], metric.select(mask)
        factors, history = METHODS[spec.method](own, replace(spec, cores=1), own_metric)
        norm = squared_norm(own, own_metric, list(chunks(len(own), 4 * own[0].numel())))
        squares = norm * torch.tensor(history, dtype=torch.float64)
        errors = squares if not parts else errors + squares
        norms += norm
        parts.append(factors)
    return merge_groups(parts, groups), (errors / norms).tolist()


def _check(weights: Tensor, spec: FitSpec, gram: Tensor | None, out_gram: Tensor | None) -> None:
    if weights.dim() != 3 or not weights.is_floating_point():
        raise ValueError(f"weights must be floating point [E, out, in], not {weights.dtype} {tuple(weights.shape)}")
    experts, rows, columns = weights.shape
    if gram is not None and gram.shape != (experts, columns, columns):
        raise ValueError(f"gram {tuple(gram.shape)} does not belong to weights {tuple(weights.shape)}")
    if out_gram is not None and (gram is None or out_gram.shape != (experts, rows, rows)):
        raise ValueError(f"out_gram {tuple(out_gram.shape)} does not belong to weights {tuple(weights.shape)} and gram")
    if out_gram is not None and spec.parameterization == "wrapper":
        raise UserError(
            "compression.calibration.fisher=true is not for wrappers: choose compression.parameterization=delta"
        )
    if spec.method not in METHODS:
        raise UserError(f"compression.method={spec.method}: choose one of {', '.join(sorted(METHODS))}")
    if spec.parameterization not in PARAMETERIZATIONS:
        raise UserError(f"compression.parameterization={spec.parameterization}: choose delta or wrapper")
    if not 0 <= spec.cores < max(2, experts):
        raise UserError(f"compression.cores={spec.cores}: choose 1 (shared core), 0 (none), or less than {experts}")
    if spec.parameterization == "wrapper" and spec.cores == 0:
        raise UserError("compression.cores=0 has no core to wrap: choose compression.parameterization=delta")
    if spec.parameterization == "wrapper" and spec.delta_rank % 2:
        raise UserError(f"a wrapper has an even delta rank (twice compression.rank), not {spec.delta_rank}")
    if spec.basis and (spec.parameterization == "wrapper" or spec.cores > 1 or spec.method != "closed_form"):
        raise UserError(
            "compression.input_basis is for compression.parameterization=delta, method=closed_form and at most one core"
        )
    if spec.basis and not spec.delta_rank <= spec.basis < columns:
        raise UserError(
            f"a shared input basis of {spec.basis} does not fit delta rank {spec.delta_rank} and {columns} inputs"
        )
    least = 2 if spec.parameterization == "wrapper" else 1
    if not least <= spec.delta_rank <= min(rows, columns):
        raise UserError(
            f"delta rank {spec.delta_rank} does not fit expert weights of {rows} x {columns}: "
            f"it must be from {least} to {min(rows, columns)}; lower compression.rank"
        )
    for name in ("iterations", "num_steps", "lr"):
        if not getattr(spec, name) > 0:
            raise UserError(f"compression.{name}={getattr(spec, name)}: it must be positive")
    if not all(bool(torch.isfinite(expert).all()) for expert in weights):
        raise UserError("the expert weights hold NaN or infinity: the checkpoint is damaged")


def _measure(
    weights: Tensor, factors: Factors, history: list[float], gram: Tensor | None, out_gram: Tensor | None
) -> FitResult:
    experts, rows, columns = weights.shape
    errors, norms, data = [], [], torch.zeros(2, dtype=torch.float64)
    tiny = torch.finfo(torch.float32).tiny
    for part in chunks(experts, 4 * rows * columns):
        original = weights[part].float()
        difference = original - factors.materialize(part)
        errors.append(difference.square().sum((1, 2), dtype=torch.float64))
        norms.append(original.square().sum((1, 2), dtype=torch.float64))
        if gram is not None:
            part_gram = gram[part].to(weights.device).float()
            part_out = None
            if out_gram is not None:
                part_out = out_gram[part].to(weights.device).float()
                part_out = part_out / part_out.diagonal(dim1=1, dim2=2).sum(1).clamp_min(tiny)[:, None, None]
            for index, matrix in enumerate((difference, original)):
                weighed = matrix @ part_gram
                if part_out is not None:
                    weighed = part_out @ weighed
                data[index] += float((weighed * matrix).sum(dtype=torch.float64))
    error, norm = torch.cat(errors).cpu(), torch.cat(norms).cpu()
    return FitResult(
        factors=factors,
        relative_error=float(error.sum() / norm.sum().clamp_min(tiny)),
        expert_errors=(error / norm.clamp_min(tiny)).float(),
        data_error=None if gram is None else float(data[0].clamp_min(0) / data[1].clamp_min(tiny)),
        history=history,
    )
