"""What the calibration text does in each MoE layer of the teacher: inputs, routing and gradients of every token.

Kept in main memory as they are, so that each method can form the statistics that its paper asks for. That suits the
small models of this benchmark; a large one needs the streaming sums of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from moe_compress.modeling import expert_weights, find_experts
from moe_compress.modeling.find import up_projection


@dataclass
class Layer:
    """One MoE layer of the teacher and the T calibration tokens that passed it.

    Attributes:
        name: of the experts module.
        module: the experts module.
        weights: projection to [E, out, in], fp32.
        inputs: [T, H].
        chosen: [T, k] experts of each token.
        gates: [T, k] routing weights.
        router_logits: [T, E].
        gradients: [T, H], of the negative log-likelihood of a token sampled from the teacher at each position, with
            respect to the output of the layer's experts: their outer products sum to the Fisher information.
    """

    name: str
    module: Any
    weights: dict[str, Tensor]
    inputs: Tensor
    chosen: Tensor
    gates: Tensor
    router_logits: Tensor
    gradients: Tensor
    _cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def up_name(self) -> str:
        return up_projection(self.module)

    @property
    def num_experts(self) -> int:
        return len(self.weights["down_proj"])

    @property
    def interleaved(self) -> bool:
        return not self.module.is_concatenated

    @property
    def gate_count(self) -> int:
        """Rows of the up projection per neuron."""
        return 2 if self.module.has_gate else 1

    def counts(self) -> Tensor:
        """[E] tokens routed to each expert."""
        return torch.bincount(self.chosen.flatten(), minlength=self.num_experts)[: self.num_experts]

    def routed(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens [n] routed to an expert and their routing weights [n]."""
        tokens, slots = (self.chosen == expert).nonzero(as_tuple=True)
        return tokens, self.gates[tokens, slots]

    def activate(self, inner: Tensor) -> Tensor:
        """The experts' own gate or activation, [n, G * I] to [n, I]."""
        return self.module._apply_gate(inner) if self.module.has_gate else self.module.act_fn(inner)

    def outputs(self, expert: int, inputs: Tensor) -> Tensor:
        """What an expert makes of inputs [n, H], without routing weights: [n, H]."""
        hidden = self.activate(inputs @ self.weights[self.up_name][expert].mT)
        return hidden @ self.weights["down_proj"][expert].mT

    def seen(self, expert: int) -> dict[str, tuple[Tensor, Tensor]]:
        """For each projection, the inputs [n, in] of an expert and the gradients [n, out] of its outputs.

        The gradients have the routing weights in them.
        """
        tokens, gates = self.routed(expert)
        inputs = self.inputs[tokens]
        below = self.gradients[tokens] * gates[:, None]
        with torch.enable_grad():
            inner = (inputs @ self.weights[self.up_name][expert].mT).requires_grad_()
            hidden = self.activate(inner)
            (above,) = torch.autograd.grad(hidden, inner, below @ self.weights["down_proj"][expert])
        return {self.up_name: (inputs, above), "down_proj": (hidden.detach(), below)}

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def grams(self, projection: str) -> Tensor:
        """[E, in, in]: sum of x x^T over the tokens of each expert."""

        def make() -> Tensor:
            found = []
            for expert in range(self.num_experts):
                inputs = self.inputs[self.routed(expert)[0]]
                if projection == "down_proj":
                    inputs = self.activate(inputs @ self.weights[self.up_name][expert].mT)
                found.append(inputs.mT @ inputs)
            return torch.stack(found)

        return self.kept(("grams", projection), make)


@torch.enable_grad()
def collect_layers(teacher: Any, rows: Tensor, batch_size: int = 8, seed: int = 0) -> list[Layer]:
    """Run calibration text [N, L] through the teacher, forward and backward, and keep what each MoE layer saw."""
    generator = torch.Generator().manual_seed(seed)
    records: dict[str, dict[str, list[Tensor]]] = {}
    handles = []

    def watch(name: str, experts: Any) -> None:
        kept = records[name] = {key: [] for key in ("inputs", "chosen", "gates", "router_logits", "gradients")}
        parent = teacher.get_submodule(name.rpartition(".")[0])

        def before(_: Any, arguments: Any) -> None:
            for key, value in zip(("inputs", "chosen", "gates"), arguments, strict=True):
                kept[key].append(value.detach().clone())

        def after(_: Any, __: Any, output: Tensor) -> None:
            output.register_hook(lambda gradient: kept["gradients"].append(gradient.detach().clone()))

        def route(_: Any, __: Any, output: Any) -> None:
            kept["router_logits"].append(output[0].detach().reshape(-1, output[0].shape[-1]).clone())

        handles.extend([experts.register_forward_pre_hook(before), experts.register_forward_hook(after)])
        router = find_router(parent, experts.num_experts)
        handles.append(router.register_forward_hook(route))

    found = find_experts(teacher)
    teacher.eval()
    wanted = [(parameter, parameter.requires_grad) for parameter in teacher.parameters()]
    try:
        for each in found:
            watch(each.name, each.module)
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        # So that gradients reach every layer's output without any parameter's being formed.
        embeddings = teacher.get_input_embeddings()
        handles.append(embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_()))
        for batch in rows.split(batch_size):
            logits = teacher(input_ids=batch, use_cache=False).logits.flatten(0, 1).float()
            log_probs = log_softmax(logits, -1)
            sampled = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
            (-log_probs.gather(-1, sampled).sum()).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
    return [
        Layer(
            each.name,
            each.module,
            {name: weight.float() for name, weight in expert_weights(each.module).items()},
            *(torch.cat(values) for values in records[each.name].values()),
        )
        for each in found
    ]


def find_router(block: Any, experts: int) -> Any:
    """The router of an MoE block: the child with one row of weights for each expert.

    Raises:
        ValueError: there is none, or several.
    """
    found = [
        child
        for child in block.children()
        if getattr(getattr(child, "weight", None), "ndim", 0) == 2 and child.weight.shape[0] == experts
    ]
    if len(found) != 1:
        raise ValueError(f"{type(block).__name__} has {len(found)} children that look like a router")
    return found[0]
