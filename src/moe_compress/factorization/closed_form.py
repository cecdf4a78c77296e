"""Closed-form fit of core plus delta: alternate the best core for given deltas and the best deltas for a given core.

In the Frobenius norm the core is the mean of
W_e - delta_e and the delta a truncated SVD; with a Gram matrix G_e per expert the core is
(sum_e (W_e - delta_e) G_e) (sum_e G_e)^-1 and the delta the whitened truncated SVD of W_e - core (see `grams`, also for
outputs that are weighed too), within a shared basis where one is asked for (see `basis`).
No step can increase the error: the deltas are exact minimizers, and in the core the error is a quadratic, which stays
below its start up to twice the distance of its minimizer. So the core may move beyond it, which saves a third of the
steps. (The basis is the best for a mean norm of the experts only, and may raise the error by a little.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.factorization.basis import SharedBasis
from moe_compress.factorization.eigen import leading_left_vectors
from moe_compress.factorization.factors import DeltaFactors
from moe_compress.factorization.grams import Metric, chunks, residual

_CORE_STEPS = 20  # of conjugate gradients, where outputs are weighed
_CORE_TOLERANCE = 1e-8  # of what the core explains: smaller steps are left out
_RELAXATION = 1.5  # step towards the best core, 1 moves onto it; anything below 2 lowers the error


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each component of left [e, m, r] right [e, r, n] to equal norms, which conditions later training."""
    left_norm, right_norm = left.norm(dim=1), right.norm(dim=2)
    tiny = torch.finfo(left.dtype).tiny ** 0.5
    scale = (right_norm.clamp_min(tiny) / left_norm.clamp_min(tiny)).sqrt()
    return left * scale[:, None, :], right / scale[:, :, None]


def fit_delta(
    weights: Tensor, rank: int, *, cores: int, iterations: int, metric: Metric, basis: int = 0
) -> tuple[DeltaFactors, list[float]]:
    """Fit core plus delta of rank `rank` to all experts.

    Args:
        weights: [E, out, in], any floating type; computed with in fp32, some experts at a time.
        rank: inner size R of the delta, at most min(out, in).
        cores: 1 for a shared core, 0 for truncated SVD of each expert alone (no alternation then).
        iterations: alternations, at least 1; the first is core = (weighted) mean, delta = truncated SVD.
        metric: norm to minimize.
        basis: size s of a basis of the inputs that all deltas share, 0 for none; at least `rank`.

    Returns:
        Factors in fp32, and the relative squared error in the norm of `metric` after each alternation.
    """
    experts, rows, columns = weights.shape
    delta_out = torch.zeros(experts, rows, rank, device=weights.device)
    delta_in = torch.zeros(experts, rank, basis or columns, device=weights.device)
    parts = list(chunks(experts, 4 * rows * columns))
    norm = squared_norm(weights, metric, parts)
    solver = CoreSolver(weights, metric, parts) if cores else None
    core: Tensor | None = None
    shared: SharedBasis | None = None
    history: list[float] = []
    for alternation in range(iterations if cores else 1):
        if solver is not None:
            inputs = delta_in if shared is None else delta_in @ shared.basis
            best = solver.best_core(delta_out, inputs) if alternation else solver.solve(solver.moment).float()
            core = best if core is None else torch.lerp(core, best, _RELAXATION)
        if basis:
            shared = SharedBasis(weights, core, basis, metric, parts)
        error = 0.0
        for part in parts:
            rest = residual(weights, core, part)
            inside = None if shared is None else shared.inside(rest, part)
            whitened = metric.whiten(rest, part) if inside is None else inside.matrix
            # The deltas of one alternation are near those of the next.
            start = metric.whiten_out(delta_out[part], part) if alternation else None
            left = leading_left_vectors(whitened, rank, start)
            error += float((whitened - left @ (left.mT @ whitened)).square().sum(dtype=torch.float64))
            if inside is None:
                # With these left vectors the best delta, in any norm on the right, is the projection of the rest.
                right = left.mT @ metric.whiten_out(rest, part)
            else:
                error += inside.outside
                right = inside.unwhiten(left.mT @ whitened)
            delta_out[part], delta_in[part] = balance(metric.unwhiten_out(left, part), right)
        history.append(error / norm)
    return DeltaFactors(core, delta_out, delta_in, basis=None if shared is None else shared.basis), history


