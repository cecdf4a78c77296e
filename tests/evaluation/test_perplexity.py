"""Loss, perplexity and agreement against their definitions computed by hand."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from moe_compress.errors import UserError
from moe_compress.evaluation import perplexity as module
from moe_compress.evaluation import teacher_text
from moe_compress.evaluation.perplexity import held_out_rows, score_text
from moe_compress.evaluation.results import settings_fingerprint
from moe_compress.evaluation.routing import LayerRouting, overlap
from moe_compress.evaluation.teacher_pass import teacher_text as scored_text
from moe_compress.evaluation.teacher_text import TeacherRows, TeacherText, TeacherTextWriter

from .conftest import LENGTH, make_model, mean_core

ROWS = torch.randint(300, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def text_of(tmp_path):
    """A function that gives what a teacher makes of the rows, through its file."""

    def make(teacher, rows: torch.Tensor = ROWS, name: str = "text") -> TeacherText:
        writer = TeacherTextWriter(tmp_path / f"{name}.h5", rows, seed=0)
        writer.finish(score_text(teacher, rows, keep=writer, progress=False))
        return TeacherText(tmp_path / f"{name}.h5")

    return make


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


def test_agreement_by_hand(text_of, monkeypatch):
    monkeypatch.setattr(teacher_text, "TOP_K", 300)  # the whole vocabulary: nothing is estimated
    teacher, student = make_model(), mean_core(make_model(), rank=2)
    theirs, ours = log_probabilities(teacher), log_probabilities(student)
    score = score_text(student, ROWS, text_of(teacher), progress=False)
    per_row = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean(-1)
    assert score.kl == pytest.approx(per_row.mean().item(), rel=1e-4)
    assert score.kl_stderr == pytest.approx((per_row.std() / math.sqrt(5)).item(), rel=1e-3)
    assert score.kl > 0.01
    assert score.top1_agreement == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).double().mean().item())
    assert 0 < score.top1_agreement < 1


def test_the_divergence_is_estimated_without_bias(text_of, monkeypatch):
    """Few top tokens and few draws: the mean over many seeds is the divergence, which a cut-off tail is far from."""
    monkeypatch.setattr(teacher_text, "TOP_K", 8)
    monkeypatch.setattr(teacher_text, "TAIL_SAMPLES", 4)
    generator = torch.Generator().manual_seed(3)
    teacher, student = torch.randn(2, 40, 300, generator=generator)
    exact = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    estimates, tops = [], []
    for seed in range(300):
        index, log_p, top = teacher_text.kept_tokens(teacher, seed)
        weight = log_p.exp()
        tops.append(float((weight[:, :8] * (log_p - student.log_softmax(-1).gather(-1, index))[:, :8]).sum(-1).mean()))
        weight[:, 8:] = (1 - weight[:, :8].sum(-1, keepdim=True)) / 4
        rows = TeacherRows(index[None], log_p[None], weight[None], top[None], {})
        estimates.append(float(rows.divergence(0, slice(None), student.log_softmax(-1)).mean()))
    spread = torch.tensor(estimates).std() / math.sqrt(300)
    assert abs(sum(estimates) / 300 - exact) < 4 * spread
    assert abs(sum(tops) / 300 - exact) > 20 * spread


def test_the_file_gives_back_the_teacher(text_of):
    teacher = make_model()
    text = text_of(teacher)
    assert torch.equal(text.rows, ROWS) and text.vocabulary == 300
    assert text.score == score_text(teacher, ROWS, progress=False)
    part = text.read(1, 3)
    exact = log_probabilities(teacher)[1:3]
    assert part.index.shape == (2, 23, teacher_text.TOP_K + teacher_text.TAIL_SAMPLES)
    assert torch.equal(part.top, exact.argmax(-1)) and torch.equal(part.index[..., 0], part.top)
    assert torch.allclose(part.log_p.double(), exact.gather(-1, part.index), atol=1e-5)
    assert torch.allclose(part.weight.sum(-1), torch.ones(2, 23), atol=1e-5)


def test_a_damaged_file_is_said(tmp_path):
    (tmp_path / "text.h5").write_bytes(b"half")
    with pytest.raises(UserError, match="text.h5 is damaged .* delete it"):
        TeacherText(tmp_path / "text.h5")


def test_a_model_agrees_with_itself(text_of):
    score = score_text(make_model(), ROWS, text_of(make_model()), progress=False)
    assert score.kl == pytest.approx(0, abs=1e-7)
    assert score.top1_agreement == 1
    assert score.routing_agreement == pytest.approx(1)
    assert all(layer["agreement"] == pytest.approx(1) for layer in score.routing.values())


@pytest.mark.parametrize("limit", ["_LOGIT_BYTES_PER_PASS", "_LOGITS_PER_CHUNK"])
def test_chunks_change_nothing(monkeypatch, limit, text_of):
    teacher, student = make_model(), mean_core(make_model())
    text = text_of(teacher)
    whole = score_text(student, ROWS, text, progress=False)
    monkeypatch.setattr(module, limit, 300 * 7)
    parts = score_text(student, ROWS, text, progress=False)
    assert parts.sequence_losses == pytest.approx(whole.sequence_losses, abs=1e-6)
    assert parts.kl == pytest.approx(whole.kl, abs=1e-6)
    assert parts.routing_agreement == pytest.approx(whole.routing_agreement, abs=1e-6)
    assert 0 < parts.routing_agreement < 1


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
        assert layer["largest"] == pytest.approx(float(share.max() * 8))


def test_a_teacher_with_more_experts_is_compared_too():
    ours = LayerRouting(4)
    ours.add(torch.tensor([[0, 1], [2, 3]]))
    assert overlap(ours, torch.tensor([[1, 7], [3, 2]])) == pytest.approx(0.75)


def test_a_token_the_teacher_rules_out_adds_nothing():
    logits = torch.zeros(3, 4)
    ruled_out = logits.clone()
    ruled_out[:, 3] = -math.inf
    index, log_p, top = teacher_text.kept_tokens(ruled_out, 0)
    rows = TeacherRows(index[None], log_p[None], log_p.exp()[None], top[None], {})
    _, kl, _ = module._score_row(torch.zeros(3, dtype=torch.int64), logits, rows)
    assert kl == pytest.approx(math.log(4) - math.log(3))


def test_one_sequence_has_no_error():
    score = score_text(make_model(), ROWS[:1], progress=False)
    assert score.stderr is None and score.perplexity_stderr is None


def test_rows_are_packed_text(config, tokenizer):
    rows = held_out_rows(config, tokenizer)
    assert rows.shape == (6, LENGTH) and rows.dtype == torch.int64
    assert torch.equal(rows, held_out_rows(config, tokenizer))
    config.evaluation.perplexity.packing = "truncate"
    with pytest.raises(UserError, match="packing is truncate"):
        held_out_rows(config, tokenizer)


def test_only_what_is_labelled_counts(text_of, monkeypatch):
    monkeypatch.setattr(teacher_text, "TOP_K", 300)
    teacher, student = make_model(), mean_core(make_model(), rank=2)
    labelled = torch.rand(ROWS.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    theirs, ours, labels = log_probabilities(teacher), log_probabilities(student), labelled[:, 1:]
    score = score_text(student, ROWS, text_of(teacher), labelled=labelled, progress=False)
    nll = -ours.gather(-1, ROWS[:, 1:, None]).squeeze(-1)
    assert (score.loss, score.tokens) == (pytest.approx(nll[labels].mean().item(), abs=1e-5), int(labels.sum()))
    by_hand = [float(row[kept].mean()) for row, kept in zip(nll, labels, strict=True)]
    assert score.sequence_losses == pytest.approx(by_hand, abs=1e-5)
    assert score.sequence_tokens == labels.sum(1).tolist()
    kl = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    assert score.kl == pytest.approx(kl[labels].mean().item(), rel=1e-4)
    agreed = (ours.argmax(-1) == theirs.argmax(-1)).double()
    assert score.top1_agreement == pytest.approx(agreed[labels].mean().item())


def test_of_conversations_the_answers_count(config, tokenizer, teacher_dir, tmp_path):
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "name the other value"}, {"role": "assistant", "content": "self.name"}]
    path.write_text((json.dumps({"messages": chat}) + "\n") * 30)
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    teacher = shutil.copytree(teacher_dir, tmp_path / "teacher")
    (teacher / "chat_template.jinja").write_text(template)
    text = config.evaluation.perplexity
    text.name, text.messages_column, before = str(path), "messages", settings_fingerprint(config)
    answers = scored_text(teacher, config, tmp_path)
    assert 0 < answers.score.tokens == int(answers.labelled[:, 1:].sum()) < 6 * (LENGTH - 1)
    text.mask_prompts = False
    assert settings_fingerprint(config) != before
    whole = scored_text(teacher, config, tmp_path)
    assert whole.score.tokens == 6 * (LENGTH - 1) and torch.equal(whole.rows, answers.rows)


@pytest.mark.parametrize("padded", ["teacher", "student"])
def test_padding_of_the_vocabulary_is_not_compared(text_of, padded):
    models = {"teacher": make_model(), "student": mean_core(make_model(), rank=2)}
    before = score_text(models["student"], ROWS, text_of(models["teacher"]), progress=False)
    models[padded].resize_token_embeddings(310, mean_resizing=False)
    with torch.no_grad():  # each padding id as probable as a used one
        models[padded].lm_head.weight[300:] = models[padded].lm_head.weight[:10]
    text = text_of(models["teacher"], name="padded")
    after = score_text(models["student"], ROWS, text, vocabulary=300, progress=False)
    # Other draws of the tail, or the same.
    assert after.kl == pytest.approx(before.kl, rel=0.05 if padded == "teacher" else 1e-4)
    assert (after.loss > before.loss + 1e-3) == (padded == "student")


def test_refusals(text_of):
    with pytest.raises(UserError, match="at least two tokens"):
        score_text(make_model(), ROWS[:, :1])
    with pytest.raises(UserError, match="max_length to 512"):
        score_text(make_model(), torch.zeros(1, 513, dtype=torch.int64))
    other = make_model()
    other.resize_token_embeddings(310)
    with pytest.raises(UserError, match="vocabulary \\(310\\)"):
        score_text(make_model(), ROWS, text_of(other), progress=False)
