"""Where tokens go: counts per expert while a model runs, their entropy, and overlap with another model's choice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.modeling.experts import SharedCoreExperts
from moe_compress.modeling.find import is_experts


@dataclass
class LayerRouting:
    """The routing of one MoE layer: how often each expert was chosen, and the last choice made.

    Attributes:
        experts: number of experts E.
        counts: `[E]`, int64, how often each was chosen.
        top_k: experts per token, 0 before the first token.
        last: `[T, k]`, the choice in the last forward pass.
    """

    experts: int
    counts: Tensor = field(init=False)
    top_k: int = 0
    last: Tensor | None = None

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.experts, dtype=torch.int64)

    def add(self, chosen: Tensor) -> None:
        """Count the choice `[T, k]` of one forward pass (an index of E is padding and is not counted)."""
        self.top_k = chosen.shape[-1]
        self.last = chosen
        self.counts += torch.bincount(chosen.flatten(), minlength=self.experts)[: self.experts].cpu()

    def entropy(self) -> float:
        """Entropy of the load over that of an even load: 1 is balanced, 0 is one expert for all."""
        load = self.counts.double() / self.counts.sum().clamp(min=1)
        return float(-torch.special.xlogy(load, load).sum() / math.log(self.experts)) if self.experts > 1 else 1.0

    def largest_load(self) -> float:
        """Load of the busiest expert, in multiples of a fair share."""
        return float(self.counts.max() * self.experts / self.counts.sum().clamp(min=1))

    def of_row(self, row: int, rows: int) -> Tensor:
        """The choice `[L, k]` for one of the rows of the last forward pass."""
        if self.last is None:
            raise ValueError("no forward pass was recorded")
        return self.last.view(rows, -1, self.top_k)[row]


def overlap(ours: LayerRouting, theirs: Tensor) -> float:
    """Share of the experts chosen in the last forward pass that another model chose as well, mean over tokens.

    Args:
        ours: the routing.
        theirs: `[T, k]`, the other model's choice for the same tokens, perhaps of more experts.
    """
    if ours.last is None:
        raise ValueError("no forward pass was recorded")

    width = max(ours.experts, int(theirs.max())) + 1

    def mask(chosen: Tensor) -> Tensor:
        return torch.zeros(len(chosen), width, device=chosen.device).scatter_(1, chosen, 1.0)

    return float((mask(ours.last) * mask(theirs.to(ours.last.device))).sum(-1).mean() / ours.top_k)


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[dict[str, LayerRouting]]:
    """Record the routing of every MoE layer, original or compressed, while the block runs.

    Yields:
        Module name to its `LayerRouting`; empty for a model without experts.
    """
    with ExitStack() as stack:
        layers: dict[str, LayerRouting] = {}
        for name, module in expert_modules(model).items():
            layers[name] = routing = LayerRouting(int(module.num_experts))  # type: ignore[arg-type]

            def hook(_: nn.Module, args: Any, kwargs: Any, routing: LayerRouting = routing) -> None:
                routing.add(kwargs["top_k_index"] if "top_k_index" in kwargs else args[1])

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield layers


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The experts module of every MoE layer by name, compressed or not; empty for a model without experts."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SharedCoreExperts) or is_experts(module)
    }
