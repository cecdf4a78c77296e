"""The loss fused with the output head: value and gradients of the plain one, for every kind of head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.flop_counter import FlopCounterMode
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, OlmoeConfig, OlmoeForCausalLM

from moe_compress.distillation import chunks
from moe_compress.distillation.chunks import LinearHead, TeacherHead
from moe_compress.distillation.heads import headless, linear_head
from moe_compress.distillation.losses import distillation_loss
from moe_compress.distillation.targets import DenseTargets

BATCH, LENGTH, HIDDEN, VOCABULARY = 2, 9, 8, 41
OPTIONS: dict[str, Any] = {"alpha": 0.4, "temperature": 2.0}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens a chunk, so that there are several, the last of them shorter."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * VOCABULARY * 3)


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    labels[0, 4] = -100
    return labels


def plain(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The formula in plain PyTorch over whole logits."""
    alpha, temperature = OPTIONS["alpha"], OPTIONS["temperature"]
    shifted = labels[:, 1:].flatten()
    rows = shifted != -100
    student, teacher = (part[:, :-1].flatten(0, 1)[rows] for part in (logits.float(), teacher))
    ce = cross_entropy(student, shifted[rows])
    log_q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    return (1 - alpha) * ce + alpha * temperature**2 * kl_div(log_q, p, reduction="batchmean")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0)])
def test_value_and_all_gradients_are_those_of_whole_logits(
    labels: Tensor, bias: bool, scale: float, softcap: float | None
) -> None:
    teacher = 2 * randn(1, BATCH, LENGTH, VOCABULARY)
    parameters = [randn(2, BATCH, LENGTH, HIDDEN), randn(3, VOCABULARY, HIDDEN)]
    parameters += [randn(4, VOCABULARY)] if bias else []
    one, other = ([tensor.clone().requires_grad_() for tensor in parameters] for _ in range(2))

    logits = nn.functional.linear(*one) * scale
    expected = plain(logits if softcap is None else softcap * (logits / softcap).tanh(), teacher, labels)
    (3 * expected).backward()

    head = LinearHead(*other[1:], scale=scale, softcap=softcap)
    parts = distillation_loss(other[0], labels, DenseTargets(teacher), head=head, **OPTIONS)
    (3 * parts.loss).backward(retain_graph=True)
    torch.testing.assert_close(parts.loss, expected)
    for mine, theirs in zip(other, one, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    with pytest.raises(RuntimeError):  # its gradients are scaled in place: never wrong, if not twice
        parts.loss.backward()


def test_tied_embeddings_get_the_gradient_of_both_uses_and_accumulate(labels: Tensor) -> None:
    teacher = 2 * randn(1, BATCH, LENGTH, VOCABULARY)
    ids = labels.clamp(min=0)
    gradients = []
    for fused in (False, True):
        weight = randn(3, VOCABULARY, HIDDEN).requires_grad_()
        for row in range(BATCH):
            hidden, part = weight[ids[row : row + 1]].tanh(), slice(row, row + 1)
            options = {**OPTIONS, "normalizer": 15.0}
            inputs = hidden if fused else hidden @ weight.mT
            head = LinearHead(weight) if fused else None
            distillation_loss(inputs, labels[part], DenseTargets(teacher[part]), head=head, **options).loss.backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_under_autocast_it_computes_as_the_head_would(labels: Tensor) -> None:
    teacher = DenseTargets(2 * randn(1, BATCH, LENGTH, VOCABULARY))
    found = []
    for fused in (False, True):
        hidden, weight = randn(2, BATCH, LENGTH, HIDDEN).requires_grad_(), randn(3, VOCABULARY, HIDDEN).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            inputs = hidden if fused else nn.functional.linear(hidden, weight)
            head = LinearHead(weight) if fused else None
            loss = distillation_loss(inputs, labels, teacher, head=head, **OPTIONS).loss
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-2)
    assert torch.equal(found[0][0], found[1][0])


