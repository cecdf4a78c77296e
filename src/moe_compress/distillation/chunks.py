"""Losses over a large vocabulary, computed and differentiated chunk by chunk over the tokens.

Logits of size tokens x vocabulary, and all that a softmax and its backward need of that size, exist for one chunk at a
time. The output head is part of it: the loss is taken from the hidden states before it, and of its backward only the
gradients of hidden states, weight and bias are kept (as in the fused linear cross-entropy of Liger Kernel, arXiv
2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compress.distillation.targets import DenseTargets

# Bytes of fp32 logits in one chunk.
CHUNK_BYTES = 32 * 2**20

# From logits fp32 `[n, vocabulary]` of the rows `[n]`: a sum to differentiate, and two more sums to report.
Losses = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class LinearHead:
    """An output head whose logits are `cap * tanh(scale * (W h + b) / cap)`, or without a cap `scale * (W h + b)`.

    Attributes:
        weight: W, `[vocabulary, hidden]`.
        bias: b, `[vocabulary]`, or None.
        scale: what the architecture multiplies its logits by.
        softcap: the bound that it presses them into, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def finish(self, product: Tensor) -> Tensor:
        """The logits from W h + b."""
        logits = product * self.scale if self.scale != 1.0 else product
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits `[..., vocabulary]` of hidden states `[..., hidden]`."""
        return self.finish(F.linear(hidden, self.weight, self.bias))


@dataclass(frozen=True)
class TeacherHead:
    """Targets of a live teacher before its output head, so that its logits too exist for one chunk at a time.

    Attributes:
        hidden: `[..., hidden]`.
        head: what makes logits from them.
    """

    hidden: Tensor
    head: LinearHead

    def flatten(self) -> TeacherHead:
        """All leading dimensions as one: `[tokens, hidden]`."""
        return TeacherHead(self.hidden.flatten(0, -2), self.head)

    @torch.no_grad()
    def rows(self, index: Tensor) -> DenseTargets:
        """The targets of the tokens `index` (int64 `[n]`) of flattened targets."""
        with torch.autocast(self.hidden.device.type, enabled=False):  # the student's; the teacher has its own type
            return DenseTargets(self.head.logits(self.hidden.index_select(0, index).to(self.head.weight.dtype)))


@dataclass(frozen=True)
class HeadLogits:
    """Logits `[n, vocabulary]` that an output head makes of hidden states when they are asked for, some rows at a time.

    It stands in for such a tensor where one is only split.

    Attributes:
        hidden: `[n, hidden]`.
        head: what makes logits from them.
        vocab_size: ids that count; the head may be padded.
    """

    hidden: Tensor
    head: LinearHead
    vocab_size: int

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor that it stands for."""
        return len(self.hidden), self.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the logits are made."""
        return self.head.weight.device

    def split(self, rows: int) -> Iterator[Tensor]:
        """The logits of `rows` rows at a time."""
        for part in self.hidden.split(rows):
            yield self.head.logits(part.to(self.device, self.head.weight.dtype))[:, : self.vocab_size]


def summed_in_chunks(
    inputs: Tensor, rows: Tensor, losses: Losses, head: LinearHead | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum `losses` over chunks of rows.

    Args:
        inputs: logits `[tokens, vocabulary]`, or hidden states `[tokens, hidden]` where `head` is given.
        rows: the rows of `inputs` that count, int64 `[n]`.
        losses: the losses of a chunk.
        head: makes logits from hidden states; under autocast in its type, as the head itself would.

    Returns:
        The three sums, fp32. The first has a graph, which can be gone through backwards once.
    """
    if head is None:
        return _Chunked.apply(inputs, None, None, rows, losses, lambda logits: logits)
    return _Chunked.apply(inputs, head.weight, head.bias, rows, losses, head.finish)


class _Chunked(torch.autograd.Function):
    """Computes the gradients together with the sums, so that backward only has to scale them."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: Tensor,
        losses: Losses,
        finish: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        vocabulary = inputs.shape[-1] if weight is None else weight.shape[0]
        sums = torch.zeros(3, dtype=torch.float32, device=inputs.device)
        head = None if weight is None else _Product(inputs, weight, bias, ctx.needs_input_grad)
        gradient = torch.zeros_like(inputs) if ctx.needs_input_grad[0] else None
        for index in rows.split(max(1, CHUNK_BYTES // (4 * vocabulary))):
            chunk = inputs.index_select(0, index)
            with torch.set_grad_enabled(wanted):
                product = (chunk if head is None else head.forward(chunk)).detach().requires_grad_(wanted)
                parts = losses(finish(product.float()), index)
            sums += torch.stack([part.detach() for part in parts])
            if wanted:
                (slope,) = torch.autograd.grad(parts[0], product)
                slope = slope if head is None else head.backward(slope, chunk)
                if gradient is not None:
                    gradient.index_copy_(0, index, slope.to(gradient.dtype))
        ctx.save_for_backward(gradient, *(head.gradients() if head is not None else (None, None)))
        loss, one, other = sums.unbind()
        ctx.mark_non_differentiable(one, other)
        return loss.clone(), one.clone(), other.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # In place: a copy of the weight's gradient is large. Autograd's version check refuses a second backward.
        scaled = [gradient if gradient is None else gradient.mul_(slopes[0]) for gradient in ctx.saved_tensors]
        return *scaled, None, None, None


class _Product:
    """The matrix product of an output head, chunk by chunk, and the sums of its gradients."""

    def __init__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> None:
        device = inputs.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        self.weight = weight.to(self.dtype)  # once, not for every chunk
        self.bias = None if bias is None else bias.to(self.dtype)
        self.types = (weight.dtype, None if bias is None else bias.dtype)
        self.wants_input = wanted[0]
        # Sums over many chunks, so in fp32 whatever the type of the weight.
        self.weight_sum = torch.zeros_like(weight, dtype=_wide(weight)) if wanted[1] else None
        self.bias_sum = torch.zeros_like(bias, dtype=_wide(bias)) if bias is not None and wanted[2] else None

    def forward(self, chunk: Tensor) -> Tensor:
        return F.linear(chunk.to(self.dtype), self.weight, self.bias)

    def backward(self, slope: Tensor, chunk: Tensor) -> Tensor:
        """Add to the sums; the gradient of the chunk, where it is wanted."""
        if self.weight_sum is not None:
            rows = chunk.to(self.dtype)
            if self.weight_sum.dtype == self.dtype:
                self.weight_sum.addmm_(slope.mT, rows)
            else:  # in slices, for the product of a slice does not need much memory
                for part, some in zip(self.weight_sum.split(8192), slope.split(8192, dim=1), strict=True):
                    part += some.mT @ rows
        if self.bias_sum is not None:
            self.bias_sum += slope.sum(0, dtype=self.bias_sum.dtype)
        return slope @ self.weight if self.wants_input else slope

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        sums = zip((self.weight_sum, self.bias_sum), self.types, strict=True)
        weight, bias = (None if total is None else total.to(dtype) for total, dtype in sums)
        return weight, bias


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
