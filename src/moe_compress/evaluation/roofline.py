"""What a machine allows: the time that the bytes and the multiplications of a MoE layer take at its measured rates.

A layer cannot be faster than the larger of two times (Williams, Waterman & Patterson 2009, "Roofline"): reading the
weights that its tokens use once, at the rate at which this machine copies memory, and multiplying, at the rate of its
largest GEMM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_compress.evaluation.timing import Timing
from moe_compress.modeling.experts import SharedCoreExperts
from moe_compress.modeling.onednn import linear

_COPIED_BYTES = 2**27  # far above any cache
_GEMM_SIZE = 2048
_COPY, _GEMM = "copy", "gemm"


@dataclass(frozen=True)
class Rates:
    """What a machine reached: bytes read and written per second when copying, FLOPs per second in one large GEMM."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Work:
    """What one forward pass of a layer cannot do without: bytes of weights to read, FLOPs (two per multiply-add)."""

    bytes: int
    flops: int

    def seconds(self, rates: Rates) -> float:
        """The least time it can take at these rates."""
        return max(self.bytes / rates.bytes_per_second, self.flops / rates.flops_per_second)


def rate_calls(dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[int], object]]:
    """A copy and a GEMM of `dtype`, with the threads that are set, for `time_interleaved`; see `rates_of`."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    matrix = torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device).to(dtype)

    @torch.inference_mode()  # where gradients are on, `linear` is left to PyTorch, which may be slower
    def gemm(_: int) -> Tensor:
        return linear(matrix, matrix)

    return {_COPY: lambda _: target.copy_(source), _GEMM: gemm}


def rates_of(timings: Mapping[str, Timing]) -> Rates:
    """The rates by the times of `rate_calls`: the quartile, not the median, for a roof is what can be reached."""
    return Rates(2 * _COPIED_BYTES / timings[_COPY].low, 2 * _GEMM_SIZE**3 / timings[_GEMM].low)


def layer_work(experts: nn.Module, index: Tensor) -> Work:
    """The work of an experts module, original or compressed (folded), for tokens routed by `index` [T, k].

    Cores are read once, and multiplied once per token where there are no more of them than experts per token.
    """
    tokens, top_k = index.shape
    chosen = index.unique().numel()
    read = multiplied = 0
    for name, parameter in experts.named_parameters(recurse=False):
        units, used, per_token = parameter.shape[0], chosen, top_k
        shared = experts.shared_parts(name) if isinstance(experts, SharedCoreExperts) else None
        if shared is not None:
            units, used, per_token = shared, min(shared, tokens * top_k), min(shared, top_k)
        if units == 0:
            continue
        size = parameter.numel() // units
        read += used * size * parameter.element_size()
        multiplied += per_token * size * (parameter.dim() > 1 and not name.endswith("_bias"))
    return Work(read, 2 * tokens * multiplied)