def test_a_frozen_head_costs_no_gradient_of_its_weight(labels: Tensor) -> None:
    flops = []
    for trains in (True, False):
        hidden = randn(2, BATCH, LENGTH, HIDDEN).requires_grad_()
        head = LinearHead(randn(3, VOCABULARY, HIDDEN).requires_grad_(trains))
        # In bf16, where the product is one that the counter knows (it knows no addmm_).
        with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
            distillation_loss(hidden, labels, None, head=head, **OPTIONS).loss.backward()
        flops.append(counter.get_total_flops())
        assert hidden.grad is not None
    assert flops[1] == pytest.approx(2 / 3 * flops[0])


def test_the_teachers_head_gives_its_logits(labels: Tensor) -> None:
    hidden, weight = randn(5, BATCH, LENGTH, HIDDEN), randn(6, VOCABULARY, HIDDEN)
    head = LinearHead(weight, softcap=4.0)
    student = randn(7, BATCH, LENGTH, VOCABULARY)
    whole = distillation_loss(student, labels, DenseTargets(head.logits(hidden)), **OPTIONS)
    parts = distillation_loss(student, labels, TeacherHead(hidden, head), **OPTIONS)
    torch.testing.assert_close(parts.loss, whole.loss)


def olmoe(**options: Any) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    config = OlmoeConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=8, num_hidden_layers=1, **options)
    config.num_attention_heads = config.num_key_value_heads = 2
    config.num_experts, config.num_experts_per_tok = 4, 2
    return OlmoeForCausalLM(config)


def granite() -> GraniteMoeForCausalLM:
    config = GraniteMoeConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=8, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 2
    config.num_local_experts, config.num_experts_per_tok, config.logits_scaling = 4, 2, 6.0
    return GraniteMoeForCausalLM(config)


class Capped(OlmoeForCausalLM):
    """An architecture with a soft cap, as Gemma has it."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        output = super().forward(*arguments, **keywords)
        cap = self.config.final_logit_softcapping
        output.logits = (output.logits / cap).tanh() * cap
        return output


class Shifted(OlmoeForCausalLM):
    """An architecture whose logits are more than a linear layer's."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        output = super().forward(*arguments, **keywords)
        output.logits = output.logits + output.logits.exp().clamp(max=1e-3)
        return output


@pytest.mark.parametrize("kind", ["olmoe", "tied", "granite", "capped"])
def test_a_model_without_its_head_gives_the_loss_and_gradients_of_its_logits(kind: str, labels: Tensor) -> None:
    def make() -> Any:
        torch.manual_seed(1)
        model: Any = granite() if kind == "granite" else olmoe(tie_word_embeddings=kind == "tied")
        if kind == "capped":
            model.config.final_logit_softcapping = 0.5
            model.__class__ = Capped
        return model.train()

    ids = labels.clamp(min=0)
    whole, cut = make(), make()
    expected = distillation_loss(whole(ids).logits, labels, None, **OPTIONS).loss
    expected.backward()
    runner = headless(cut)
    assert runner is not None and cut.training
    loss = runner.run(
        cut, {"input_ids": ids}, lambda hidden, head: distillation_loss(hidden, labels, None, head=head, **OPTIONS)
    ).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for (name, one), (_, other) in zip(cut.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert torch.equal(cut(ids).logits, whole(ids).logits)  # called otherwise, it is the model it was


def test_heads_that_are_more_than_linear_are_left_to_the_plain_loss() -> None:
    model = olmoe()
    assert linear_head(model) == (1.0, None)
    scale, cap = linear_head(granite()) or (0.0, 1.0)
    assert scale == pytest.approx(1 / 6) and cap is None
    model.__class__ = Shifted
    assert linear_head(model) is None
    model = olmoe()
    model.lm_head = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, VOCABULARY))
    assert linear_head(model) is None
    model = olmoe()
    model.config.final_logit_softcapping = 30.0  # a config that says so of a model that does not do it
    assert linear_head(model) == (1.0, None)
