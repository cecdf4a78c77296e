"""Truncated SVD of each expert, plain or whitened by its inputs as in SVD-LLM (Wang et al. 2024, arXiv 2403.07378).

SVD-LLM whitens a matrix W by the Cholesky factor S of X X^T, truncates the SVD of W S and multiplies by S^-1: the loss
||W X - W' X|| is then the norm of the singular values left out (theorem 3.2). Each expert is whitened by the tokens
routed to it. `joint` takes gate and up as one matrix, which the paper does not; `separate` takes them apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.calibration import Layer
from benchmarks.quality.forms import VALUE_BYTES, Form, LowRank, gate_and_up
from benchmarks.quality.methods.base import Task, method
from moe_compress.factorization import budget, uniform_ranks
from moe_compress.factorization.align import neuron_rows

_DAMPING = 1e-4  # of the mean diagonal, for experts with fewer tokens than inputs


def low_rank(weight: Tensor, rank: int, core: Tensor | None = None, gram: Tensor | None = None) -> LowRank:
    """`core` [out, in] plus the best delta of a rank, in the norm of `gram` [E, in, in], for weights [E, out, in]."""
    columns = weight.shape[2]
    rest = weight if core is None else weight - core
    if gram is None:
        left, values, right = torch.linalg.svd(rest, full_matrices=False)
    else:
        diagonal = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        damped = gram.double() + _DAMPING * diagonal.double()[:, None, None] * torch.eye(columns)
        root = torch.linalg.cholesky(damped)
        left, values, right = torch.linalg.svd(rest.double() @ root, full_matrices=False)
        right = torch.linalg.solve_triangular(root, right[:, :rank], upper=False, left=False)
    scale = values[:, :rank].sqrt()
    return LowRank(core, (left[:, :, :rank] * scale[:, None]).float(), (right[:, :rank] * scale[:, :, None]).float())


def matrices(layer: Layer, joint: bool) -> dict[str, Tensor]:
    """What is factorized by itself, [E, out, in] each: the projections, or `gate`, `up` and `down_proj`."""
    if joint or not layer.module.has_gate:
        return layer.weights
    weight = layer.weights[layer.up_name]
    neurons = weight.shape[1] // 2
    rows = neuron_rows(torch.arange(neurons)[None], interleaved=layer.interleaved, gates=2)[0]
    return {"gate": weight[:, rows[:neurons]], "up": weight[:, rows[neurons:]], "down_proj": layer.weights["down_proj"]}


def assemble(layer: Layer, found: dict[str, Form]) -> dict[str, Form]:
    """The forms of `matrices` as forms of the projections."""
    if "gate" not in found:
        return found
    neurons = layer.weights["down_proj"].shape[2]
    joined = gate_and_up(found["gate"], found["up"], neurons, layer.interleaved)
    return {layer.up_name: joined, "down_proj": found["down_proj"]}


def ranks(task: Task, joint: bool, cores: int) -> dict[tuple[str, str], int]:
    """The rank of each (layer, matrix): the same share of the bytes for all, and what rounding leaves spent."""
    shapes = {
        f"{layer.name}/{name}": (weight.shape[0], weight.shape[1], weight.shape[2])
        for layer in task.layers
        for name, weight in matrices(layer, joint).items()
    }
    form = budget.Form(cores)
    found = uniform_ranks(shapes, ratio=task.ratio, forms=form, bytes_per_value=VALUE_BYTES, rank_multiple=1)
    return {(key.split("/")[0], key.split("/")[1]): rank for key, rank in found.items()}


@method("svd", joint=False, whiten=False, version=1)
@method("svd-joint", joint=True, whiten=False, version=1)
@method("svd-llm", joint=False, whiten=True, version=1)
@method("svd-llm-joint", joint=True, whiten=True, version=1)
def svd(task: Task, joint: bool, whiten: bool) -> Any:
    """Each expert alone, every matrix at the same share of its bytes."""
    rank = ranks(task, joint, cores=0)

    def forms(layer: Layer) -> dict[str, Form]:
        found: dict[str, Form] = {}
        for name, weight in matrices(layer, joint).items():
            gram = layer.grams("down_proj" if name == "down_proj" else layer.up_name) if whiten else None
            found[name] = low_rank(weight, rank[layer.name, name], gram=gram)
        return assemble(layer, found)

    return task.with_forms(forms)
