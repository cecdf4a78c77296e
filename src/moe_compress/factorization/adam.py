"""Adam fit: gradient descent on the reconstruction error of all experts of a projection at once.

The slow way, kept for comparison with the closed form and because it needs no assumption on the parameterization. The
weights are scaled to unit mean square, so that one learning rate means the same for every layer; it falls linearly to
zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_compress.factorization.closed_form import squared_norm
from moe_compress.factorization.factors import DeltaFactors, Factors, WrapperFactors
from moe_compress.factorization.grams import Metric, chunks

_HISTORY = 20  # errors reported, evenly spaced over the steps


@torch.enable_grad()
def fit_adam(
    weights: Tensor,
    rank: int,
    *,
    parameterization: str,
    cores: int,
    num_steps: int,
    lr: float,
    seed: int,
    metric: Metric,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[Factors, list[float]]:
    """Fit wrapper or delta of folded rank `rank` by Adam; deterministic for a given seed and machine.

    Starts from core = mean of the experts, orthonormal random input factors and zero output factors, so from a delta of
    zero.

    Args:
        weights: [E, out, in], any floating type; computed with in fp32, some experts at a time.
        rank: inner size R of the folded delta; even for "wrapper".
        parameterization: "wrapper" or "delta".
        cores: 1, or 0 for a delta without a core.
        num_steps: Adam steps.
        lr: learning rate of the first step.
        seed: of the random start.
        metric: norm to minimize.
        on_step: called with the number of steps done and the relative squared error before that step.

    Returns:
        Factors in fp32, and the relative squared error before some of the steps and after the last.
    """
    experts, rows, columns = weights.shape
    parts = list(chunks(experts, 4 * rows * columns))
    scale = float(sum(weights[part].float().square().sum(dtype=torch.float64) for part in parts))
    scale = max((scale / weights.numel()) ** 0.5, torch.finfo(torch.float32).tiny)
    norm = squared_norm(weights, metric, parts) / scale**2
    start = _start(weights, rank, scale, parameterization=parameterization, cores=cores, seed=seed, parts=parts)
    parameters = [tensor.requires_grad_() for tensor in start]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)

    def factors() -> Factors:
        if parameterization == "wrapper":
            return WrapperFactors(*parameters)
        return DeltaFactors(parameters[0] if cores else None, *parameters[-2:])

    def part_error(part: slice) -> Tensor:
        difference = factors().materialize(part) - weights[part].float() / scale
        return metric.whiten(difference, part).square().sum() / norm

    history: list[float] = []
    for step in range(num_steps):
        optimizer.zero_grad()
        error = 0.0
        for part in parts:  # gradients add up: memory for the weights of one part only
            loss = part_error(part)
            loss.backward()
            error += loss.item()
        optimizer.step()
        schedule.step()
        if step % max(1, num_steps // _HISTORY) == 0:
            history.append(error)
        if on_step is not None:
            on_step(step + 1, error)
    with torch.no_grad():
        history.append(sum(part_error(part).item() for part in parts))
        return _rescaled(factors(), scale), history


def _start(
    weights: Tensor, rank: int, scale: float, *, parameterization: str, cores: int, seed: int, parts: list[slice]
) -> list[Tensor]:
    """The parameters in the order of the fields of their class, without a core if there is none."""
    experts, rows, columns = weights.shape
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(size: int, count: int) -> Tensor:
        return torch.linalg.qr(torch.randn(experts, size, count, generator=generator)).Q.to(weights.device)

    core = sum((weights[part].float().sum(0, dtype=torch.float64) for part in parts), start=torch.zeros(()))
    start = [(core / (experts * scale)).float().to(weights.device)] if cores else []
    if parameterization == "wrapper":
        side = rank // 2
        zeros_out = torch.zeros(experts, rows, side, device=weights.device)
        zeros_in = torch.zeros(experts, columns, side, device=weights.device)
        return [*start, zeros_out, orthonormal(rows, side), zeros_in, orthonormal(columns, side)]
    # A matrix of unit entries has singular values up to about sqrt(out) + sqrt(in); either factor gets its square root.
    size = (rows**0.5 + columns**0.5) ** 0.5
    return [*start, torch.zeros(experts, rows, rank, device=weights.device), orthonormal(columns, rank).mT * size]


def _rescaled(factors: Factors, scale: float) -> Factors:
    """The factors of `scale` times the weights."""
    if isinstance(factors, WrapperFactors):
        sides = (factors.u_out, factors.v_out, factors.u_in, factors.v_in)
        return WrapperFactors(factors.core * scale, *(side.detach() for side in sides))
    core = None if factors.core is None else factors.core * scale
    return DeltaFactors(core, factors.delta_out * scale**0.5, factors.delta_in * scale**0.5)
