"""The loss against plain PyTorch: KL from dense and sparse targets, the tail, masks, normalization, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from moe_compress.distillation import chunks
from moe_compress.distillation.encoders import TopKEncoder
from moe_compress.distillation.losses import distillation_loss, divergence, tail_log_mass
from moe_compress.distillation.targets import DenseTargets, SampledTargets, SparseTargets
from moe_compress.errors import UserError

BATCH, LENGTH, VOCABULARY = 2, 7, 50


def logits(seed: int, scale: float = 2.0, shape: tuple[int, ...] = (BATCH, LENGTH, VOCABULARY)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def exact(teacher: Tensor, top_k: int) -> SparseTargets:
    """Sparse targets without the rounding of the cache."""
    log_probs = teacher.log_softmax(-1)
    top, indices = log_probs.topk(top_k, dim=-1)
    rest = log_probs.scatter(-1, indices, -math.inf)
    tail = torch.stack([rest.logsumexp(-1), (rest / 2).logsumexp(-1)], -1)
    return SparseTargets(indices, top, teacher.logsumexp(-1), tail)


def merged_kl(student: Tensor, teacher: Tensor, top_k: int, temperature: float) -> Tensor:
    """KL over k + 1 classes, from the full distributions of both sides."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    indices = teacher.topk(top_k, -1).indices
    p_head, q_head = p.gather(-1, indices), q.gather(-1, indices)
    p_all = torch.cat([p_head, 1 - p_head.sum(-1, keepdim=True)], -1)
    q_all = torch.cat([q_head, 1 - q_head.sum(-1, keepdim=True)], -1)
    return (p_all * (p_all / q_all).log()).sum(-1)


@given(st.integers(0, 10**6), st.sampled_from([0.7, 1.0, 1.5, 2.0, 4.0]))
@settings(max_examples=25, deadline=None)
def test_full_top_k_is_the_dense_kl(seed: int, temperature: float) -> None:
    teacher, student = logits(seed), logits(seed + 1)
    reference = kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="none"
    ).sum(-1)
    for tail in ("keep", "ignore"):
        sparse = divergence(student, exact(teacher, VOCABULARY), temperature, tail)
        torch.testing.assert_close(sparse, reference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(divergence(student, DenseTargets(teacher), temperature), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 5, VOCABULARY - 1])
def test_kept_tail_is_one_more_class_with_its_exact_mass(temperature: float, top_k: int) -> None:
    teacher, student = logits(3), logits(4)
    found = divergence(student, exact(teacher, top_k), temperature, "keep")
    torch.testing.assert_close(found, merged_kl(student, teacher, top_k, temperature), atol=2e-5, rtol=1e-4)
    full = divergence(student, DenseTargets(teacher), temperature)
    assert (found <= full + 1e-5).all()


def test_ignored_tail_renormalizes_both_sides() -> None:
    teacher, student = logits(5), logits(6)
    targets = exact(teacher, 5)
    p = (teacher.gather(-1, targets.indices) / 2).softmax(-1)
    q = (student.gather(-1, targets.indices) / 2).softmax(-1)
    torch.testing.assert_close(divergence(student, targets, 2.0, "ignore"), (p * (p / q).log()).sum(-1))


def test_ignored_tail_lets_the_student_leave_the_top_k_and_the_kept_one_does_not() -> None:
    teacher = logits(7)
    targets = exact(teacher, 5)
    elsewhere = torch.ones_like(teacher, dtype=torch.bool).scatter(-1, targets.indices, False)
    student = teacher + 8.0 * elsewhere
    assert divergence(student, targets, 1.0, "ignore").max() < 1e-5
    assert divergence(student, targets, 1.0, "keep").min() > 0.1


def test_a_tiny_tail_keeps_its_gradient() -> None:
    teacher = torch.zeros(1, VOCABULARY)
    teacher[0, 0] = 30.0
    student = teacher.clone().requires_grad_()
    divergence(student * 1.1, exact(teacher, 4), 1.0).sum().backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("temperature", "error"),
    [(0.7, 0.4), (0.9, 0.08), (1.2, 0.06), (1.5, 0.06), (3.0, 0.06), (5.0, 0.06), (10.0, 0.06)],
)
def test_tail_between_the_cached_temperatures_is_close(temperature: float, error: float) -> None:
    # Zipf-like logits with noise, as language models have them, over a vocabulary much larger than the top-k.
    ranks = torch.arange(1, 4001).float()
    teacher = (-1.3 * ranks.log() + logits(8, 1.0, (20, 4000))).float()
    targets = exact(teacher, 32)
    log_probs = teacher.log_softmax(-1)
    truth = (log_probs.scatter(-1, targets.indices, -math.inf) / temperature).logsumexp(-1)
    found = tail_log_mass(targets, temperature, 4000)
    assert found is not None
    assert (found - truth).abs().max() < error
    even = math.log(4000 - 32) * (1 - 1 / temperature) + targets.log_tail[:, 0] / temperature
    assert ((found - truth).abs() < (even - truth).abs()).all()  # better than an evenly spread tail


