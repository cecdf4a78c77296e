"""MoBE (Chen et al. 2025, arXiv 2508.05257): W_e = A_e f(sum_j a_ej B_j), bases B_j shared by the experts of a layer.

f is SiLU, a_e a softmax, the weights are standardized (z-score) before the fit; their mean is dropped and their
deviation goes into A_e. Fitted by Adam on the squared error of the weights, as in the paper. Differences: the paper
leaves `down_proj` as it is, which gets the same form here (transposed, so that the inner side is the neurons' as for
gate and up), and takes A_e square: so here, with as many bases as the budget has room for. Where square A_e alone are
more than the budget the inner size r is chosen: of several pairs (m bases, r) that fit, the one with the least error
after a tenth of the steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.calibration import Layer
from benchmarks.quality.forms import Bases, Form
from benchmarks.quality.methods.base import Task, method
from benchmarks.quality.methods.svd import assemble, matrices

_BASES = (2, 4, 8, 16, 32)


def inner_size(shape: tuple[int, int, int], bases: int, budget: int) -> int:
    """The largest r with E p r + E m + m r q <= budget for weights of shape (E, p, q)."""
    experts, p, q = shape
    return min(p, (budget - experts * bases) // (experts * p + bases * q))


def fit_bases(weight: Tensor, bases: int, inner: int, steps: int, lr: float, seed: int) -> tuple[Bases, float]:
    """Adam on the squared error of standardized weights [E, p, q]; the form and its relative squared error."""
    experts, p, q = weight.shape
    deviation = weight.std()
    target = (weight - weight.mean()) / deviation
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).requires_grad_()

    outer = random(experts, p, inner, scale=inner**-0.5)
    logits = random(experts, bases, scale=1.0)
    blocks = random(bases, inner, q, scale=float(bases) ** 0.5)
    form = Bases(outer.detach(), logits.detach(), blocks.detach(), transposed=False)
    optimizer = torch.optim.Adam(form.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            (form() - target).square().mean().backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        form.outer.mul_(deviation)
        error = float((form() - weight).square().sum() / weight.square().sum())
    return form, error


def best_bases(weight: Tensor, budget: int, steps: int, lr: float, seed: int) -> Bases:
    """The form of the pair (m, r) that fits best within the budget of values."""
    shape = experts, p, q = (weight.shape[0], weight.shape[1], weight.shape[2])
    square = (budget - experts * p * p) // (experts + p * q)  # bases that there is room for beside square A_e
    pairs = [(m, inner_size(shape, m, budget)) for m in ((min(square, experts - 1),) if square > 1 else _BASES)]
    pairs = [(m, r) for m, r in pairs if r >= 1 and m < experts]
    if not pairs:
        raise ValueError(f"{budget} values are too few for any number of bases of {shape}")
    if len(pairs) > 1:
        pairs.sort(key=lambda pair: fit_bases(weight, *pair, max(1, steps // 10), lr, seed)[1])
    return fit_bases(weight, *pairs[0], steps, lr, seed)[0]


@method("mobe", steps=1000, lr=2e-2, version=1)
def mobe(task: Task, steps: int, lr: float) -> Any:
    """Every matrix at the same share of its bytes."""

    def forms(layer: Layer) -> dict[str, Form]:
        found: dict[str, Form] = {}
        for name, weight in matrices(layer, joint=False).items():
            flip = name == "down_proj"
            form = best_bases(weight.mT if flip else weight, task.budget(weight), steps, lr, task.seed)
            form.transposed = flip
            found[name] = form
        return assemble(layer, found)

    return task.with_forms(forms)
