"""Loss, perplexity and agreement against their definitions computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moe_compress.errors import UserError
from moe_compress.evaluation import perplexity as module
from moe_compress.evaluation.perplexity import held_out_rows, score_text

from .conftest import LENGTH, make_model, mean_core

ROWS = torch.randint(300, (5, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def log_probabilities(model) -> torch.Tensor:
    return model(input_ids=ROWS).logits[:, :-1].double().log_softmax(-1)


def test_loss_and_its_error_by_hand():
    model = make_model()
    nll = -log_probabilities(model).gather(-1, ROWS[:, 1:, None]).squeeze(-1)
    score = score_text(model, ROWS, progress=False)
    assert score.loss == pytest.approx(nll.mean().item(), abs=1e-5)
    assert score.sequence_losses == pytest.approx(nll.mean(1).tolist(), abs=1e-5)
    assert score.stderr == pytest.approx((nll.mean(1).std() / math.sqrt(5)).item(), abs=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.perplexity_stderr == pytest.approx(score.perplexity * score.stderr)
    assert (score.tokens, score.sequences) == (5 * 23, 5)
    assert score.kl is None and score.top1_agreement is None


def test_agreement_by_hand():
    teacher, student = make_model(), mean_core(make_model(), rank=2)
    theirs, ours = log_probabilities(teacher), log_probabilities(student)
    score = score_text(student, ROWS, teacher, progress=False)
    assert score.kl == pytest.approx(
        F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean().item(), rel=1e-4
    )
    assert score.kl > 0.01
    assert score.top1_agreement == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).double().mean().item())
    assert 0 < score.top1_agreement < 1


def test_a_model_agrees_with_itself():
    score = score_text(make_model(), ROWS, make_model(), progress=False)
    assert score.kl == pytest.approx(0, abs=1e-9)
    assert score.top1_agreement == 1
    assert all(layer["agreement"] == pytest.approx(1) for layer in score.routing.values())


@pytest.mark.parametrize("limit", ["_LOGIT_BYTES_PER_PASS", "_LOGITS_PER_CHUNK"])
def test_chunks_change_nothing(monkeypatch, limit):
    teacher, student = make_model(), mean_core(make_model())
    whole = score_text(student, ROWS, teacher, progress=False)
    monkeypatch.setattr(module, limit, 300 * 7)
    parts = score_text(student, ROWS, teacher, progress=False)
    assert parts.sequence_losses == pytest.approx(whole.sequence_losses, abs=1e-6)
    assert parts.kl == pytest.approx(whole.kl, abs=1e-6)
    assert parts.routing.keys() == whole.routing.keys()


def test_routing_is_what_the_router_chose():
    model = make_model()
    with torch.no_grad():
        logits = model(input_ids=ROWS, output_router_logits=True).router_logits
    score = score_text(model, ROWS, progress=False)
    assert len(score.routing) == 2
    for layer, router in zip(score.routing.values(), logits, strict=True):
        load = torch.bincount(router.topk(2, dim=-1).indices.flatten(), minlength=8).double()
        share = load / load.sum()
        assert layer["unused"] == int((load == 0).sum())
        assert layer["entropy"] == pytest.approx(float(-torch.special.xlogy(share, share).sum() / math.log(8)))


def test_a_token_the_teacher_rules_out_adds_nothing():
    logits = torch.zeros(3, 4)
    ruled_out = logits.clone()
    ruled_out[:, 3] = -math.inf
    _, kl, _ = module._score_row(torch.zeros(3, dtype=torch.int64), logits, ruled_out)
    assert kl == pytest.approx(math.log(4) - math.log(3))


def test_one_sequence_has_no_error():
    score = score_text(make_model(), ROWS[:1], progress=False)
    assert score.stderr is None and score.perplexity_stderr is None


def test_rows_are_packed_text(config, tokenizer):
    rows = held_out_rows(config, tokenizer)
    assert rows.shape == (6, LENGTH) and rows.dtype == torch.int64
    assert torch.equal(rows, held_out_rows(config, tokenizer))


def test_refusals():
    with pytest.raises(UserError, match="at least two tokens"):
        score_text(make_model(), ROWS[:, :1])
    with pytest.raises(UserError, match="max_length to 512"):
        score_text(make_model(), torch.zeros(1, 513, dtype=torch.int64))
    other = make_model()
    other.resize_token_embeddings(310)
    with pytest.raises(UserError, match="vocabulary \\(310\\)"):
        score_text(make_model(), ROWS, other, progress=False)