def test_tail_is_exact_where_the_cache_has_it_and_never_above_the_bound() -> None:
    targets = exact(logits(9), 5)
    torch.testing.assert_close(tail_log_mass(targets, 1.0, VOCABULARY), targets.log_tail[..., 0])
    torch.testing.assert_close(tail_log_mass(targets, 2.0, VOCABULARY), targets.log_tail[..., 1])
    cold = tail_log_mass(targets, 0.25, VOCABULARY)
    assert cold is not None
    assert (cold <= math.log(VOCABULARY - 5) + 4 * targets.log_probs[..., -1]).all()
    assert tail_log_mass(exact(logits(9), VOCABULARY), 3.0, VOCABULARY) is None


def test_blend_shift_mask_and_gradient_match_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * VOCABULARY * 3)  # three tokens a chunk
    teacher = logits(10)
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    labels[0, 3] = labels[1, -1] = -100
    alpha, temperature = 0.3, 2.0

    student = logits(11).requires_grad_()
    shifted = labels[:, 1:].flatten()
    rows = shifted != -100
    flat = student[:, :-1].flatten(0, 1)[rows]
    ce = cross_entropy(flat, shifted[rows])
    kl = kl_div(
        (flat / temperature).log_softmax(-1),
        (teacher[:, :-1].flatten(0, 1)[rows] / temperature).softmax(-1),
        reduction="batchmean",
    )
    expected = (1 - alpha) * ce + alpha * temperature**2 * kl
    (slope,) = torch.autograd.grad(expected, student)

    again = logits(11).requires_grad_()
    parts = distillation_loss(again, labels, DenseTargets(teacher), alpha=alpha, temperature=temperature)
    (3 * parts.loss).backward()
    count = int(rows.sum())
    assert parts.tokens == count == BATCH * (LENGTH - 1) - 2
    torch.testing.assert_close(parts.loss, expected)
    torch.testing.assert_close(parts.ce / count, ce.detach())
    torch.testing.assert_close(parts.kl / count, kl.detach())
    torch.testing.assert_close(again.grad, 3 * slope)
    assert torch.equal(again.grad[0, 2], torch.zeros(VOCABULARY))  # predicts the masked label


def test_sparse_gradient_matches_autograd_through_the_plain_formula() -> None:
    teacher, labels = logits(12), torch.zeros(BATCH, LENGTH, dtype=torch.long)
    targets = exact(teacher, 6)
    student = logits(13).requires_grad_()
    kl = merged_kl(student[:, :-1], teacher[:, :-1], 6, 2.0).mean()
    (slope,) = torch.autograd.grad(4.0 * kl, student)
    again = logits(13).requires_grad_()
    distillation_loss(again, labels, targets, alpha=1.0, temperature=2.0).loss.backward()
    torch.testing.assert_close(again.grad, slope, atol=1e-6, rtol=1e-4)


def test_parts_of_a_step_add_up_and_sum_reduction_does_not_divide() -> None:
    teacher, student = logits(14), logits(15)
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels[1, 2:] = -100  # rows of different length: averaging the averages would be wrong
    options = {"alpha": 0.5, "temperature": 2.0}
    whole = distillation_loss(student, labels, DenseTargets(teacher), **options)
    pieces = [
        distillation_loss(
            student[i : i + 1], labels[i : i + 1], DenseTargets(teacher[i : i + 1]), normalizer=whole.tokens, **options
        ).loss
        for i in range(BATCH)
    ]
    torch.testing.assert_close(sum(pieces), whole.loss)
    summed = distillation_loss(student, labels, DenseTargets(teacher), kl_reduction="sum", **options)
    torch.testing.assert_close(summed.loss, 0.5 * whole.ce / whole.tokens + 0.5 * 4 * whole.kl)


def test_bf16_logits_get_a_bf16_gradient_of_an_fp32_loss() -> None:
    student = logits(16).bfloat16().requires_grad_()
    labels = torch.ones(BATCH, LENGTH, dtype=torch.long)
    loss = distillation_loss(student, labels, DenseTargets(logits(17)), alpha=0.5, temperature=2.0).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert student.grad.dtype == torch.bfloat16 and student.grad.abs().sum() > 0


