"""The whole run on a tiny model: every stage leaves its files, the baseline has equal bytes, a rerun does nothing."""

import json

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_compress import settings
from moe_compress.cli import main
from moe_compress.modeling import load_model, load_tokenizer
from moe_compress.reference import REFERENCE_MODEL_DIR
from moe_compress.run import Run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=4096,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=512,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    model.to(torch.bfloat16).save_pretrained(path)
    load_tokenizer(REFERENCE_MODEL_DIR).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    arguments = [
        f"run={path}",
        f"model={teacher}",
        "compression.target_ratio=0.5",
        "compression.rank_multiple=1",
        "compression.calibration.dataset.max_samples=4",
        "compression.calibration.dataset.max_length=32",
        "distillation.teacher.generation.top_k=8",
        "distillation.dataset.max_samples=8",
        "distillation.dataset.max_length=32",
        "distillation.training.bf16=false",
        "distillation.training.warmup_steps=0",
        "distillation.training.learning_rate=1e-3",
        "distillation.training.gradient_accumulation_steps=1",
        "distillation.training.logging_steps=1",
        r"distillation.stages=[{name: factors, trainable: ['\.experts\.'], steps: 2}, {name: all, steps: 2}]",
        "evaluation.baseline=true",
        "evaluation.limit=2",
        "evaluation.tasks={stdlib_next_line: 0}",
        "evaluation.perplexity.max_samples=4",
        "evaluation.perplexity.max_length=32",
        "evaluation.generate_tokens=4",
    ]
    assert main(["run", *arguments]) in (None, 0)
    return path, arguments


def test_every_stage_is_finished_and_left_its_files(run):
    opened = Run.open(run[0])
    for stage in ("compress", "teacher-logits", "distill", "evaluate", "report"):
        assert opened.finished(stage), stage
    assert [step for step, _ in opened.checkpoints()] == [0, 2, 4]
    for name in (
        "compression.json",
        "training_complete.json",
        "logs/train.jsonl",
        "evals/results.jsonl",
        "report.html",
    ):
        assert (run[0] / name).stat().st_size > 0, name
    assert (run[0] / "best").resolve().parent == (run[0] / "checkpoints").resolve()


def test_teacher_student_and_baseline_are_all_measured(run):
    records = [json.loads(line) for line in (run[0] / "evals/results.jsonl").read_text().splitlines()]
    measured = {(record["model"], record["step"]) for record in records}
    assert {("teacher", 0), ("student", 0), ("student", 4), ("svd", 0), ("svd", 4)} <= {
        (model, step or 0) for model, step in measured
    }
    assert all(record["perplexity"] > 1 for record in records)


def test_the_baseline_has_no_core_and_no_more_bytes(run):
    ours = json.loads((run[0] / "compression.json").read_text())
    svd = json.loads((run[0] / "baseline_svd/compression.json").read_text())
    cores = {p["cores"] for layer in svd["layers"].values() for p in layer["projections"].values()}
    assert cores == {0}
    assert 0.9 * ours["totals"]["expert_bytes_after"] < svd["totals"]["expert_bytes_after"]
    assert svd["totals"]["expert_bytes_after"] <= ours["totals"]["expert_bytes_after"]
    assert settings.read(run[0] / "baseline_svd/config.yaml").distillation == _with_cache(run[0])


def _with_cache(path):
    distillation = settings.read(path / "config.yaml").distillation
    distillation.teacher.cache_dir = str(path / "teacher_logits")
    return distillation


def test_distillation_trained_what_its_stages_say(run):
    zero, one, two = (load_model(run[0] / f"checkpoints/checkpoint-{step}").state_dict() for step in (0, 2, 4))
    attention, expert = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.down_proj_delta_out"
    assert torch.equal(zero[attention], one[attention]) and not torch.equal(one[attention], two[attention])
    assert not torch.equal(zero[expert], one[expert]) and not torch.equal(one[expert], two[expert])


def test_a_second_call_does_nothing(run):
    def state():
        files = (file for file in run[0].glob("checkpoints/**/*") if file.is_file())
        return {file: file.stat().st_mtime_ns for file in files}

    before, results = state(), (run[0] / "evals/results.jsonl").read_text()
    assert main(["run", *run[1]]) in (None, 0)
    assert state() == before
    assert (run[0] / "evals/results.jsonl").read_text() == results


def test_another_value_for_a_frozen_setting_is_refused(run, capsys):
    assert main(["distill", f"run={run[0]}", "distillation.loss.alpha=0.1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "distillation.loss.alpha" in error and "0.5" in error and "0.1" in error
    assert error.count("\n") == 1


def test_the_distilled_model_exports_to_its_architecture(run, tmp_path):
    assert main(["export", f"run={run[0]}", "--dense", str(tmp_path / "dense")]) in (None, 0)
    dense = load_model(tmp_path / "dense", dtype="float32")
    student = load_model(run[0] / "best", dtype="float32")
    ids = torch.arange(24).view(1, -1)
    with torch.no_grad():
        assert torch.allclose(dense(ids).logits, student(ids).logits, atol=2e-2)
