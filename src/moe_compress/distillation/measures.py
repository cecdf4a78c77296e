"""Measures of a training step for the log: gradient norms by kind of parameter, and memory."""

from __future__ import annotations

import re
import resource
import sys

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_KINDS = (
    ("factors", re.compile(r"\.experts\.\w*proj_(?!bias)\w+$")),  # of the experts, or a basis that they share
    ("cores", re.compile(r"\.experts\.\w*proj$")),
    ("routers", re.compile(r"\.(gate|router)\.")),
)


def kind_of(name: str) -> str:
    """`factors`, `cores`, `routers` or `others`, from a parameter's name."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "others")


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norm of the gradients of each kind of parameter that has any, as they are now."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(kind_of(name), []).append(parameter.grad)
    return {kind: _number(torch.nn.utils.get_total_norm(tensors)) for kind, tensors in gradients.items()}


def _number(norm: Tensor) -> float:
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def memory_bytes() -> int:
    """The most memory that this process has needed: on its GPU, or without one in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