def test_cross_entropy_alone_without_a_teacher() -> None:
    student, labels = logits(18), torch.ones(BATCH, LENGTH, dtype=torch.long)
    parts = distillation_loss(student, labels, None, alpha=0.5, temperature=2.0)
    torch.testing.assert_close(parts.loss, cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    assert parts.kl == 0


@given(st.integers(0, 10**6), st.integers(1, VOCABULARY), st.floats(0.1, 8.0))
@settings(max_examples=25, deadline=None)
def test_encoder_keeps_the_largest_logits_and_the_tail(seed: int, top_k: int, scale: float) -> None:
    teacher = logits(seed, scale)
    encoder = TopKEncoder(top_k=top_k, vocab_size=VOCABULARY)
    record = encoder.encode(teacher, 0)
    assert {name: (array.shape, array.dtype) for name, array in record.items()} == {
        name: ((BATCH, LENGTH, *field.shape), field.dtype) for name, field in encoder.fields().items()
    }
    found = encoder.decode({name: torch.from_numpy(array) for name, array in record.items()})
    truth = exact(teacher, top_k)
    assert torch.equal(found.indices, truth.indices)
    torch.testing.assert_close(found.log_probs, truth.log_probs, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.logits, teacher.gather(-1, truth.indices), atol=1e-2, rtol=2e-3)
    torch.testing.assert_close(found.logsumexp, truth.logsumexp)
    torch.testing.assert_close(found.log_tail, truth.log_tail, atol=2e-3, rtol=1e-3)


def definition(kind: str, p: Tensor, q: Tensor) -> Tensor:
    """The divergence of probabilities, by its definition."""
    if kind == "forward_kl":
        return (p * (p / q).log()).sum(-1)
    if kind == "reverse_kl":
        return (q * (q / p).log()).sum(-1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_are_what_they_say_dense_and_over_merged_classes(kind: str, temperature: float) -> None:
    teacher, student = logits(20), logits(21)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    options = {"temperature": temperature, "kind": kind}
    dense = divergence(student, DenseTargets(teacher), **options)
    torch.testing.assert_close(dense, definition(kind, p, q), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(divergence(student, exact(teacher, VOCABULARY), **options), dense, atol=2e-5, rtol=1e-4)

    indices = teacher.topk(6, -1).indices
    merged = []
    for side in (p, q):
        top = side.gather(-1, indices)
        merged.append(torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1))
    kept = divergence(student, exact(teacher, 6), **options)
    torch.testing.assert_close(kept, definition(kind, *merged), atol=2e-5, rtol=1e-4)
    assert (kept <= dense + 1e-5).all()
    over_top = [side.gather(-1, indices) / side.gather(-1, indices).sum(-1, keepdim=True) for side in (p, q)]
    ignored = divergence(student, exact(teacher, 6), tail="ignore", **options)
    torch.testing.assert_close(ignored, definition(kind, *over_top), atol=2e-5, rtol=1e-4)


def test_divergences_far_apart_stay_finite_and_the_jsd_bounded() -> None:
    teacher = torch.zeros(1, 3, VOCABULARY)
    teacher[..., 0] = 60.0
    student = (-teacher).requires_grad_()
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        for targets in (DenseTargets(teacher), exact(teacher, 4)):
            found = divergence(student, targets, 1.0, "keep", kind)
            (slope,) = torch.autograd.grad(found.sum(), student)
            assert torch.isfinite(found).all() and torch.isfinite(slope).all()
            assert kind != "jsd" or (found <= math.log(2) + 1e-6).all()
    swapped = divergence(teacher, DenseTargets(student.detach()), 1.0, "keep", "jsd")
    torch.testing.assert_close(swapped, divergence(student, DenseTargets(teacher), 1.0, "keep", "jsd"))


def test_random_draws_know_the_forward_kl_only() -> None:
    draws = SampledTargets(
        torch.zeros(3, 2, dtype=torch.long), torch.full((3, 2), 0.5), torch.zeros(3, 2), torch.zeros(3, 2)
    )
    with pytest.raises(UserError, match="divergence=jsd needs the teacher's probabilities"):
        divergence(torch.zeros(3, VOCABULARY), draws, 1.0, "keep", "jsd")


def test_a_teacher_with_more_padding_than_the_student_is_cut() -> None:
    student, labels = logits(22), torch.ones(BATCH, LENGTH, dtype=torch.long)
    teacher = logits(23)
    wider = torch.cat([teacher, torch.full((BATCH, LENGTH, 6), 9.0)], -1)
    options = {"alpha": 0.5, "temperature": 2.0}
    expected = distillation_loss(student, labels, DenseTargets(teacher), **options).loss
    torch.testing.assert_close(distillation_loss(student, labels, DenseTargets(wider), **options).loss, expected)
