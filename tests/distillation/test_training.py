"""Distillation of a tiny student: stages, steps, checkpoints, resuming, and what must stop it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compress.config import StageConfig
from moe_compress.distillation import DistillationTrainer, distill, generate_teacher_logits
from moe_compress.distillation import objective as objective_module
from moe_compress.distillation.checkpoints import TRAINING_STATE
from moe_compress.distillation.data import TrainingOrder
from moe_compress.distillation.losses import LossParts
from moe_compress.distillation.pipeline import load_student
from moe_compress.errors import UserError
from moe_compress.factorization.fit import FitSpec, fit
from moe_compress.modeling import compress_in_memory, expert_weights, find_experts, load_model, load_tokenizer
from moe_compress.run import Run

from .conftest import LENGTH, MakeRun, save_model

# What differs between two runs that do the same.
_TIMES = ("tokens_per_second", "memory_bytes", "time")


def log_of(run: Run) -> list[dict[str, Any]]:
    lines = (run.logs_dir / "train.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in _TIMES} for line in lines]


def weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    """The fp32 weights at a step, or the stored ones where the training state is gone."""
    path = run.checkpoint(step)
    model, _ = load_student(path, run.config, resumed=(path / TRAINING_STATE).exists())
    return dict(model.named_parameters())


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def steps_of(run: Run) -> list[int]:
    return [step for step, _ in run.checkpoints()]


def two_stages() -> list[StageConfig]:
    return [
        StageConfig(name="experts", trainable=[r"\.experts\."], steps=3, learning_rate=1e-2, alpha=1.0),
        StageConfig(
            name="attention", trainable=["self_attn"], steps=4, learning_rate=2e-3, lr_scheduler_type="constant"
        ),
    ]


class Killed(BaseException):
    """Stands for a process that ends at once."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the training in the step after `step`."""
    training_step = DistillationTrainer.training_step

    def dies(self: DistillationTrainer, *arguments: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise Killed
        return training_step(self, *arguments)

    monkeypatch.setattr(DistillationTrainer, "training_step", dies)


def test_checkpoints_are_the_zero_shot_model_with_other_weights(
    make_run: MakeRun, filled_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(cache=filled_cache, report_to=[])
    zero, last = run.checkpoint(0), run.checkpoint(4)
    (zero / "additional_chat_templates").mkdir()
    (zero / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    distill(run)
    assert steps_of(run) == [0, 2, 4]
    assert (last / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert (last / "model.safetensors").stat().st_size == (zero / "model.safetensors").stat().st_size
    assert (last / "config.json").read_bytes() == (zero / "config.json").read_bytes()
    before, after = load_file(zero / "model.safetensors"), load_file(last / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {
        name: (t.dtype, t.shape) for name, t in after.items()
    }
    assert changed(before, after) == set(before)
    model = AutoModelForCausalLM.from_pretrained(last)
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert AutoTokenizer.from_pretrained(last)("word3")["input_ids"] == [5]
    assert [step for step in (0, 2, 4) if (run.checkpoint(step) / TRAINING_STATE).exists()] == [4]
    assert not [path for path in last.rglob("*") if path.name == "training_args.bin"]

    assert json.loads((run.path / "training_complete.json").read_text())["steps"] == 4
    lines = log_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert {"stage", "loss", "ce", "kl", "learning_rate", "grad_norm"} <= set(line)
        assert line["loss"] == pytest.approx(0.5 * line["ce"] + 0.5 * 4 * line["kl"], rel=1e-5)
    assert lines[0]["learning_rate"] == 0 and max(line["learning_rate"] for line in lines) == pytest.approx(1e-2)
    assert "learning rate" in capsys.readouterr().out
    assert run.finished("distill") and run.facts("distill")["tokens"] == 4 * 2 * LENGTH
    distill(run)
    assert "finished already" in capsys.readouterr().out


def test_the_student_comes_closer_to_the_teacher(make_run: MakeRun, filled_cache: Path) -> None:
    stages = [StageConfig(steps=60, alpha=1.0, learning_rate=3e-2)]
    run = make_run(cache=filled_cache, stages=stages, save_steps=100, per_device_train_batch_size=4)
    distill(run)
    lines = log_of(run)
    assert lines[-1]["kl"] < 0.5 * lines[0]["kl"]
    assert steps_of(run) == [0, 60]  # the last is saved although no interval ended there


def test_accumulation_is_one_large_batch(make_run: MakeRun, filled_cache: Path) -> None:
    large = make_run("large", cache=filled_cache, per_device_train_batch_size=4)
    small = make_run("small", cache=filled_cache, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for run in (large, small):
        distill(run)
    for one, other in zip(log_of(large), log_of(small), strict=True):
        for key in ("loss", "ce", "kl", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4)
    for name, parameter in weights(large, 4).items():
        torch.testing.assert_close(parameter, weights(small, 4)[name], atol=2e-4, rtol=1e-3)


def test_stages_train_what_they_name_and_count_on(
    make_run: MakeRun, filled_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    fetch = TrainingOrder.__getitem__

    def spy(self: TrainingOrder, item: int) -> Any:
        seen.append(self.first + item)
        return fetch(self, item)

    monkeypatch.setattr(TrainingOrder, "__getitem__", spy)
    with_gradient: dict[str, set[str]] = {}
    training_step = DistillationTrainer.training_step

    def look(self: DistillationTrainer, *arguments: Any) -> torch.Tensor:
        loss = training_step(self, *arguments)
        names = {name for name, parameter in self.model.named_parameters() if parameter.grad is not None}
        with_gradient.setdefault(self.stage.name, set()).update(names)
        return loss

    monkeypatch.setattr(DistillationTrainer, "training_step", look)
    run = make_run(cache=filled_cache, stages=two_stages())
    distill(run)
    assert steps_of(run) == [0, 2, 3, 4, 6, 7]
    assert seen == list(range(14))  # the second stage goes on in the data where the first ended
    start, middle, end = weights(run, 0), weights(run, 3), weights(run, 7)
    assert changed(start, middle) == {name for name in start if ".experts." in name}
    assert changed(middle, {name: p.bfloat16().float() for name, p in end.items()}) == {
        name for name in start if "self_attn" in name
    }
    assert with_gradient == {
        "experts": {name for name in start if ".experts." in name},
        "attention": {name for name in start if "self_attn" in name},
    }
    # What stage one trained in fp32 came through stage two unrounded.
    master = load_file(run.checkpoint(7) / TRAINING_STATE / "master_weights.safetensors")
    assert {name for name in start if ".experts." in name} <= set(master)
    lines = log_of(run)
    assert [(line["step"], line["stage"]) for line in lines] == [
        *((step, "experts") for step in (1, 2, 3)),
        *((step, "attention") for step in (4, 5, 6, 7)),
    ]
    assert [line["learning_rate"] for line in lines[3:]] == [2e-3] * 4
    for line in lines:
        alpha = 1.0 if line["stage"] == "experts" else 0.5
        assert line["loss"] == pytest.approx((1 - alpha) * line["ce"] + alpha * 4 * line["kl"], rel=1e-5)


def test_stage_two_trains_what_stage_one_froze(make_run: MakeRun, filled_cache: Path) -> None:
    stages = [StageConfig(trainable=["experts"], steps=2), StageConfig(trainable=[".*"], steps=2)]
    run = make_run(cache=filled_cache, stages=stages)
    distill(run)
    assert changed(weights(run, 2), weights(run, 4)) == set(weights(run, 0))


def test_a_stage_of_an_unknown_name_is_refused_before_anything_is_written(
    make_run: MakeRun, filled_cache: Path
) -> None:
    run = make_run(cache=filled_cache, stages=[StageConfig(name="typo", trainable=["expertz"], steps=2)])
    with pytest.raises(UserError, match="'expertz' matches no parameter"):
        distill(run)
    assert steps_of(run) == [0] and not (run.path / "training_complete.json").exists()


@pytest.mark.parametrize("step", [1, 2, 3, 5], ids=["before any checkpoint", "stage 1", "boundary", "stage 2"])
def test_a_killed_training_resumes_to_the_same_losses_and_weights(
    make_run: MakeRun, filled_cache: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    # Averages that span a checkpoint, and lines logged beyond it, would both show.
    logging = 1 if step == 1 else 3
    options: dict[str, Any] = {"cache": filled_cache, "gradient_accumulation_steps": 2, "logging_steps": logging}
    whole = make_run("whole", stages=two_stages(), **options)
    distill(whole)
    broken = make_run("broken", stages=two_stages(), **options)
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            distill(broken)
    assert not (broken.path / "training_complete.json").exists() and not broken.finished("distill")
    distill(broken)
    assert log_of(broken) == log_of(whole)
    assert steps_of(broken) == steps_of(whole)
    assert changed(weights(whole, 7), weights(broken, 7)) == set()


def test_a_checkpoint_is_whole_or_not_there(
    make_run: MakeRun, filled_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(cache=filled_cache)

    def dies(self: DistillationTrainer, output_dir: str) -> None:
        if self.state.global_step == 4:
            assert (Path(output_dir).parent / "model.safetensors").exists()  # the weights are written already
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "_save_scaler", dies)
        with pytest.raises(Killed):
            distill(run)
    assert steps_of(run) == [0, 2]
    assert not run.checkpoint(4).exists()
    assert (run.checkpoint(2) / TRAINING_STATE).exists()
    distill(run)
    assert sorted(path.name for path in run.checkpoints_dir.iterdir()) == [
        "checkpoint-0",
        "checkpoint-2",
        "checkpoint-4",
    ]


def test_killed_after_the_last_checkpoint_only_the_marker_is_made(
    make_run: MakeRun, filled_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(cache=filled_cache)
    distill(run)
    (run.path / "training_complete.json").unlink()
    monkeypatch.setattr(DistillationTrainer, "train", lambda *_, **__: pytest.fail("trains again"))
    distill(run)
    assert (run.path / "training_complete.json").exists()


def test_training_does_not_go_on_without_its_state(
    make_run: MakeRun, filled_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(cache=filled_cache)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            distill(run)
    (run.checkpoint(2) / TRAINING_STATE).rename(run.path / "elsewhere")
    with pytest.raises(UserError, match="checkpoint-2 has no training_state"):
        distill(run)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_with_the_last_good_checkpoint(
    make_run: MakeRun, filled_cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run = make_run(cache=filled_cache)
    true_loss = objective_module.distillation_loss
    calls = iter(range(100))

    def bad(logits: torch.Tensor, *arguments: Any, **options: Any) -> LossParts:
        parts = true_loss(logits, *arguments, **options)
        if next(calls) < 3:
            return parts
        # A square root at zero has a finite value and an infinite slope.
        spoiled = parts.loss * float("nan") if what == "loss" else parts.loss + (logits[0, 0, 0] * 0).sqrt()
        return LossParts(loss=spoiled, ce=parts.ce, kl=parts.kl, tokens=parts.tokens)

    monkeypatch.setattr(objective_module, "distillation_loss", bad)
    with pytest.raises(UserError, match=rf"{what}.* became nan at step 4; checkpoint-2 is the last good one"):
        distill(run)
    assert steps_of(run) == [0, 2]
    assert all(torch.isfinite(parameter).all() for parameter in weights(run, 2).values())


def test_a_live_teacher_gives_the_losses_of_a_full_cache(make_run: MakeRun, filled_cache: Path) -> None:
    cached = make_run("cached")
    live = make_run("live")
    live.config.distillation.teacher.use_cached_logits = False
    generation = cached.config.distillation.teacher.generation
    generation.top_k = 97
    generate_teacher_logits(cached)
    generate_teacher_logits(live)
    assert not live.teacher_logits_dir.exists()
    for run in (cached, live):
        distill(run)
    for one, other in zip(log_of(cached), log_of(live), strict=True):
        for key in ("loss", "ce", "kl"):
            assert one[key] == pytest.approx(other[key], rel=1e-3)


def test_a_live_teacher_with_another_language_is_refused(make_run: MakeRun, tmp_path: Path, words: list[str]) -> None:
    run = make_run()
    teacher = run.config.distillation.teacher
    teacher.use_cached_logits = False
    teacher.model_path = str(save_model(tmp_path / "shuffled", 1, words[::-1]))
    with pytest.raises(UserError, match="another tokenizer"):
        distill(run)
    teacher.model_path = str(save_model(tmp_path / "smaller", 1, words, vocab_size=90))
    with pytest.raises(UserError, match="vocabulary of 90 tokens and the student one of 97.* uses 97"):
        distill(run)


def test_plain_cross_entropy_needs_no_cache(make_run: MakeRun) -> None:
    run = make_run()
    run.config.distillation.loss.alpha = 0.0
    distill(run)
    assert all("kl" not in line and line["loss"] == pytest.approx(line["ce"]) for line in log_of(run))


def test_a_cache_of_something_else_is_refused(make_run: MakeRun, filled_cache: Path) -> None:
    run = make_run(cache=filled_cache)
    run.config.distillation.dataset.max_length = 8
    with pytest.raises(UserError, match="sequence_length is 16 in the cache but 8 is expected"):
        distill(run)
    missing = make_run("missing")
    with pytest.raises(UserError, match="does not exist; run `moe-compress teacher-logits`"):
        distill(missing)
    assert steps_of(run) == steps_of(missing) == [0]


def test_bf16_autocast_keeps_fp32_weights_beside_the_stored_ones(make_run: MakeRun, filled_cache: Path) -> None:
    run = make_run(cache=filled_cache, bf16=True, gradient_checkpointing=True, max_steps=2)
    distill(run)
    master = load_file(run.checkpoint(2) / TRAINING_STATE / "master_weights.safetensors")
    stored = load_file(run.checkpoint(2) / "model.safetensors")
    assert master and all(tensor.dtype == torch.float32 for tensor in master.values())
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    embedding = master["model.embed_tokens.weight"]
    assert torch.equal(embedding.bfloat16(), stored["model.embed_tokens.weight"])
    assert not torch.equal(embedding, stored["model.embed_tokens.weight"].float())


@pytest.mark.parametrize("parameterization", ["delta", "wrapper"])
def test_a_compressed_student_is_trained_and_stays_compressed(
    make_run: MakeRun, filled_cache: Path, student_dir: Path, parameterization: str
) -> None:
    run = make_run(cache=filled_cache, stages=two_stages())
    model = load_model(str(student_dir))
    spec = FitSpec(parameterization=parameterization, delta_rank=4, iterations=2)
    results = {}
    for facts in find_experts(model):
        results[facts.name] = {name: fit(weight, spec).factors for name, weight in expert_weights(facts.module).items()}
    compress_in_memory(model, results)
    tokenizer = load_tokenizer(str(student_dir))
    shutil.rmtree(run.checkpoint(0))
    for part in (model, tokenizer):
        part.save_pretrained(run.checkpoint(0))
    distill(run)
    zero, last = run.checkpoint(0), run.checkpoint(7)
    assert json.loads((last / "config.json").read_text())["quantization_config"]["quant_method"] == "shared_core"
    before, after = load_file(zero / "model.safetensors"), load_file(last / "model.safetensors")
    factors = {name for name in before if ".experts." in name}
    assert {name for name in factors if "delta_in" in name or "v_in" in name}
    assert changed(before, after) == factors | {name for name in before if "self_attn" in name}
    loaded, trained = load_model(str(last)), weights(run, 7)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained[name].to(parameter.dtype))


def test_a_run_without_a_student_and_fsdp_without_torchrun_are_one_line(
    make_run: MakeRun, filled_cache: Path, tmp_path: Path
) -> None:
    run = make_run(cache=filled_cache)
    run.config.fsdp.enabled = True
    with pytest.raises(UserError, match="torchrun"):
        distill(run)
    run.config.fsdp.enabled = False
    run.checkpoint(0).rename(tmp_path / "moved")
    with pytest.raises(UserError, match="checkpoint-0 does not exist"):
        distill(run)
