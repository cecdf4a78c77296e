"""A Triton kernel for the low-rank part of few rows on a GPU: each row times the matrix of its own expert.

Against gathering it saves the copy of the chosen matrices, and the launches of scaling and masking; against grouped
GEMMs the sort. It has been run in Triton's interpreter only, not on a GPU, so it is used only where the environment
variable MOE_COMPRESS_TRITON is 1. This module needs Triton, which comes with PyTorch's CUDA builds; `expert_mm` imports
it when it is wanted.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]
    rows, weight, out, experts, scale, padding, in_features, out_features,
    HAS_SCALE: tl.constexpr, HAS_PADDING: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """One row and BLOCK_OUT of its outputs: a sum of rows of the expert's matrix, weighted by the row's values."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    expert = tl.load(experts + row).to(tl.int64)
    matrix = weight + expert * in_features * out_features
    total = tl.zeros((BLOCK_OUT,), dtype=tl.float32)
    for start in range(0, in_features, BLOCK_IN):
        inputs = start + tl.arange(0, BLOCK_IN)
        x = tl.load(rows + row.to(tl.int64) * in_features + inputs, mask=inputs < in_features, other=0.0)
        mask = (inputs < in_features)[:, None] & (columns < out_features)[None, :]
        w = tl.load(matrix + inputs[:, None] * out_features + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(x.to(tl.float32)[:, None] * w.to(tl.float32), axis=0)
    if HAS_SCALE:
        total *= tl.load(scale + row).to(tl.float32)
    if HAS_PADDING:  # selected, not multiplied: what a row without an expert computed may be infinite
        total = tl.where(tl.load(padding + row), 0.0, total)
    place = out + row.to(tl.int64) * out_features + columns
    tl.store(place, total.to(out.dtype.element_ty), mask=columns < out_features)


def row_mm(
    rows: Tensor, weight: Tensor, experts: Tensor, *, scale: Tensor | None = None, padding: Tensor | None = None
) -> Tensor:
    """`scale x weight_e` of every row x, and 0 for padding; accumulated in fp32, without gradient.

    Args:
        rows: [S, in].
        weight: [E, in, out].
        experts: [S], the expert of each row.
        scale: [S, 1].
        padding: [S, 1], bool.

    Returns:
        [S, out].
    """
    rows, weight = rows.contiguous(), weight.contiguous()
    (count, in_features), out_features = rows.shape, weight.shape[2]
    out = torch.empty(count, out_features, dtype=rows.dtype, device=rows.device)
    block_out = min(64, triton.next_power_of_2(out_features))
    grid = (count, triton.cdiv(out_features, block_out))
    # Triton launches on the current GPU, which need not be this layer's (Inductor sees to that itself).
    with nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(rows):
        _row_kernel[grid](
            rows, weight, out, experts, rows if scale is None else scale.contiguous(),
            experts if padding is None else padding.contiguous(), in_features, out_features,
            HAS_SCALE=scale is not None, HAS_PADDING=padding is not None, BLOCK_IN=64, BLOCK_OUT=block_out,
        )  # fmt: skip
    return out
