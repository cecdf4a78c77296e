"""The low-rank part of the experts: two ways to send each token through the factors of its own experts.

A *row* is one (token, chosen expert) pair; S = T * k rows. `GroupedRouting` sorts the rows by expert and runs grouped
GEMMs; `GatheredRouting` keeps their order and gathers each row's own factors, which wins when there are few rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The registration of `torch.ops.transformers.grouped_mm_fallback`.
from transformers.integrations import moe as _moe  # noqa: F401

# Values copied by gathering, up to which gathering beats sorting. On a CPU the copy costs more than the sort saves
# unless it stays in the cache (measured: 1 token of a 192-wide model 0.07 against 0.14 ms, of a 2048-wide one 3.3
# against 0.3 ms); on a GPU it hides behind the launches of the sort and of a dozen small kernels.
_GATHER_LIMIT = {"cpu": 2**17}
_GATHER_LIMIT_GPU = 2**24


class Routing:
    """Where each row goes.

    Attributes:
        tokens: [S] the row's token.
        experts: [S] the row's expert, below E also for padding.
        padding: [S, 1] whether the row stands for no expert (index >= E); such rows weigh 0.
        weights: [S, 1] routing weights.
    """

    def __init__(self, index: Tensor, weights: Tensor, num_experts: int) -> None:
        """`index` and `weights` are [T, k]; an index of `num_experts` or more is padding."""
        self.num_tokens, self.top_k = index.shape
        self.num_experts = num_experts
        self.padded = index >= num_experts  # [T, k]
        # Padding goes to the last expert with weight 0: every row stays defined and no kernel has a tail to skip.
        self.index = index.clamp(max=num_experts - 1)
        self.index_weights = weights.masked_fill(self.padded, 0.0)
        self._inverse: Tensor | None = None  # [S] where each token's rows are, unless they lie in the tokens' order
        self.tokens, self.experts, self.padding, self.weights = self._rows()

    def _rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def low_rank(self, rows: Tensor, delta_in: Tensor, delta_out: Tensor) -> Tensor:
        """`delta_out_e (delta_in_e x)` of every row: [S, in] to [S, out]; 0 for padding.

        Args:
            rows: [S, in], in the order of `tokens`.
            delta_in: [E, R, in].
            delta_out: [E, out, R].
        """
        raise NotImplementedError

    def spread(self, values: Tensor) -> Tensor:
        """Each token's values for each of its rows: [T, d] to [S, d]."""
        return _Spread.apply(values, self.tokens, self._inverse, self.top_k)

    def collect(self, rows: Tensor) -> Tensor:
        """The sum over the k rows of each token: [S, d] to [T, d]."""
        return _Collect.apply(rows, self.tokens, self._inverse, self.top_k)

    def dense_weights(self) -> Tensor:
        """The routing weights as a matrix [T, E], zero where a token does not go."""
        zeros = self.index_weights.new_zeros(self.num_tokens, self.num_experts)
        return zeros.scatter_add(1, self.index, self.index_weights)


class GatheredRouting(Routing):
    """Rows in the order of the tokens; each gathers its own factors. Nothing is sorted."""

    def _rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = torch.arange(self.num_tokens, device=self.index.device).repeat_interleave(self.top_k)
        return tokens, self.index.flatten(), self.padded.reshape(-1, 1), self.index_weights.reshape(-1, 1)

    def low_rank(self, rows: Tensor, delta_in: Tensor, delta_out: Tensor) -> Tensor:
        inner = torch.bmm(delta_in[self.experts], rows.unsqueeze(-1)).squeeze(-1)
        inner = inner.masked_fill(self.padding, 0.0)
        return torch.bmm(delta_out[self.experts], inner.unsqueeze(-1)).squeeze(-1)


