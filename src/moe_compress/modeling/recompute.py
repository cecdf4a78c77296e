"""What the backward pass computes again instead of keeping it from the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_Result = TypeVar("_Result")


def recomputed(function: Callable[[Tensor], _Result], values: Tensor) -> _Result:
    """`function(values)`, of which the backward pass keeps `values` and nothing that the function makes of it.

    Recomputation stops at the last tensor that is needed, so a GEMM that comes last is not done again (Chen et al.
    2016, arXiv 1604.06174; PyTorch's non-reentrant checkpoint, which may be nested in that of a whole layer).

    Args:
        function: without randomness.
    """
    if not torch.is_grad_enabled():
        return function(values)
    result: _Result = checkpoint(function, values, use_reentrant=False, preserve_rng_state=False)
    return result
