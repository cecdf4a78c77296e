"""Targets of a teacher with more ids than the student: its padding counts in no divergence, whatever rank it has."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_compress.distillation.losses import distillation_loss, divergence, tail_log_mass

from .test_losses import definition, exact, logits

THEIRS, OURS = 24, 20


def padded_teacher() -> Tensor:
    """Logits whose padding is anywhere among the 12 largest, the last of them too; in two rows above or below all."""
    teacher = logits(30, shape=(40, THEIRS))
    order = teacher[:, :OURS].sort(-1, descending=True).values
    for row, places in enumerate(torch.rand(40, 8, generator=torch.Generator().manual_seed(0)).argsort(-1)):
        teacher[row, OURS:] = order[row, places[:4]] - 1e-3
    teacher[0, OURS:] += 30
    teacher[1, OURS:] = -60
    return teacher


def merged(side: Tensor, inside: Tensor, tail: str) -> Tensor:
    """Probabilities over the ids that are inside and, with `keep`, one class of all others."""
    head = side * inside
    if tail == "ignore":
        return head / head.sum(-1, keepdim=True)
    return torch.cat([head, (side * ~inside).sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("top_k", [12, 22, THEIRS])
@pytest.mark.parametrize("tail", ["keep", "ignore"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_padding_among_the_top_k_is_left_out(kind: str, tail: str, top_k: int) -> None:
    teacher, temperature = padded_teacher(), 2.0
    targets = replace(exact(teacher, top_k), vocab_size=THEIRS)
    inside = torch.zeros(40, THEIRS, dtype=torch.bool).scatter(-1, targets.indices, True)[:, :OURS]
    assert (targets.indices[:, -1] >= OURS).any()

    student = logits(31, shape=(40, OURS)).requires_grad_()
    p = (teacher[:, :OURS] / temperature).softmax(-1)
    q = (student / temperature).softmax(-1)
    sides = [merged(side, inside, tail).clamp_min(1e-30) for side in (p, q)]
    expected = definition(kind, *sides)
    if top_k == THEIRS:
        torch.testing.assert_close(expected, definition(kind, p, q))
    (slope,) = torch.autograd.grad(expected.sum(), student)

    found = divergence(student, targets, temperature, tail, kind)
    (mine,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(mine, slope, atol=2e-5, rtol=1e-4)


def test_padding_that_ends_the_top_k_does_not_take_the_tail_with_it() -> None:
    teacher = torch.tensor([[5.0, 4.0, 1.0, 1.0, 2.0, -60.0]])
    targets = replace(exact(teacher, 3), vocab_size=6)
    assert targets.indices.tolist() == [[0, 1, 4]]
    found = tail_log_mass(targets, 1.0, 4)
    torch.testing.assert_close(found, teacher.log_softmax(-1)[:, 2:4].logsumexp(-1))
    cold = tail_log_mass(targets, 0.25, 4)
    assert cold is not None and cold <= math.log(2) + 4 * targets.log_probs[0, -1]


def test_a_row_of_padding_alone_teaches_nothing_and_does_not_fail() -> None:
    teacher = torch.cat([logits(32, shape=(1, 5, OURS)), torch.full((1, 5, 4), 90.0)], -1)
    targets = replace(exact(teacher, 4), vocab_size=THEIRS)
    student, labels = logits(33, shape=(1, 5, OURS)).requires_grad_(), torch.ones(1, 5, dtype=torch.long)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        parts = distillation_loss(student, labels, targets, alpha=1.0, temperature=1.0, tail="ignore", kind=kind)
        parts.loss.backward()
        assert parts.kl == 0 and torch.equal(student.grad, torch.zeros_like(student))
