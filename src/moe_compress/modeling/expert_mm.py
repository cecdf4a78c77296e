"""Rows times the matrices of their own experts: the product that the low-rank part is made of, in four ways.

* `batched`, on a CPU in 16-bit types: one batched GEMM over as many rows of every expert; each thread has whole
  experts, where a GEMM per expert is split among the threads, which wait for each other each time.
* `grouped`: a GEMM per expert over its sorted rows; elsewhere, and for the rows that are left.
* `bagged`, on a CPU: each output is a sum of rows of the expert's matrix, weighted by the input, which is what
  `embedding_bag` computes: it reads the matrices of the chosen experts where they lie, at several times the speed of
  a GEMM of one row in 16-bit types, and leaves the other experts alone.
* `gathered`, on a GPU: a copy of the chosen matrices and one batched GEMM: few launches, no sort (or `triton_mm`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compress.modeling import onednn
from moe_compress.modeling.grouped_mm import grouped_mm
from moe_compress.modeling.routing import Routing

# Bags beat other ways up to so many rows per expert; where GEMMs of few rows are slow up to so many, and up to so much
# of their square times the values of a matrix: each row costs a bag its whole matrix, if only the first from memory;
# what a GEMM costs anyway is little beside a large one (measured, see docs/SPEED.md).
_BAGGED_ROWS_PER_EXPERT = {"fast": 2, "slow": 32}
_BAGGED_WORK = 2**26
# Values copied by gathering, up to which the copy hides behind the launches of the sort and a dozen small kernels.
_GATHERED_VALUES = 2**24
# Off unless asked for: the kernel has not been run on a GPU yet.
_TRITON = os.environ.get("MOE_COMPRESS_TRITON") == "1" and find_spec("triton") is not None
# Rows of a batched GEMM that take as long as beginning a GEMM of one expert, in 16-bit types (measured with AMX, and on
# an AMD EPYC with AVX-512).
_ROWS_PER_GEMM = {"AMX": 192, "other": 64}
_SHORT = (torch.bfloat16, torch.float16)
_AMX = bool(torch.cpu.get_capabilities().get("amx_tile"))


def by_row(rows: int, weight: Tensor) -> bool:
    """Whether few enough rows [S] go through `weight` [E, in, out] that each is better multiplied by itself."""
    experts, values = weight.shape[0], weight.shape[1] * weight.shape[2]
    if weight.device.type == "cpu":
        if torch.is_grad_enabled():  # the gradient of a bag is slow
            return False
        if _fast_with_few_rows(weight):
            return rows <= _BAGGED_ROWS_PER_EXPERT["fast"] * experts
        return rows <= _BAGGED_ROWS_PER_EXPERT["slow"] * experts and rows**2 * values <= _BAGGED_WORK * experts**2
    return rows * values <= _GATHERED_VALUES


def row_rounding(rows: int, sides: Sequence[Tensor], *, batched: bool) -> int:
    """To what the number of rows of each expert is rounded up, for GEMMs with `sides`.

    On a CPU oneDNN compiles a kernel for each number of rows, in half a millisecond and half a megabyte, and keeps 1024
    of them. Experts see another number each time, and layers whose ranks differ have kernels of their own; with a few
    numbers of rows all of a model's kernels are kept. Some 6 % more rows are multiplied. With AMX, which multiplies
    tiles of 16 rows, numbers other than a few tiles or an even number of them take oneDNN up to three times as long.

    Args:
        rows: of all experts together.
        sides: [E, in, out] each, what the rows are multiplied with.
        batched: whether a batched GEMM takes rows, see `rows_per_gemm`.
    """
    experts = sides[0].shape[0]
    if not batched and torch.is_grad_enabled():  # the rows that fill up are not for gradients
        return 1
    if not any(_by_onednn(rows // experts, side) for side in sides):
        return 1
    if batched and _AMX:
        return 32 if rows >= 12 * experts else 16
    return max(8, 2 ** ((rows // experts // 8).bit_length() - 1)) if rows >= 8 * experts else 8


def rows_per_gemm(weight: Tensor) -> int:
    """What beginning a GEMM costs, in rows of a batched one that takes rows as far as their numbers are alike; or 0.

    How far is decided by the numbers, so not where reading them would wait for a device or break a graph. In fp32 MKL's
    batched GEMM is not faster than one per expert, for gradients slower, and oneDNN has none.
    """
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return 0
    if onednn.product_dtype(weight) not in _SHORT:
        return 0
    return _ROWS_PER_GEMM["AMX" if _AMX else "other"]


def _fast_with_few_rows(weight: Tensor) -> bool:
    """Whether GEMMs of few rows are fast: batched ones with AMX, and those of MKL on the CPUs of its maker."""
    of_mkl = weight.dtype == torch.float32 and onednn.MKL_AT_HOME and not torch.compiler.is_compiling()
    return of_mkl or (_AMX and rows_per_gemm(weight) > 0)


def _by_onednn(rows: int, side: Tensor) -> bool:
    if onednn.product_dtype(side) in _SHORT:
        return side.device.type == "cpu"
    return onednn.takes(rows, side)


def expert_mm(rows: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """`x weight_e` of every row x, where e is the row's expert.

    Args:
        rows: [S, in], in the order of the routing's rows.
        weight: [E, in, out]; fastest when contiguous.

    Returns:
        [S, out].
    """
    if not routing.by_row:
        return _sorted(rows, weight, routing)
    if _uses_triton(rows):
        from moe_compress.modeling.triton_mm import row_mm

        return row_mm(rows, weight, routing.experts)
    if rows.device.type == "cpu" and not torch.is_grad_enabled():
        return _bagged(rows, weight, routing.experts)
    return torch.bmm(rows.unsqueeze(1), weight[routing.experts]).squeeze(1)


def out_side(inner: Tensor, delta_out: Tensor, routing: Routing, *, scale: Tensor | None = None) -> Tensor:
    """The second half of a low-rank product: the inner values of every row times `delta_out_e`; 0 for padding.

    Args:
        inner: [S, R], what `expert_mm` makes of the rows; overwritten where no gradient needs it.
        delta_out: [E, R, out].
        scale: [S, 1], a factor for each row.

    Returns:
        [S, out].
    """
    if routing.by_row and _uses_triton(inner):
        from moe_compress.modeling.triton_mm import row_mm

        return row_mm(inner, delta_out, routing.experts, scale=scale, padding=routing.padding)
    if torch.is_grad_enabled():
        inner = (inner if scale is None else inner * scale).masked_fill(routing.padding, 0.0)
    else:  # in place: no buffers to fill
        inner = (inner if scale is None else inner.mul_(scale)).masked_fill_(routing.padding, 0.0)
    return expert_mm(inner, delta_out, routing)


def _sorted(rows: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    experts, capacity = weight.shape[0], routing.capacity
    if not capacity:
        return _grouped(rows, weight, routing)
    batched = experts * capacity
    front, rest = rows[:batched].view(experts, capacity, -1), rows[batched:]
    if not len(rest):
        return torch.bmm(front, weight).flatten(0, 1)
    if torch.is_grad_enabled():
        return torch.cat([torch.bmm(front, weight).flatten(0, 1), _grouped(rest, weight, routing)])
    out = rows.new_empty(len(rows), weight.shape[2])  # the large part of which is then not copied once more
    torch.bmm(front, weight, out=out[:batched].view(experts, capacity, -1))
    out[batched:] = _grouped(rest, weight, routing)
    return out


def _grouped(rows: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    # Only rounded numbers of rows: oneDNN compiles a kernel for each.
    if routing.rounded and onednn.takes(rows.shape[0] // weight.shape[0], weight):
        return onednn.grouped_linear(rows, weight, routing.offsets)
    return grouped_mm(rows, weight, routing.offsets)


def _uses_triton(rows: Tensor) -> bool:
    return _TRITON and rows.device.type == "cuda" and not torch.is_grad_enabled()


def _bagged(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    count, in_features, out_features = weight.shape
    dtype = torch.int32 if count * in_features < 2**31 else torch.int64
    first = torch.arange(in_features, dtype=dtype, device=experts.device)
    # One operation for the products and the sums: for one token, launching operations is a tenth of the time.
    index = torch.add(first, experts.to(dtype)[:, None], alpha=in_features)
    return F.embedding_bag(index, weight.reshape(-1, out_features), per_sample_weights=rows, mode="sum")