def squared_norm(weights: Tensor, metric: Metric, parts: list[slice]) -> float:
    """Squared norm of weights [E, out, in] over all experts; tiny instead of zero, so that one may divide by it."""
    total = sum(float(metric.squared_norms(weights[part].float(), part).sum()) for part in parts)
    return max(total, torch.finfo(torch.float32).tiny)


class CoreSolver:
    """The best core for given deltas: (sum_e (W_e - A_e B_e) G_e) (sum_e G_e)^-1, or the mean of W_e - A_e B_e.

    Where outputs are weighed too it solves sum_e S_e C G_e = sum_e S_e (W_e - A_e B_e) G_e by conjugate gradients.

    Args:
        weights: [E, out, in].
        metric: norm to minimize.
        parts: slices that cover the experts.
    """

    def __init__(self, weights: Tensor, metric: Metric, parts: list[slice]) -> None:
        self.metric, self.parts, self.experts = metric, parts, weights.shape[0]
        self.moment = torch.zeros(weights.shape[1:], dtype=torch.float64, device=weights.device)
        for part in parts:
            self.moment += self._weigh(weights[part].float(), part)
        self.root = None if metric.gram is None else torch.linalg.cholesky(metric.gram.sum(0, dtype=torch.float64))
        self.out_root = None
        if metric.out_gram is not None:
            self.out_root = torch.linalg.cholesky(metric.out_gram.mean(0, dtype=torch.float64))

    def best_core(self, delta_out: Tensor, delta_in: Tensor) -> Tensor:
        """The core [out, in] in fp32 for deltas [E, out, R] and [E, R, in]."""
        moment = self.moment.clone()
        for part in self.parts:
            weighed = self.metric.apply_out(delta_out[part], part) @ self.metric.apply(delta_in[part], part)
            moment -= weighed.sum(0, dtype=torch.float64)
        return self.solve(moment).float()

    def solve(self, moment: Tensor) -> Tensor:
        """The core whose weighted sum is moment [out, in]; both fp64."""
        solution = self._solve_without_spread(moment)
        if self.out_root is None:
            return solution
        # Preconditioned by the solution for experts that all have the mean output matrix, from which it starts.
        residual = moment - self._weigh_core(solution)
        direction = step = self._solve_without_spread(residual)
        product = (residual * step).sum()
        smallest = _CORE_TOLERANCE * float((moment * solution).sum())
        for _ in range(_CORE_STEPS):
            if float(product) <= smallest:
                break
            image = self._weigh_core(direction)
            length = product / (direction * image).sum()
            solution = solution + length * direction
            residual = residual - length * image
            step = self._solve_without_spread(residual)
            product, previous = (residual * step).sum(), product
            direction = step + product / previous * direction
        return solution

    def _solve_without_spread(self, moment: Tensor) -> Tensor:
        """moment [out, in] times (sum_e G_e)^-1, after (mean_e S_e)^-1; fp64."""
        if self.out_root is not None:
            moment = torch.cholesky_solve(moment, self.out_root)
        return moment / self.experts if self.root is None else torch.cholesky_solve(moment.mT, self.root).mT

    def _weigh(self, matrix: Tensor, part: slice) -> Tensor:
        """sum_e S_e matrix_e G_e over the experts of a part, [e, out, in] to [out, in] in fp64."""
        return self.metric.apply_out(self.metric.apply(matrix, part), part).sum(0, dtype=torch.float64)

    def _weigh_core(self, core: Tensor) -> Tensor:
        """sum_e S_e core G_e over all experts; fp64."""
        total = torch.zeros_like(core)
        for part in self.parts:
            experts = len(range(self.experts)[part])
            total += self._weigh(core.float().expand(experts, -1, -1), part)
        return total
