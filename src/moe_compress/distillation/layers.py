"""What happens inside the MoE layers of teacher and student: terms of the loss that compare routers and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.errors import UserError
from moe_compress.modeling.experts import SharedCoreExperts
from moe_compress.modeling.find import is_experts


class LayerRecorder:
    """Records, during a forward pass, what the routers and the decoder layers around the experts of a model return.

    Args:
        model: an original or compressed model.
        routers: whether router logits are recorded.
        hidden: whether the outputs of the decoder layers are.
    """

    def __init__(self, model: nn.Module, *, routers: bool, hidden: bool) -> None:
        self.router_logits: list[Tensor] = []
        self.hidden: list[Tensor] = []
        self._recording = False
        self._layers = 0
        for name, module in list(model.named_modules()):
            if not (is_experts(module) or isinstance(module, SharedCoreExperts)):
                continue
            self._layers += 1
            if routers:
                self._watch_routers(model, name, module)
            if hidden:
                _decoder_layer(model, name).register_forward_hook(self._on_layer)
        self._routers = routers
        self._label = type(model).__name__

    def _watch_routers(self, model: nn.Module, name: str, experts: Any) -> None:
        def on_router(module: nn.Module, arguments: Any, output: Any) -> None:
            logits = output[0] if isinstance(output, tuple) else output
            if self._recording and isinstance(logits, Tensor) and logits.shape[-1] == experts.num_experts:
                self.router_logits.append(logits.reshape(-1, experts.num_experts))

        for child_name, child in model.get_submodule(name.rpartition(".")[0]).named_children():
            if ("gate" in child_name or "router" in child_name) and "shared" not in child_name:
                child.register_forward_hook(on_router)

    def _on_layer(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._recording:
            self.hidden.append(output[0] if isinstance(output, tuple) else output)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward pass in this block, and nothing later (such as what checkpointing computes again).

        Raises:
            UserError: the routers of the architecture do not return their logits.
        """
        self.router_logits, self.hidden = [], []
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
        if self._routers and len(self.router_logits) != self._layers:
            raise UserError(
                f"distillation.loss.router_weight: {self._label} has {self._layers} MoE layers, but "
                f"{len(self.router_logits)} of their routers return logits; set it to 0 for this architecture"
            )


def _decoder_layer(model: nn.Module, name: str) -> nn.Module:
    """The element of the outermost list of layers that a module is in."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            return model.get_submodule(".".join(parts[: depth + 1]))
    raise UserError(f"distillation.loss.hidden_weight: {name} is in no list of layers; set it to 0")


def router_divergence(student: list[Tensor], teacher: list[Tensor], rows: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax over the experts, the mean over layers, summed over the tokens `rows`.

    Args:
        student, teacher: for each layer, router logits `[tokens, experts]`.
        rows: int64 `[n]`.
    """
    total = torch.zeros((), device=rows.device)
    for mine, theirs in zip(student, teacher, strict=True):
        log_q = mine.index_select(0, rows).float().log_softmax(-1)
        log_p = theirs.index_select(0, rows).float().log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    return total / len(student)


def hidden_error(student: list[Tensor], teacher: list[Tensor], rows: Tensor) -> Tensor:
    """Squared distance of the hidden states over the teacher's squared norm, mean over layers, sum over tokens `rows`.

    Relative to each token's own norm, because a few tokens have norms a hundred times larger than all others.

    Args:
        student, teacher: for each layer, hidden states `[batch, length, hidden]`.
        rows: places in the flattened batch, int64 `[n]`.
    """
    total = torch.zeros((), device=rows.device)
    for mine, theirs in zip(student, teacher, strict=True):
        one = mine.flatten(0, 1).index_select(0, rows).float()
        other = theirs.flatten(0, 1).index_select(0, rows).float()
        distance = (one - other).square().sum(-1)
        total = total + (distance / other.square().sum(-1).clamp_min(1e-12)).sum()
    return total / len(student)
