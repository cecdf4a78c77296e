"""The blended loss `(1 - alpha) * CE + alpha * T^2 * divergence(teacher, student)`, from sparse or dense targets.

It is computed and differentiated chunk by chunk over the tokens (`chunks`): from logits, or from the hidden states
before the output head, of whose logits then only a slice exists at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from moe_compress.distillation.chunks import LinearHead, TeacherHead, summed_in_chunks
from moe_compress.distillation.targets import DenseTargets, SampledTargets, SparseTargets, TeacherTargets
from moe_compress.errors import UserError

IGNORED = -100

# A log-probability whose exponential is 0 beside any other in fp32, and which, unlike minus infinity, may be multiplied
# by it.
_NO_MASS = -1e30

Tail = Literal["keep", "ignore"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


def tail_log_mass(targets: SparseTargets, temperature: float, vocab_size: int) -> Tensor | None:
    """Log of the sum of `exp(log-probability / T)` over the tokens outside the top-k, for each token: fp32 `[n]`.

    Ids among the k from `vocab_size` on are not counted as tokens; a tail without any has no mass.

    With b = 1/T it is exact at b = 1 and b = 1/2, where the cache holds it, and at b = 0, where it is the log of the
    number of those tokens. Between them it is the parabola through these three points: the function is smooth and
    convex in b. Below T=1 it is half-way between that parabola, which is above the truth, and the chord, which is
    below. Measured on a half-trained reference MoE (top 64 of 4096): off by 0.05 at most from T=1 to 4, by 0.07 at
    T=0.9 and 0.34 at T=0.7, where an evenly spread tail is off by 0.34 to 0.82 on average. It is never more than if all
    tokens of the tail were as probable as the last of the top-k.

    Returns:
        None where there is no tail, because the top-k is the whole vocabulary.
    """
    if targets.indices.shape[-1] >= (targets.vocab_size or vocab_size):
        return None
    rest = vocab_size - (targets.indices < vocab_size).sum(-1)
    log_rest = rest.log()
    b = 1.0 / temperature
    at_one, at_half = targets.log_tail.unbind(-1)
    mass = 2 * (b - 0.5) * (b - 1) * log_rest - 4 * b * (b - 1) * at_half + 2 * b * (b - 0.5) * at_one
    if b > 1:
        mass = (mass + at_one + 2 * (b - 1) * (at_one - at_half)) / 2
    return torch.minimum(mass, log_rest + b * targets.log_probs[..., -1]).where(rest > 0, _NO_MASS)


def divergence(
    logits: Tensor,
    targets: TeacherTargets,
    temperature: float,
    tail: Tail = "keep",
    kind: Divergence = "forward_kl",
) -> Tensor:
    """How far the student is from the teacher at a temperature, for each token: fp32 `[n]`.

    With p the teacher's and q the student's probabilities: `forward_kl` is KL(p || q), `reverse_kl` is KL(q || p), and
    `jsd` the mean of KL(p || m) and KL(q || m) with m = (p + q) / 2, which is at most log 2.

    From sparse targets the classes are the k tokens and, with `tail="keep"`, one more that stands for all others.
    Merging classes never increases such a divergence: it is a lower bound of the full one, equal to it when k is the
    vocabulary. With `tail="ignore"` both sides are renormalized over the k tokens. From random draws the forward KL is
    estimated without bias: the cross-entropy of the draws less the teacher's entropy (of one token it may be negative).

    Ids of the teacher that the student does not have must be padding. They are left out, and the teacher's other
    probabilities, but for draws, renormalized.

    Args:
        logits: the student's, fp32 `[n, vocabulary]`.
        targets: the teacher's, flattened.
        temperature: of both distributions.
        tail: what becomes of the mass outside the top-k.
        kind: which divergence.

    Raises:
        UserError: another divergence than the forward KL from random draws.
    """
    if isinstance(targets, SampledTargets):
        if kind != "forward_kl":
            raise UserError(
                f"distillation.loss.divergence={kind} needs the teacher's probabilities, which random draws do not "
                "tell; take forward_kl or a top-k cache"
            )
        targets = targets.cut(logits.shape[-1])
        weights, entropy = targets.at(temperature)
        log_q = (logits / temperature).log_softmax(-1)
        return -(weights * log_q.gather(-1, targets.indices)).sum(-1) - entropy
    log_p, log_q = _log_probabilities(logits, targets, temperature, tail)
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_probabilities(
    logits: Tensor, targets: DenseTargets | SparseTargets, temperature: float, tail: Tail
) -> tuple[Tensor, Tensor]:
    """Of teacher and student over the same classes, each normalized: fp32 `[n, classes]`."""
    student, vocab_size = logits / temperature, logits.shape[-1]
    if isinstance(targets, DenseTargets):
        return (targets.cut(vocab_size).logits.float() / temperature).log_softmax(-1), student.log_softmax(-1)
    head_p = (targets.log_probs / temperature).masked_fill(targets.indices >= vocab_size, _NO_MASS)
    if targets.vocab_size is not None and targets.vocab_size > vocab_size:
        # So that ids which only the teacher has are the same to both sides: classes of no mass.
        student = pad(student, (0, targets.vocab_size - vocab_size), value=_NO_MASS)
    head_q = student.gather(-1, targets.indices)
    tail_p = tail_log_mass(targets, temperature, vocab_size) if tail == "keep" else None
    if tail_p is not None:
        # The student's tail is summed over its tokens: 1 - (sum of the top-k) would lose it to rounding.
        tail_q = student.scatter(-1, targets.indices, _NO_MASS).logsumexp(-1)
        head_p = torch.cat([head_p, tail_p.unsqueeze(-1)], -1)
        head_q = torch.cat([head_q, tail_q.unsqueeze(-1)], -1)
    # Top-k and tail together are the whole vocabulary, so this also normalizes the student over all of it.
    return head_p.log_softmax(-1), head_q.log_softmax(-1)


@dataclass(frozen=True)
class LossParts:
    """A loss to differentiate and what it is made of.

    Attributes:
        loss: the blended loss, with its graph.
        ce: sum over the tokens of the cross-entropy, detached.
        kl: sum over the tokens of the divergence at the loss's temperature (without the factor T^2), detached.
        tokens: labelled tokens in this batch.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    tokens: int


