"""Closed-form fit of the wrapper (I + u_out v_out^T) core (I + u_in v_in^T): exact steps for one side at a time.

A wrapper is a core plus a delta of rank 2r of which r components have rows in the row space of the core (the out side)
and r have columns in its column space (the in side). So the fit starts from the best core plus delta, gives each side
the components it can express, and then alternates three steps: each side for a given core and other side (a
reduced-rank ridge regression, whose minimizer is known), and the core for given sides (a linear least-squares problem,
by a few steps of conjugate gradients).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.factorization.closed_form import CoreSolver, balance, fit_delta, leading_left_vectors, squared_norm
from moe_compress.factorization.eigen import eigh
from moe_compress.factorization.factors import DeltaFactors, WrapperFactors
from moe_compress.factorization.grams import Metric, chunks

# Ridge of the side steps, as a share of the mean squared singular value of the core and of the present relative error:
# what cannot be explained anyway is not worth large factors. Less than this fits no better and makes them larger.
_RIDGE = 5e-4
_CHOICE_RIDGE = 1e-4  # of the core's mean squared singular value, when the delta is divided between the sides
_SMALLEST_ERROR = 1e-4  # keeps the ridge above what fp32 resolves
_CORE_STEPS = 8  # of conjugate gradients per sweep


def fit_wrapper(weights: Tensor, rank: int, *, iterations: int, metric: Metric) -> tuple[WrapperFactors, list[float]]:
    """Fit core and wrappers of folded rank `rank` to all experts.

    Args:
        weights: [E, out, in], any floating type; computed with in fp32, some experts at a time.
        rank: inner size R = 2r of the folded delta; even, at most min(out, in).
        iterations: alternations of the delta fit that is started from, and then sweeps over both sides and the core.
        metric: norm to minimize.

    Returns:
        The factors of the best sweep in fp32, and the relative squared error in the norm of `metric` after each sweep.
    """
    delta, delta_history = fit_delta(weights, rank, cores=1, iterations=iterations, metric=metric)
    fit = _WrapperFit(weights, delta, delta_history[-1], metric)
    best, history = fit.factors(), []
    for _ in range(iterations):
        fit.sweep()
        history.append(fit.error)
        if fit.error <= min(history):
            best = fit.factors()
    u_out, v_out = balance(best.u_out, best.v_out.mT)
    u_in, v_in = balance(best.u_in, best.v_in.mT)
    return WrapperFactors(best.core, u_out, v_out.mT, u_in, v_in.mT), history


class _WrapperFit:
    """State of the fit: core [out, in] and sides of all experts (see `WrapperFactors`), relative squared error."""

    def __init__(self, weights: Tensor, delta: DeltaFactors, error: float, metric: Metric) -> None:
        experts, rows, columns = weights.shape
        assert delta.core is not None
        self.weights, self.metric, self.core, self.error = weights, metric, delta.core, error
        self.parts = list(chunks(experts, 4 * rows * columns))
        self.norm = squared_norm(weights, metric, self.parts)
        self.solver = CoreSolver(weights, metric, self.parts)
        rank = delta.delta_rank // 2
        self.u_out, self.v_out = (torch.zeros(experts, rows, rank, device=weights.device) for _ in range(2))
        self.u_in, self.v_in = (torch.zeros(experts, columns, rank, device=weights.device) for _ in range(2))
        # The core spans its smaller dimension, so that side can express anything: the other side chooses first.
        self.out_side_first = rows <= columns
        for part in self.parts:
            delta_out, delta_in = delta.delta_out[part], delta.delta_in[part]
            core = self.core.expand(delta_out.shape[0], -1, -1)
            if self.out_side_first:
                share = _expressible(core, delta_out, delta_in, rank)
                self.u_out[part], self.v_out[part] = _solve_side(core, share, rank, self._ridge)
            else:
                share = _expressible(core.mT, delta_in.mT, delta_out.mT, rank)
                self.v_in[part], self.u_in[part] = _solve_side(core.mT, share, rank, self._ridge)

    def factors(self) -> WrapperFactors:
        """A copy of the present factors."""
        return WrapperFactors(*(t.clone() for t in (self.core, self.u_out, self.v_out, self.u_in, self.v_in)))

    def sweep(self) -> None:
        """Solve for the second side, the core and the first side."""
        first, second = (self._out_side, self._in_side) if self.out_side_first else (self._in_side, self._out_side)
        for part in self.parts:
            second(part)
        self._improve_core()
        for part in self.parts:
            first(part)
        factors = WrapperFactors(self.core, self.u_out, self.v_out, self.u_in, self.v_in)
        errors = (
            self.metric.squared_norms(self.weights[part].float() - factors.materialize(part), part).sum()
            for part in self.parts
        )
        self.error = float(sum(errors)) / self.norm

    @property
    def _ridge(self) -> float:
        return _RIDGE * max(self.error, _SMALLEST_ERROR)

    def _out_side(self, part: slice) -> None:
        """W - C T ~ u_out v_out^T C T with T = I + u_in v_in^T, all of it whitened."""
        source = self._apply_in(self.core, part)
        target = self.metric.whiten(self.weights[part].float() - source, part)
        source = self.metric.whiten(source, part)
        self.u_out[part], self.v_out[part] = _solve_side(source, target, self.u_out.shape[2], self._ridge)

    def _in_side(self, part: slice) -> None:
        """W - S C ~ S C u_in v_in^T with S = I + u_out v_out^T; only v_in sees the whitening."""
        source = self._apply_out(self.core, part)
        target = self.metric.whiten(self.weights[part].float() - source, part)
        v_in, self.u_in[part] = _solve_side(source.mT, target.mT, self.u_in.shape[2], self._ridge)
        self.v_in[part] = self.metric.unwhiten(v_in.mT, part).mT

    def _apply_out(self, matrix: Tensor, part: slice) -> Tensor:
        return matrix + self.u_out[part] @ (self.v_out[part].mT @ matrix)

    def _apply_in(self, matrix: Tensor, part: slice) -> Tensor:
        return matrix + (matrix @ self.u_in[part]) @ self.v_in[part].mT

    def _adjoint(self, residual: Tensor, part: slice) -> Tensor:
        """Sum over the part of S^T residual G T^T: the gradient of the core, [out, in] in fp64."""
        residual = self.metric.apply(residual, part)
        residual = residual + self.v_out[part] @ (self.u_out[part].mT @ residual)
        residual = residual + (residual @ self.v_in[part]) @ self.u_in[part].mT
        return residual.sum(0, dtype=torch.float64)

    def _improve_core(self) -> None:
        """Lower the error over the core by conjugate gradients, preconditioned by the solution for S = T = I."""

        def normal(core: Tensor, *, target: bool) -> Tensor:
            """The normal equations applied to a core; with `target`, their residual instead."""
            total = torch.zeros_like(core, dtype=torch.float64)
            for part in self.parts:
                image = self._apply_in(self._apply_out(core, part), part)
                total += self._adjoint(self.weights[part].float() - image if target else image, part)
            return total

        residual = normal(self.core, target=True)
        direction = scaled = self.solver.solve(residual)
        core = self.core.double()
        for _ in range(_CORE_STEPS):
            image = normal(direction.float(), target=False)
            curvature = float((direction * image).sum())
            if curvature <= 0:  # nothing left to gain
                break
            product = float((residual * scaled).sum())
            core = core + direction * (product / curvature)
            residual = residual - image * (product / curvature)
            scaled = self.solver.solve(residual)
            direction = scaled + direction * (float((residual * scaled).sum()) / product)
        self.core = core.float()


def _row_filter(source: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """F [e, n, k] and B [e, m, k] of source Y [e, m, n]: F F^T = Y^T (Y Y^T + mu)^-1 Y and B F^T = (Y Y^T + mu)^-1 Y.

    F F^T is the projector on the row space of Y, softened where its singular values are small; k = min(m, n), and mu is
    `ridge` times the mean squared singular value.
    """
    rows, columns = source.shape[1:]
    squares, vectors = eigh(source @ source.mT if rows <= columns else source.mT @ source)
    mu = ridge * squares.mean(1, keepdim=True).clamp_min(1e-20)  # a core may be zero
    if rows <= columns:
        back = vectors * (squares.clamp_min(0) + mu).rsqrt()[:, None, :]
        return source.mT @ back, back
    squares = torch.maximum(squares, 1e-3 * mu)
    front = vectors * (squares / (squares + mu)).sqrt()[:, None, :]
    return front, source @ (vectors * (squares.rsqrt() * (squares + mu).rsqrt())[:, None, :])


def _solve_side(source: Tensor, target: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """u [e, m, rank] and v [e, l, rank] that minimize |target - u v^T source|^2 + mu |v|^2 with u orthonormal.

    Reduced-rank ridge regression (Mukherjee and Zhu 2011): u are the leading left singular vectors of the target seen
    through the softened row space of the source.

    Args:
        source: [e, l, n].
        target: [e, m, n].
        rank: at most min(l, m, n).
        ridge: see `_row_filter`.
    """
    front, back = _row_filter(source, ridge)
    seen = target @ front
    u = leading_left_vectors(seen, rank)
    return u, back @ (seen.mT @ u)


def _expressible(source: Tensor, delta_out: Tensor, delta_in: Tensor, rank: int) -> Tensor:
    """The `rank` components of delta_out delta_in [e, m, n] with rows closest to the row space of source [e, l, n].

    Where the source spans all rows, those that it reaches by the smallest factors: the ridge tells them apart, in fp64.
    """
    front, _ = _row_filter(source.double(), _CHOICE_RIDGE)
    basis, mixing = torch.linalg.qr(delta_in.double().mT)
    inside = front.mT @ basis
    rotation = torch.linalg.eigh(inside.mT @ inside).eigenvectors[..., -rank:]
    return (delta_out @ (mixing.mT @ rotation).float()) @ (basis @ rotation).mT.float()
