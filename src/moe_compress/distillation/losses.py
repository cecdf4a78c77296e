"""The blended loss `(1 - alpha) * CE + alpha * T^2 * KL(teacher || student)`, from sparse or dense targets.

It is computed and differentiated chunk by chunk over the tokens, so that of all the fp32 tensors of size
tokens x vocabulary that a softmax and its backward need, only a slice exists at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_compress.distillation.targets import DenseTargets, SampledTargets, SparseTargets, TeacherTargets

IGNORED = -100

# Bytes of fp32 logits in one chunk.
_CHUNK_BYTES = 32 * 2**20

Tail = Literal["keep", "ignore"]


def tail_log_mass(targets: SparseTargets, temperature: float, vocab_size: int) -> Tensor | None:
    """Log of the sum of `exp(log-probability / T)` over the tokens outside the top-k, for each token: fp32 `[n]`.

    With b = 1/T it is exact at b = 1 and b = 1/2, where the cache holds it, and at b = 0, where it is the log of the
    number of those tokens. Between them it is the parabola through these three points: the function is smooth and
    convex in b. Below T=1 it is half-way between that parabola, which is above the truth, and the chord, which is
    below. Measured on a half-trained reference MoE (top 64 of 4096): off by 0.05 at most from T=1 to 4, by 0.07 at
    T=0.9 and 0.34 at T=0.7, where an evenly spread tail is off by 0.34 to 0.82 on average. It is never more than if all
    tokens of the tail were as probable as the last of the top-k.

    Returns:
        None where there is no tail, because the top-k is the whole vocabulary.
    """
    rest = vocab_size - targets.indices.shape[-1]
    if rest <= 0:
        return None
    b = 1.0 / temperature
    at_one, at_half = targets.log_tail.unbind(-1)
    mass = 2 * (b - 0.5) * (b - 1) * math.log(rest) - 4 * b * (b - 1) * at_half + 2 * b * (b - 0.5) * at_one
    if b > 1:
        mass = (mass + at_one + 2 * (b - 1) * (at_one - at_half)) / 2
    return torch.minimum(mass, math.log(rest) + b * targets.log_probs[..., -1])


def kl_divergence(logits: Tensor, targets: TeacherTargets, temperature: float, tail: Tail = "keep") -> Tensor:
    """Forward KL(teacher || student) at a temperature, for each token: fp32 `[n]`.

    From sparse targets the classes are the k tokens and, with `tail="keep"`, one more that stands for all others (a
    lower bound of the full KL, equal to it when k is the vocabulary); with `tail="ignore"` both sides are renormalized
    over the k tokens. From random draws it is an unbiased estimate: the cross-entropy of the draws less the teacher's
    entropy (of one token it may be negative).

    Args:
        logits: the student's, fp32 `[n, vocabulary]`.
        targets: the teacher's, flattened.
        temperature: of both distributions.
        tail: what becomes of the mass outside the top-k.
    """
    student = logits / temperature
    if isinstance(targets, DenseTargets):
        log_p = (targets.logits.float() / temperature).log_softmax(-1)
        return (log_p.exp() * (log_p - student.log_softmax(-1))).sum(-1)
    if isinstance(targets, SampledTargets):
        weights, entropy = targets.at(temperature)
        return -(weights * student.log_softmax(-1).gather(-1, targets.indices)).sum(-1) - entropy
    head_p = targets.log_probs / temperature
    head_q = student.gather(-1, targets.indices)
    tail_p = tail_log_mass(targets, temperature, logits.shape[-1]) if tail == "keep" else None
    if tail_p is not None:
        # The student's tail is summed over its tokens: 1 - (sum of the top-k) would lose it to rounding.
        tail_q = student.scatter(-1, targets.indices, -math.inf).logsumexp(-1)
        head_p = torch.cat([head_p, tail_p.unsqueeze(-1)], -1)
        head_q = torch.cat([head_q, tail_q.unsqueeze(-1)], -1)
    # Top-k and tail together are the whole vocabulary, so this also normalizes the student over all of it.
    log_p, log_q = head_p.log_softmax(-1), head_q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True)
class LossParts:
    """A loss to differentiate and what it is made of.

    Attributes:
        loss: the blended loss, with its graph.
        ce: sum over the tokens of the cross-entropy, detached.
        kl: sum over the tokens of the KL at the loss's temperature (without the factor T^2), detached.
        tokens: labelled tokens in this batch.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    tokens: int


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    targets: TeacherTargets | None,
    *,
    alpha: float,
    temperature: float,
    normalizer: Tensor | float | None = None,
    tail: Tail = "keep",
    kl_reduction: Literal["batchmean", "sum"] = "batchmean",
) -> LossParts:
    """The blended loss of a batch, shifted as for a causal LM: position t predicts the label at t+1.

    Args:
        logits: the student's, `[batch, length, vocabulary]`, any floating type.
        labels: int64 `[batch, length]`; -100 masks a token in both parts of the loss.
        targets: the teacher's, `[batch, length, ...]`, not shifted; None leaves cross-entropy alone.
        alpha: weight of the KL part.
        temperature: of both distributions of the KL part.
        normalizer: labelled tokens in the whole optimizer step, over all micro-batches and ranks; their losses then add
            up to the loss of one large batch. None takes those of this batch.
        tail: see `kl_divergence`.
        kl_reduction: `batchmean` divides the KL part by `normalizer`, `sum` does not.
    """
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    shifted = shifted.flatten()
    rows = (shifted != IGNORED).nonzero().squeeze(-1)
    count = max(rows.numel(), 1) if normalizer is None else normalizer
    ce_weight = (1 - alpha if targets is not None else 1.0) / count
    kl_weight = alpha * temperature**2 / (count if kl_reduction == "batchmean" else 1)
    flat = targets.flatten() if targets is not None else None

    def losses(chunk: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ce = cross_entropy(chunk, shifted.index_select(0, index), reduction="sum")
        if flat is None:
            return ce_weight * ce, ce, torch.zeros_like(ce)
        chosen = flat.rows(index)
        if chosen.vocab_size is not None and chosen.vocab_size > chunk.shape[-1]:
            chosen = chosen.cut(chunk.shape[-1])
        kl = kl_divergence(chunk[:, : chosen.vocab_size], chosen, temperature, tail).sum()
        return ce_weight * ce + kl_weight * kl, ce, kl

    loss, ce, kl = _Chunked.apply(logits.flatten(0, 1), rows, losses)
    return LossParts(loss=loss, ce=ce, kl=kl, tokens=rows.numel())


class _Chunked(torch.autograd.Function):
    """Sums a loss over chunks of rows, and its gradient with it, so that backward only has to scale it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        rows: Tensor,
        losses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[tokens, vocabulary]`, the rows that count, and their losses from fp32 `[n, vocabulary]`."""
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(logits) if wanted else None
        sums = torch.zeros(3, dtype=torch.float32, device=logits.device)
        for index in rows.split(max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))):
            with torch.set_grad_enabled(wanted):
                chunk = logits.index_select(0, index).float().detach().requires_grad_(wanted)
                parts = losses(chunk, index)
            sums += torch.stack([part.detach() for part in parts])
            if gradient is not None:
                (slope,) = torch.autograd.grad(parts[0], chunk)
                gradient.index_copy_(0, index, slope.to(gradient.dtype))
        ctx.save_for_backward(gradient)
        loss, ce, kl = sums.unbind()
        ctx.mark_non_differentiable(ce, kl)
        return loss.clone(), ce.clone(), kl.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * slopes[0].to(gradient.dtype) if gradient is not None else None, None, None
