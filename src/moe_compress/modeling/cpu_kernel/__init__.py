"""The forward pass of a compressed layer on a CPU in C++, without gradient: what `SharedCoreExperts` does, faster.

Each thread takes some rows of one expert through all products, so that what lies between them stays in its cache
(see `experts.cpp`). PyTorch's operations are the reference, and take over where this does not: with gradients, in
compiled graphs, for several cores or biases, on other systems, and where there is no compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations import moe

from moe_compress.factorization.factors import DeltaFactors
from moe_compress.modeling.cpu_kernel.build import library
from moe_compress.modeling.onednn import linear

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SPARE_ROWS = 128  # behind the values, which are read in rounded numbers
_UP, _DOWN, _OUT = range(3)
_SIZES = ("tokens", "top_k", "experts", "seen_width", "up_rank", "up_width", "intermediate", "down_rank", "hidden")
_POINTERS = ("order", "ends", "weights", "seen", "base", "up_in", "up_out", "down_in", "down_out", "before_gate")


class _Call(ctypes.Structure):
    """The same as in `call.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_SIZES, "threads")),
        *((name, ctypes.c_void_p) for name in (*_POINTERS, "gated", "values", "out")),
    ]


def takes(tokens: Tensor, up: DeltaFactors, down: DeltaFactors) -> bool:
    """Whether `forward` is for these tokens [T, H] and factors, and there is a kernel."""
    if tokens.device.type != "cpu" or tokens.dtype not in _TYPES:
        return False
    if any(type(given) is not Tensor for given in (tokens, up.delta_in, down.delta_in)):  # distributed, or only traced
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if up.cores > 1 or down.cores > 1 or down.basis is not None or not (up.delta_rank and down.delta_rank):
        return False
    return multiplied_type(tokens.dtype) is not None


@cache
def multiplied_type(stored: torch.dtype) -> torch.dtype | None:
    """The type in which values of a type are multiplied: its own, or fp32; None without a kernel."""
    kernel = library()
    if kernel is None:
        return None
    return next((dtype for dtype in (stored, torch.float32) if kernel.multiplies(_TYPES[dtype])), None)


def computes_gate(layer: nn.Module) -> bool:
    """Whether the kernel computes the gate of a `SharedCoreExperts` itself: SiLU, in Transformers' default."""
    default = getattr(moe, "_default_apply_gate", None)
    is_default = default is not None and getattr(layer.original_class, "_apply_gate", None) is default
    return is_default and isinstance(getattr(layer, "act_fn", None), nn.SiLU | SiLUActivation)


def forward(
    tokens: Tensor,
    index: Tensor,
    weights: Tensor,
    up: DeltaFactors,
    down: DeltaFactors,
    gate: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The weighted sum of each token's experts.

    Args:
        tokens: [T, H], of the factors' type.
        index: [T, k] experts; E and more are padding, which adds nothing.
        weights: [T, k] routing weights.
        up, down: of the projections, with at most one core each.
        gate: [S, G*I] to [S, I]; None is SiLU of the first half times the second.

    Returns:
        [T, H].
    """
    kernel, stored = library(), tokens.dtype
    multiplied = multiplied_type(stored)
    assert kernel is not None and multiplied is not None
    (number, top_k), experts = index.shape, up.delta_out.shape[0]
    rows, intermediate = number * top_k, down.delta_in.shape[2]
    index, shares = index.contiguous(), weights.float().contiguous()
    order, ends = torch.empty(rows, dtype=torch.int64), torch.empty(experts, dtype=torch.int64)
    chosen = kernel.sort_rows(
        _pointer(index), ctypes.c_int64(rows), ctypes.c_int64(experts), _pointer(order), _pointer(ends)
    )

    def per_row(width: int) -> Tensor:
        # Nothing is written for padding.
        return (torch.empty if chosen == rows else torch.zeros)(rows, width, dtype=stored)

    seen = tokens.contiguous() if up.basis is None else linear(tokens, up.basis)
    base = None if up.core is None else linear(tokens, up.core)
    sides = [side.contiguous() for side in (up.delta_in.mT, up.delta_out.mT, down.delta_in.mT, down.delta_out.mT)]
    before_gate = None if gate is None else per_row(sides[1].shape[2])
    gated = None if gate is not None or down.core is None else per_row(intermediate)
    value_stride = down.delta_rank if multiplied == torch.float32 else down.delta_rank + down.delta_rank % 2
    values = torch.empty(rows + _SPARE_ROWS, value_stride, dtype=multiplied)
    out = torch.empty(number, tokens.shape[1], dtype=stored)
    call = _Call(
        number, top_k, experts, seen.shape[1], up.delta_rank, sides[1].shape[2], intermediate, down.delta_rank,
        tokens.shape[1], torch.get_num_threads(),
        *map(_pointer, (order, ends, shares, seen, base, *sides, before_gate, gated, values, out)),
    )  # fmt: skip

    def run(step: int) -> None:
        kernel.run_step(ctypes.byref(call), step, _TYPES[stored], _TYPES[multiplied])

    run(_UP)
    if gate is not None:
        assert before_gate is not None
        gated = gate(before_gate).contiguous()
        call.gated = _pointer(gated)
        run(_DOWN)
    run(_OUT)
    if down.core is not None:
        assert gated is not None
        own = weights.masked_fill(index >= experts, 0.0).to(stored)
        bags = torch.arange(rows).view(number, top_k)
        out += linear(F.embedding_bag(bags, gated, mode="sum", per_sample_weights=own), down.core)
    return out


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