class GroupedRouting(Routing):
    """Rows sorted by expert, once; both projections reuse the order. No synchronization with the host."""

    def _rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        experts, order = self.index.flatten().sort(stable=True)
        boundaries = torch.arange(self.num_experts, device=experts.device)
        # Rows of experts up to e: unlike bincount this needs no maximum from the device.
        self._offsets = torch.searchsorted(experts, boundaries, right=True, out_int32=True)
        positions = torch.arange(order.numel(), device=order.device)
        self._inverse = torch.empty_like(order).scatter_(0, order, positions)
        tokens = order // self.top_k
        return tokens, experts, self.padded.flatten()[order, None], self.index_weights.flatten()[order, None]

    def low_rank(self, rows: Tensor, delta_in: Tensor, delta_out: Tensor) -> Tensor:
        out_features = delta_out.shape[1]
        multiple = _multiple(rows)
        rows = _pad(rows, multiple, dims=(False, True))
        delta_in = _pad(delta_in, multiple, dims=(True, True))
        delta_out = _pad(delta_out, multiple, dims=(True, True))
        inner = grouped_mm(rows, delta_in, self._offsets).masked_fill(self.padding, 0.0)
        out = grouped_mm(inner, delta_out, self._offsets)
        return out if out.shape[1] == out_features else out[:, :out_features]


def choose_routing(values_per_expert: int, index: Tensor, weights: Tensor, num_experts: int) -> Routing:
    """The faster routing for a number of rows, decided from shapes alone.

    Args:
        values_per_expert: factor values of one expert that a row needs in the larger projection.
        index, weights: [T, k].
    """
    limit = _GATHER_LIMIT.get(index.device.type, _GATHER_LIMIT_GPU)
    kind = GatheredRouting if index.numel() * values_per_expert <= limit else GroupedRouting
    return kind(index, weights, num_experts)


def grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`weight_e x` of rows sorted by expert: rows [S, in], weight [E, out, in], offsets int32 [E] to [S, out].

    Features must be multiples of 16 bytes. Differentiable. What the kernel cannot do (float64, compiled graphs other
    than bf16, GPUs before compute capability 8.0) goes through the loop that Transformers keeps for the same reason.
    """
    if _kernel_can(rows):
        return _ContiguousGradient.apply(F.grouped_mm(rows, weight.mT, offs=offsets))
    return torch.ops.transformers.grouped_mm_fallback(rows, weight.mT, offsets)


def grouped_rows(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_mm` of any number of features: rows [S, in], weight [G, out, in] to [S, out]."""
    multiple = _multiple(rows)
    padded = _pad(weight, multiple, dims=(True, True))
    return grouped_mm(_pad(rows, multiple, dims=(False, True)), padded, offsets)[:, : weight.shape[1]]


class _ContiguousGradient(torch.autograd.Function):
    """The identity; the kernel's backward refuses gradients with other strides, such as the expanded one of a sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class _Spread(torch.autograd.Function):
    """Copies of tokens for their rows; its gradient is their sum, without the slow `index_put` of indexing."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, tokens: Tensor, inverse: Tensor | None, top_k: int) -> Tensor:
        ctx.routing = tokens, inverse, top_k
        return values.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Collect.apply(gradient, *ctx.routing), None, None, None


class _Collect(torch.autograd.Function):
    """Sums of each token's rows; its gradient is the token's, copied to the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, inverse: Tensor | None, top_k: int) -> Tensor:
        ctx.routing = tokens, inverse, top_k
        # Gather and sum instead of index_add: deterministic, and 16-bit types are summed in fp32.
        if inverse is not None and rows.device.type == "cpu" and rows.dtype != torch.float64:
            # Both at once, which is ten times faster than writing the gathered rows out.
            return F.embedding_bag(inverse.view(-1, top_k), rows.contiguous(), mode="sum")
        if inverse is not None:
            rows = rows.index_select(0, inverse)
        return rows.reshape(-1, top_k, rows.shape[1]).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Spread.apply(gradient, *ctx.routing), None, None, None


def _kernel_can(rows: Tensor) -> bool:
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if torch.compiler.is_compiling() and rows.dtype != torch.bfloat16:
        return False
    return rows.device.type != "cuda" or torch.cuda.get_device_capability(rows.device) >= (8, 0)


def _multiple(rows: Tensor) -> int:
    """The kernel wants rows of whole 16 bytes, in every operand of forward and backward."""
    return 16 // rows.element_size()


def _pad(tensor: Tensor, multiple: int, dims: tuple[bool, bool]) -> Tensor:
    """Zeros at the end of the chosen ones of the last two dimensions, up to a multiple."""
    rows, columns = (-size % multiple if chosen else 0 for size, chosen in zip(tensor.shape[-2:], dims, strict=True))
    return F.pad(tensor, (0, columns, 0, rows)) if rows or columns else tensor
