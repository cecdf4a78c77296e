"""Where each token goes: rows of (token, chosen expert) pairs, and the two ways between tokens and rows.

A *row* is one (token, chosen expert) pair; S = T * k rows. They lie in the order of the tokens, or sorted by expert,
once, for both projections. Nothing here waits for a device other than the CPU.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing:
    """Where each row goes.

    Attributes:
        by_row: whether each row is multiplied by itself (see `expert_mm`).
        rounded: whether rows are rounded, see below.
        tokens: [S] the row's token.
        experts: [S] the row's expert, below E also for padding.
        padding: [S, 1] whether the row stands for no expert (index >= E); such rows weigh 0.
        weights: [S, 1] routing weights.
        capacity: how many rows of each expert come first, [E, capacity], for a batched GEMM; 0 if not batched.
        offsets: int32 [E], where the rows of each expert end among those behind them; only of sorted rows.

    Sorted rows may be rounded: every expert then has a multiple of some number of rows, and batched: every expert then
    has at least `capacity` of them. The rows that fill up stand for no expert. Unless they are batched there are at
    most so many that S is known without looking at the index, and the last ones belong to none.
    """

    offsets: Tensor
    capacity: int = 0

    def __init__(
        self,
        index: Tensor,
        weights: Tensor,
        num_experts: int,
        *,
        by_row: bool = False,
        round_to: int = 1,
        rows_per_gemm: int = 0,
    ) -> None:
        """`index` and `weights` are [T, k]; an index of `num_experts` or more is padding.

        Rows are batched if `rows_per_gemm` is given: how many rows of a batched GEMM cost as much as beginning another.
        Rows that are rounded but not batched are not for gradients: nothing is known of what the last ones hold.
        """
        self.num_tokens, self.top_k = index.shape
        self.num_experts = num_experts
        self.by_row = by_row
        self.rounded = round_to > 1
        self.padded = index >= num_experts  # [T, k]
        # Padding goes to the last expert with weight 0: every row stays defined and no kernel has a tail to skip.
        self.index = index.clamp(max=num_experts - 1)
        self.index_weights = weights.masked_fill(self.padded, 0.0)
        self._inverse: Tensor | None = None  # [S] where each token's rows are, unless they lie in the tokens' order
        # Rows that are multiplied one by one meet an expert's matrix in the cache again if they are sorted, on a CPU.
        if by_row and (self.num_tokens == 1 or index.device.type != "cpu"):
            self.tokens = torch.arange(self.num_tokens, device=index.device).repeat_interleave(self.top_k)
            self.experts = self.index.flatten()
            self.padding, self.weights = self.padded.reshape(-1, 1), self.index_weights.reshape(-1, 1)
        else:
            self._sort(round_to, rows_per_gemm)

    def _sort(self, round_to: int, rows_per_gemm: int) -> None:
        self.experts, order = self.index.flatten().sort(stable=True)
        boundaries = torch.arange(self.num_experts, device=order.device)
        # Rows of experts up to e: unlike bincount this needs no maximum from the device.
        ends = torch.searchsorted(self.experts, boundaries, right=True, out_int32=True)
        places = torch.arange(order.numel(), device=order.device)
        self.tokens = order // self.top_k
        self.padding = self.padded.flatten()[order, None]
        self.weights = self.index_weights.flatten()[order, None]
        self.offsets = ends
        if round_to > 1 or rows_per_gemm:
            counts = ends.diff(prepend=ends.new_zeros(1))
            if rows_per_gemm:
                self.capacity = best_capacity(counts.tolist(), round_to, rows_per_gemm)
            front = self.num_experts * self.capacity
            behind = ((counts - self.capacity).clamp(min=0) + round_to - 1) // round_to * round_to
            self.offsets = behind.cumsum(0, dtype=torch.int32)
            number = places - (ends - counts)[self.experts]  # of a row among those of its expert
            fitting, fewer = boundaries * self.capacity, self.offsets - behind + front - self.capacity
            places = number + torch.where(number < self.capacity, fitting[self.experts], fewer[self.experts])
            size = order.numel() + (round_to - 1) * min(self.num_experts, order.numel())
            if rows_per_gemm:
                size = front + int(self.offsets[-1])
            self.tokens, self.experts = (
                values.new_zeros(size).scatter_(0, places, values) for values in (self.tokens, self.experts)
            )
            self.padding, self.weights = (
                values.new_full((size, 1), fill).index_copy_(0, places, values)
                for values, fill in ((self.padding, 1), (self.weights, 0))
            )
        self._inverse = torch.empty_like(order).scatter_(0, order, places)

    def spread(self, values: Tensor) -> Tensor:
        """Each token's values for each of its rows: [T, d] to [S, d]."""
        if self._inverse is None:
            return values.unsqueeze(1).expand(-1, self.top_k, -1).reshape(-1, values.shape[1])
        if not torch.is_grad_enabled():
            return values.index_select(0, self.tokens)
        return _Spread.apply(values, self.tokens, self._inverse, self.top_k)

    def collect(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """The sum over the k rows of each token, of each row times its weight: [S, d] and [S, 1] to [T, d]."""
        if weights is not None:
            weights = weights.to(rows.dtype)
        if torch.is_grad_enabled():
            return _Collect.apply(rows, weights, self.tokens, self._inverse, self.top_k)
        return _collect(rows, weights, self._inverse, self.top_k)

    def dense_weights(self) -> Tensor:
        """The routing weights as a matrix [T, E], zero where a token does not go."""
        zeros = self.index_weights.new_zeros(self.num_tokens, self.num_experts)
        return zeros.scatter_add(1, self.index, self.index_weights)


def best_capacity(counts: Sequence[int], multiple: int, rows_per_gemm: int) -> int:
    """How many rows of each expert a batched GEMM should take, so that it and a GEMM for each of the rest are fastest.

    Args:
        counts: rows of each expert.
        multiple: what the rows of an expert are rounded up to.
        rows_per_gemm: what beginning a GEMM costs, in rows of the batched one.

    Returns:
        A multiple of `multiple`; 0 if a GEMM per expert is best for all.
    """
    ascending = sorted(counts)
    sums = [0, *accumulate(ascending)]

    def cost(capacity: int) -> int:
        fitting = bisect_right(ascending, capacity)
        larger = len(ascending) - fitting
        behind = sums[-1] - sums[fitting] - larger * capacity
        return len(ascending) * capacity + larger * rows_per_gemm + behind

    return min(sorted({0, *(-(-count // multiple) * multiple for count in ascending)}), key=cost)


def _collect(rows: Tensor, weights: Tensor | None, inverse: Tensor | None, top_k: int) -> Tensor:
    # Gather and sum instead of index_add: deterministic, and 16-bit types are summed in fp32.
    if inverse is not None:
        weights = None if weights is None else weights.index_select(0, inverse)
        if rows.device.type == "cpu" and rows.dtype != torch.float64:
            # All at once, which is ten times faster than writing the gathered rows out.
            bags = inverse.view(-1, top_k)
            shares = None if weights is None else weights.view(-1, top_k)
            return F.embedding_bag(bags, rows.contiguous(), per_sample_weights=shares, mode="sum")
        rows = rows.index_select(0, inverse)
    rows = rows.reshape(-1, top_k, rows.shape[1])
    return rows.sum(dim=1) if weights is None else torch.bmm(weights.view(-1, 1, top_k), rows).squeeze(1)


class _Spread(torch.autograd.Function):
    """Copies of tokens for their rows; its gradient is their sum, without the slow `index_put` of indexing."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, tokens: Tensor, inverse: Tensor | None, top_k: int) -> Tensor:
        ctx.routing = tokens, inverse, top_k
        return values.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Collect.apply(gradient, None, *ctx.routing), None, None, None


class _Collect(torch.autograd.Function):
    """Weighted sums of each token's rows; the gradient of a row is its token's, times its weight."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor | None, tokens: Tensor, inverse: Tensor | None, top_k: int
    ) -> Tensor:
        ctx.routing = tokens, inverse, top_k
        if weights is not None:
            ctx.save_for_backward(rows, weights)
        return _collect(rows, weights, inverse, top_k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        spread = _Spread.apply(gradient, *ctx.routing)
        saved = ctx.saved_tensors  # read once: activation checkpointing allows no more
        if not saved:
            return spread, None, None, None, None
        rows, weights = saved
        of_weights = (spread * rows).sum(dim=1, keepdim=True) if ctx.needs_input_grad[1] else None
        return spread * weights, of_weights, None, None, None
