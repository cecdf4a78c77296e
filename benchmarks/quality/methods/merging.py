"""Merging experts: HC-SMoE (Chen et al. 2024, arXiv 2410.08589) and M-SMoE (Li et al. 2023, arXiv 2310.01334).

HC-SMoE clusters the experts of a layer by the Euclidean distance of their mean outputs on the calibration text (every
expert on the same tokens, whatever the routing), hierarchically with average linkage, and averages each cluster
weighted by routing frequency. M-SMoE keeps the most frequent experts as group centres, gives each other expert to the
centre whose router logits are most like its own, permutes its neurons to match the centre's and averages by frequency.
The router stays; it goes on choosing among the original experts, whose members share weights.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from benchmarks.quality.calibration import Layer
from benchmarks.quality.forms import Form, Merged
from benchmarks.quality.methods.base import Task, method
from moe_compress.factorization import align_neurons, permute_columns, permute_rows

_TOKENS = 2048  # to tell experts' mean outputs apart


def clusters(features: Tensor, number: int) -> Tensor:
    """Average-linkage clusters [E], numbered from 0, of features [E, d]."""
    if len(features) <= number:
        return torch.arange(len(features))
    tree = linkage(features.double().numpy(), method="average", metric="euclidean")
    found = torch.from_numpy(fcluster(tree, number, criterion="maxclust")).long()
    return torch.unique(found, return_inverse=True)[1]


def groups_by_router(counts: Tensor, router_logits: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Centres [number] (the most frequent experts) and the group [E] of each expert, by its router logits [T, E]."""
    centres = counts.topk(number).indices.sort().values
    columns = torch.nn.functional.normalize(router_logits.mT, dim=1)
    group = (columns @ columns[centres].mT).argmax(1)
    group[centres] = torch.arange(number)
    return centres, group


def merge(layer: Layer, group: Tensor, centres: Tensor | None = None) -> dict[str, Form]:
    """Average each group weighted by routing frequency; aligned to the centres of the groups where they are given."""
    weights = layer.weights
    if centres is not None:
        weights = _aligned(layer, group, centres)
    frequency = layer.counts().float().clamp_min(1)
    share = torch.zeros(int(group.max()) + 1, layer.num_experts)
    share[group, torch.arange(layer.num_experts)] = frequency
    share /= share.sum(1, keepdim=True)
    return {name: Merged(torch.einsum("ge,eoi->goi", share, weight), group) for name, weight in weights.items()}


def _aligned(layer: Layer, group: Tensor, centres: Tensor) -> dict[str, Tensor]:
    found = {name: weight.clone() for name, weight in layer.weights.items()}
    layout: dict[str, Any] = {"interleaved": layer.interleaved, "gates": layer.gate_count}
    for expert in set(range(layer.num_experts)) - set(centres.tolist()):
        # `align_neurons` may move either of a pair: only their relative order counts.
        pair = torch.tensor([int(centres[group[expert]]), expert])
        up, down = layer.weights[layer.up_name][pair], layer.weights["down_proj"][pair]
        order = align_neurons(up, down, **layout)
        order = order[1][order[0].argsort()][None]
        found[layer.up_name][expert] = permute_rows(up[1:], order, **layout)[0]
        found["down_proj"][expert] = permute_columns(down[1:], order)[0]
    return found


def _number(task: Task, layer: Layer) -> int:
    """Merged experts that fit the budget, with the table that says which expert is in which group."""
    values = sum(weight[0].numel() for weight in layer.weights.values())
    table = len(layer.weights) * layer.num_experts * (1 if layer.num_experts < 256 else 4)
    budget = 2 * sum(task.budget(weight) for weight in layer.weights.values())
    number = (budget - table) // (2 * values)
    # The table is a few bytes: a budget of exactly n experts is meant to hold n.
    number = max(number, int(task.ratio * layer.num_experts + 1e-9))
    if number < 1:
        raise ValueError(f"{task.ratio} of {layer.num_experts} experts is not even one")
    return number


@method("hc-smoe", version=1)
def hc_smoe(task: Task) -> Any:
    """The same number of merged experts in every layer."""

    def forms(layer: Layer) -> dict[str, Form]:
        inputs = layer.inputs[:: max(1, len(layer.inputs) // _TOKENS)]
        features = torch.stack([layer.outputs(expert, inputs).mean(0) for expert in range(layer.num_experts)])
        return merge(layer, clusters(features, _number(task, layer)))

    return task.with_forms(forms)


@method("m-smoe", version=1)
def m_smoe(task: Task) -> Any:
    """The same number of merged experts in every layer (the paper divides them over layers by frequency)."""

    def forms(layer: Layer) -> dict[str, Form]:
        centres, group = groups_by_router(layer.counts(), layer.router_logits, _number(task, layer))
        return merge(layer, group, centres)

    return task.with_forms(forms)