def labelled_rows(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels `[batch, length]` shifted as for a causal LM, and which places have one.

    Returns:
        The label that each place predicts, int64 `[batch * length]`, and the places whose label is not masked, `[n]`.
    """
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    shifted = shifted.flatten()
    return shifted, (shifted != IGNORED).nonzero().squeeze(-1)


@torch.compiler.disable
def distillation_loss(
    inputs: Tensor,
    labels: Tensor,
    targets: TeacherTargets | TeacherHead | None,
    *,
    alpha: float,
    temperature: float,
    normalizer: Tensor | float | None = None,
    tail: Tail = "keep",
    kind: Divergence = "forward_kl",
    kl_reduction: Literal["batchmean", "sum"] = "batchmean",
    head: LinearHead | None = None,
) -> LossParts:
    """The blended loss of a batch, shifted as for a causal LM: position t predicts the label at t+1.

    Args:
        inputs: the student's logits, `[batch, length, vocabulary]`, any floating type; or, with `head`, the hidden
            states `[batch, length, hidden]` that the head makes them from.
        labels: int64 `[batch, length]`; -100 masks a token in both parts of the loss.
        targets: the teacher's, `[batch, length, ...]`, not shifted; None leaves cross-entropy alone.
        alpha: weight of the divergence.
        temperature: of both distributions of the divergence.
        normalizer: labelled tokens in the whole optimizer step, over all micro-batches and ranks; their losses then add
            up to the loss of one large batch. None takes those of this batch.
        tail, kind: see `divergence`.
        kl_reduction: `batchmean` divides the divergence by `normalizer`, `sum` does not.
        head: the student's output head; its weight gets its gradient too.
    """
    shifted, rows = labelled_rows(labels)
    count = max(rows.numel(), 1) if normalizer is None else normalizer
    ce_weight = (1 - alpha if targets is not None else 1.0) / count
    kl_weight = alpha * temperature**2 / (count if kl_reduction == "batchmean" else 1)
    flat = targets.flatten() if targets is not None else None

    def losses(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ce = cross_entropy(logits, shifted.index_select(0, index), reduction="sum")
        if flat is None:
            return ce_weight * ce, ce, torch.zeros_like(ce)
        chosen = flat.rows(index)
        kl = divergence(logits[:, : chosen.vocab_size], chosen, temperature, tail, kind).sum()
        return ce_weight * ce + kl_weight * kl, ce, kl

    loss, ce, kl = summed_in_chunks(inputs.flatten(0, 1), rows, losses, head)
    return LossParts(loss=loss, ce=ce, kl=kl, tokens=rows.numel())
