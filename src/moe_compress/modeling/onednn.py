"""What oneDNN multiplies on this CPU: 16-bit types, if the CPU can, and fp32 where that is faster than PyTorch's way.

PyTorch gives fp32 GEMMs to MKL, which leaves AVX-512 unused on the CPUs of other makers than its own: oneDNN was twice
as fast there on two cores, and half as fast on Intel's (docs/SPEED.md). Without gradient and outside compiled graphs
only: the operation has no formula for the first, and Inductor makes its own choice for the second.

16-bit types that oneDNN cannot multiply here (bf16 without AVX-512, fp16 without its extension to AVX-512) are left to
plain loops of PyTorch, which took 18 times as long as a cast of both sides to fp32 and their product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
# Whether this CPU is one that MKL is made for, and else whether oneDNN is faster on it.
MKL_AT_HOME = "Intel" in str(torch.cpu.get_capabilities().get("cpu_name"))
_FASTER = (
    torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and not MKL_AT_HOME
)
_SUPPORTED = {
    torch.bfloat16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
# Multiply-adds of one product from which its speed makes up for calling it from Python (measured on two cores).
_WORTH_A_CALL = 2**21


def product_dtype(weight: Tensor) -> torch.dtype:
    """The type in which products with `weight` are made: its own, or fp32 where the CPU cannot multiply it."""
    return weight.dtype if weight.device.type != "cpu" or _SUPPORTED.get(weight.dtype, True) else torch.float32


def in_product_dtype(
    product: Callable[Concatenate[Tensor, Tensor, P], Tensor],
) -> Callable[Concatenate[Tensor, Tensor, P], Tensor]:
    """Have a function of rows and a weight (and others) multiply in `product_dtype` and return the weight's type."""

    @wraps(product)
    def cast(rows: Tensor, weight: Tensor, *others: P.args, **named: P.kwargs) -> Tensor:
        dtype = product_dtype(weight)
        if dtype == weight.dtype:
            return product(rows, weight, *others, **named)
        return product(rows.to(dtype), weight.to(dtype), *others, **named).to(weight.dtype)

    return cast


def takes(rows: int, weight: Tensor) -> bool:
    """Whether products of `rows` rows with a matrix of the last two dimensions of `weight` are oneDNN's to make."""
    if weight.device.type != "cpu" or product_dtype(weight) != torch.float32 or torch.is_grad_enabled():
        return False
    if not _FASTER or torch.compiler.is_compiling():
        return False
    return rows * weight.shape[-2] * weight.shape[-1] >= _WORTH_A_CALL


@in_product_dtype
def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows weight^T`: [n, in] and [out, in] to [n, out], of any type and on any device."""
    return _product(rows, weight) if takes(rows.shape[0], weight) else F.linear(rows, weight)


@in_product_dtype
def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`x weight_g` of every row, for rows sorted by group; see `grouped_mm`. Rows after the last group get zeros."""
    ends = offsets.tolist()  # on a CPU there is nothing to wait for
    ranges = zip([0, *ends], ends, strict=False)
    parts = [_product(rows[start:end], weight[g].mT) for g, (start, end) in enumerate(ranges) if start < end]
    parts.append(rows.new_zeros(rows.shape[0] - ends[-1], weight.shape[2]))
    return torch.cat(parts)


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
