"""Grouped GEMM of rows sorted by group: PyTorch's kernel where it can, for any number of features, differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The registration of `torch.ops.transformers.grouped_mm_fallback`.
from transformers.integrations import moe as _moe  # noqa: F401

from moe_compress.modeling.onednn import in_product_dtype


@in_product_dtype
def grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`x weight_g` of every row, for rows sorted by group.

    What the kernel cannot do (float64, compiled graphs other than bf16, GPUs before compute capability 8.0) goes
    through the loop that Transformers keeps for the same reason.

    Args:
        rows: [S, in].
        weight: [G, in, out], of any strides.
        offsets: int32 [G], where the rows of each group end.

    Returns:
        [S, out].
    """
    if not _kernel_can(rows):
        return torch.ops.transformers.grouped_mm_fallback(rows, weight, offsets)
    out_features = weight.shape[2]
    # The kernel wants rows of whole 16 bytes, in every operand of forward and backward.
    multiple = 16 // rows.element_size()
    rows, weight = _pad(rows, multiple, dims=(False, True)), _pad(weight, multiple, dims=(True, True))
    out = _ContiguousGradient.apply(F.grouped_mm(rows, weight, offs=offsets))
    return out if out.shape[1] == out_features else out[:, :out_features]


class _ContiguousGradient(torch.autograd.Function):
    """The identity; the kernel's backward refuses gradients with other strides, such as the expanded one of a sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def _kernel_can(rows: Tensor) -> bool:
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if torch.compiler.is_compiling() and rows.dtype != torch.bfloat16:
        return False
    return rows.device.type != "cuda" or torch.cuda.get_device_capability(rows.device) >= (8, 0)


def _pad(tensor: Tensor, multiple: int, dims: tuple[bool, bool]) -> Tensor:
    """Zeros at the end of the chosen ones of the last two dimensions, up to a multiple."""
    rows, columns = (-size % multiple if chosen else 0 for size, chosen in zip(tensor.shape[-2:], dims, strict=True))
    return F.pad(tensor, (0, columns, 0, rows)) if rows or columns else tensor
