"""REAP (Lasby et al. 2025, arXiv 2510.13999): drop the experts of the least router-weighted activation.

The saliency of expert e is the mean, over the tokens routed to it, of g_e(x) ||f_e(x)||: the norm of what it adds to
the layer's output. The router forgets the experts that go; the others are not changed, and tokens take the next best.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.calibration import Layer, find_router
from benchmarks.quality.forms import Dense, Form, replace_experts
from benchmarks.quality.methods.base import Task, method


def saliency(layer: Layer) -> Tensor:
    """The mean of g ||f_e(x)|| over the tokens routed to each expert, [E]; 0 for an expert without tokens."""
    found = torch.zeros(layer.num_experts)
    for expert in range(layer.num_experts):
        tokens, gates = layer.routed(expert)
        if len(tokens):
            found[expert] = (gates * layer.outputs(expert, layer.inputs[tokens]).norm(dim=1)).mean()
    return found


def keep_experts(model: Any, layer: Layer, keep: Tensor) -> None:
    """Leave a layer of a model with the experts `keep` [n] alone, router and experts per token included."""
    forms: dict[str, Form] = {name: Dense(weight[keep].clone()) for name, weight in layer.weights.items()}
    replace_experts(model, {layer.name: forms})
    experts = model.get_submodule(layer.name)
    experts.set_num_experts(len(keep))
    for name, bias in experts.biases.items():
        experts.biases[name] = nn.Parameter(bias.detach()[keep].clone())
    block = model.get_submodule(layer.name.rpartition(".")[0])
    router = find_router(block, layer.num_experts)
    others = [n for n, t in (*router.named_parameters(), *router.named_buffers()) if n not in ("weight", "bias")]
    if others:
        raise ValueError(f"{type(router).__name__} has {others}: not known how they change with the experts")
    for name, parameter in list(router.named_parameters()):
        setattr(router, name, nn.Parameter(parameter.detach()[keep].clone()))
    for module in (block, router):
        if hasattr(module, "num_experts"):
            module.num_experts = len(keep)
        if hasattr(module, "top_k"):
            module.top_k = min(module.top_k, len(keep))


@method("reap", version=1)
def reap(task: Task) -> Any:
    """The same number of experts in every layer."""
    model = task.student()
    for layer in task.layers:
        number = int(task.ratio * layer.num_experts + 1e-9)
        if number < 1:
            raise ValueError(f"{task.ratio} of {layer.num_experts} experts is not even one")
        keep_experts(model, layer, saliency(layer).topk(number).indices.sort().values)
    return model
