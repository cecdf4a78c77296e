"""D2-MoE (Gu et al. 2025, arXiv 2502.17298): a base merged by Fisher information plus a whitened SVD of each delta.

The base is sum_e F_e W_e / sum_e F_e, with F_e the diagonal Fisher information of each weight, here of the sampled
likelihood token by token: F_e = sum over tokens of (gradient of the output)^2 (input)^2. Deltas are truncated after
whitening by each expert's inputs, gate and up apart, as the paper does. Its semi-dynamical pruning of the base is left
out: that makes the base smaller than it is here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.calibration import Layer
from benchmarks.quality.forms import Form
from benchmarks.quality.methods.base import Task, method
from benchmarks.quality.methods.svd import assemble, low_rank, matrices, ranks

_FLOOR = 1e-6  # of the mean Fisher information, for weights that no token used


def diagonal_fisher(layer: Layer) -> dict[str, Tensor]:
    """The diagonal Fisher information of each weight, [E, out, in]."""
    found = {name: torch.zeros_like(weight) for name, weight in layer.weights.items()}
    for expert in range(layer.num_experts):
        for name, (inputs, gradients) in layer.seen(expert).items():
            found[name][expert] = gradients.square().mT @ inputs.square()
    return found


def merged_base(weight: Tensor, fisher: Tensor) -> Tensor:
    """sum_e F_e W_e / sum_e F_e for weights and Fisher information [E, out, in]: [out, in]."""
    fisher = fisher + _FLOOR * fisher.mean().clamp_min(torch.finfo(fisher.dtype).tiny)
    return (fisher * weight).sum(0) / fisher.sum(0)


@method("d2-moe", version=1)
def d2moe(task: Task) -> Any:
    """Base and deltas of every matrix at the same share of its bytes."""
    rank = ranks(task, joint=False, cores=1)

    def forms(layer: Layer) -> dict[str, Form]:
        fisher = matrices(replace(layer, weights=diagonal_fisher(layer)), joint=False)
        found: dict[str, Form] = {}
        for name, weight in matrices(layer, joint=False).items():
            gram = layer.grams("down_proj" if name == "down_proj" else layer.up_name)
            found[name] = low_rank(weight, rank[layer.name, name], merged_base(weight, fisher[name]), gram)
        return assemble(layer, found)

    return task.with_forms(forms)
