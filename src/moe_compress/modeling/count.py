"""Counting parameters and bytes of original and compressed models, in all and per token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moe_compress.modeling.experts import SharedCoreExperts
from moe_compress.modeling.find import experts_per_token, is_experts


@dataclass(frozen=True)
class ParameterCount:
    """Sizes of a model.

    Attributes:
        total: all parameters; tied ones (embedding and output head) count once.
        expert: those of the experts modules: cores, factors and biases, or the original weights.
        active: what one token uses: everything outside the experts, embedding and output head included in full, as
            model cards count it ("30B-A3B"), and in each MoE layer k experts, or their factors and the cores that
            they use, at most k.
        total_bytes, expert_bytes, active_bytes: the same in bytes, of the dtypes in memory.
    """

    total: int
    expert: int
    active: int
    total_bytes: int
    expert_bytes: int
    active_bytes: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count an original or a compressed model; the meta device will do.

    Raises:
        UserError: an MoE layer that does not say how many experts a token gets.
    """
    total = total_bytes = 0
    for parameter in model.parameters():  # each tied parameter once
        total += parameter.numel()
        total_bytes += parameter.numel() * parameter.element_size()
    expert = expert_bytes = idle = idle_bytes = 0
    for name, module in model.named_modules():
        compressed = isinstance(module, SharedCoreExperts)
        if not compressed and not is_experts(module):
            continue
        top_k = experts_per_token(model, name)
        for leaf, parameter in module.named_parameters(recurse=False):
            size = parameter.numel()
            expert += size
            expert_bytes += size * parameter.element_size()
            shared = module.shared_parts(leaf) if isinstance(module, SharedCoreExperts) else None
            units = parameter.shape[0] if shared is None else shared
            unused = size - size // units * min(top_k, units) if units else 0
            idle += unused
            idle_bytes += unused * parameter.element_size()
    return ParameterCount(total, expert, total - idle, total_bytes, expert_bytes, total_bytes - idle_bytes)
