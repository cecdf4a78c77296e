"""The stage `evaluate` on a real, tiny run: everything once, failures recorded, the best linked, extras written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from moe_compress.errors import UserError
from moe_compress.evaluation import evaluate, machine, measure
from moe_compress.evaluation.evaluate import evaluate_run
from moe_compress.evaluation.evaluator import teacher_path
from moe_compress.evaluation.extras import measure_speed
from moe_compress.evaluation.measure import evaluate_model
from moe_compress.evaluation.results import read_results
from moe_compress.evaluation.teacher_pass import teacher_text
from moe_compress.modeling import count_parameters, load_model
from moe_compress.run import Run
from moe_compress.stages import freezing_stages

from .conftest import LENGTH


@pytest.fixture
def fast_speed(monkeypatch):
    """The timing itself is tested elsewhere."""
    monkeypatch.setattr(evaluate, "measure_speed", lambda run, paths: None)


def keys(run: Run) -> list[tuple[str, int]]:
    return [(record["model"], record["step"]) for record in read_results(run.evals_dir)]


def test_a_run_is_measured_once_and_completely(make_run, fast_speed, monkeypatch):
    run = make_run(0, 4)
    baseline = Run.create(run.path / "baseline_svd", run.config)
    for step in (0, 2, 4):  # of the baseline only the first and the last count
        baseline.checkpoint(step).parent.mkdir(exist_ok=True)
        baseline.checkpoint(step).symlink_to(run.checkpoint(0).resolve(), target_is_directory=True)
    run = Run.open(run.path)
    evaluate_run(run)
    assert keys(run) == [("teacher", 0), ("student", 0), ("student", 4), ("svd", 0), ("svd", 4)]
    teacher, student, *_ = read_results(run.evals_dir)
    assert teacher["kl"] is None and student["kl"] > 0 and 0 < student["top1_agreement"] <= 1
    assert student["tokens"] == 6 * (LENGTH - 1) and len(student["sequence_losses"]) == 6
    sizes = count_parameters(load_model(student_path := run.path / student["path"]))
    assert (student["bytes"], student["active_parameters"]) == (sizes.total_bytes, sizes.active)
    assert student["expert_bytes"] < teacher["expert_bytes"]
    assert set(student["routing"]) == {f"model.layers.{layer}.mlp.experts" for layer in (0, 1)}
    assert student_path == run.checkpoint(0)  # kept relative to the run
    assert (student["loop_samples"], teacher["loop_samples"]) == (16, 16) and 0 <= student["loop_rate"] <= 1
    assert (run.path / "best").is_symlink() and run.finished("evaluate")

    samples = json.loads((run.evals_dir / "samples.json").read_text())["samples"]
    assert list(dict.fromkeys(sample["model"] for sample in samples)) == [
        "teacher", "zero-shot", "distilled", "SVD, distilled",
    ]  # fmt: skip
    assert {sample["decoding"] for sample in samples} == {"greedy", "temperature 0.3"}
    assert any(sample["prompt"] == run.config.evaluation.prompt.rstrip() for sample in samples)

    monkeypatch.setattr(measure, "load_model", None)  # nothing may be loaded again
    evaluate_run(run)
    assert len(keys(run)) == 5


def test_what_comes_later_is_measured_then(make_run, fast_speed):
    run = make_run(0)
    evaluate_run(run)
    run.checkpoint(3).symlink_to(run.checkpoint(0).resolve(), target_is_directory=True)
    evaluate_run(run)
    assert keys(run) == [("teacher", 0), ("student", 0), ("student", 3)]


def test_a_broken_checkpoint_is_recorded_and_tried_again(make_run, fast_speed, student_dir):
    run = make_run(0)
    shutil.copytree(student_dir, run.checkpoint(2))
    weights = run.checkpoint(2) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    run.checkpoint(4).symlink_to(student_dir, target_is_directory=True)
    with pytest.raises(UserError, match="student at step 2 could not be measured: .*checkpoint-2"):
        evaluate_run(run)
    assert keys(run) == [("teacher", 0), ("student", 0), ("student", 2), ("student", 4)]
    assert "error" in read_results(run.evals_dir)[2]
    assert (run.evals_dir / "samples.json").exists()
    shutil.copyfile(student_dir / "model.safetensors", weights)
    evaluate_run(run)
    assert keys(run)[4:] == [("student", 2)]
    assert "error" not in read_results(run.evals_dir)[4]


def test_what_a_user_can_mend_is_said_before_anything_is_measured(make_run, fast_speed):
    run = make_run(0)
    run.config.evaluation.perplexity.name = "/nowhere.txt"
    with pytest.raises(UserError, match="/nowhere.txt"):
        evaluate_run(run)
    run.config.evaluation.devices = ["cuda:99"]
    with pytest.raises(UserError, match="cuda:99"):
        evaluate_run(run)
    assert keys(run) == []


def test_a_run_without_checkpoints(tmp_path, config):
    with pytest.raises(UserError, match="no checkpoint to evaluate"):
        evaluate_run(Run.create(tmp_path / "run", config))


def test_a_teacher_of_its_own_is_frozen_and_may_be_padded(config, student_dir, teacher_dir, tmp_path):
    for stage in ("evaluate", "watch"):
        assert stage in freezing_stages("distillation.teacher.model_path")
    padded = load_model(teacher_dir)
    padded.resize_token_embeddings(320)
    padded.save_pretrained(tmp_path / "padded")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(teacher_dir / name, tmp_path / "padded" / name)
    teacher = teacher_text(tmp_path / "padded", config, tmp_path)
    assert evaluate_model(student_dir, "student", 0, config, teacher)["kl"] > 0


def test_what_is_no_end_is_refused_before_a_model_is_loaded(config, student_dir, teacher_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "load_model", None)
    config.evaluation.perplexity.streaming, config.evaluation.perplexity.max_samples = True, None
    with pytest.raises(UserError, match="is a stream: set max_samples"):
        teacher_text(teacher_dir, config, tmp_path)
    with pytest.raises(UserError, match="is a stream: set max_samples"):
        evaluate_model(student_dir, "student", 0, config)


def test_the_same_model_measures_the_same(config, student_dir, teacher_dir, tmp_path):
    teacher = teacher_text(teacher_dir, config, tmp_path)
    first, second = (evaluate_model(student_dir, "student", 0, config, teacher) for _ in range(2))
    timing = {"seconds", "time"}
    assert {k: v for k, v in first.items() if k not in timing} == {k: v for k, v in second.items() if k not in timing}


def test_samples_and_speed_that_fail_cost_a_line_and_are_tried_again(make_run, monkeypatch, capsys):
    def fail(run, paths):
        raise RuntimeError("no memory\nmore")

    monkeypatch.setattr(evaluate, "write_sample_file", fail)
    monkeypatch.setattr(evaluate, "measure_speed", lambda run, paths: timed.append(paths))
    run, timed = make_run(0), []
    evaluate_run(run)
    assert "writing samples failed: RuntimeError: no memory more" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "write_sample_file", lambda run, paths: None)
    for _ in range(2):
        evaluate_run(run)
    assert len(timed) == 2 and keys(run) == [("teacher", 0), ("student", 0)]


def test_a_task_that_was_lost_is_said_and_tried_again(make_run, fast_speed, monkeypatch):
    results = [{"acc": 0.5}, {"error": "no network"}]
    monkeypatch.setattr(measure, "run_tasks", lambda *_: {"wikitext": results[min(len(keys(run)), 1)]})
    run = make_run(0)
    run.config.evaluation.metric = "wikitext.acc"
    with pytest.raises(UserError, match="^task wikitext could not be measured: no network"):
        evaluate_run(run)
    assert (run.evals_dir / "samples.json").exists()
    results[1] = {"acc": 0.4}
    evaluate_run(run)
    assert keys(run) == [("teacher", 0), ("student", 0), ("student", 0)]
    assert (run.path / "best").exists()


@pytest.fixture
def quick_timing(monkeypatch):
    from moe_compress.evaluation import extras

    for name in ("model_speed", "layer_speed"):
        monkeypatch.setattr(extras, name, lambda *args, **kwargs: {})


def test_all_that_is_timed_is_on_one_device(make_run, quick_timing, monkeypatch):
    # As with two GPUs: what is loaded takes memory from the first.
    devices = iter(["cpu", "meta", "meta"])
    monkeypatch.setattr(machine, "choose_device", lambda config: torch.device(next(devices)))
    run = make_run(0)
    measure_speed(run, {("student", 0): run.checkpoint(0), ("svd", 0): run.checkpoint(0)})
    assert json.loads((run.evals_dir / "speed.json").read_text())["device"] == "cpu"


def test_the_original_is_timed_and_not_another_teacher(make_run, quick_timing, tmp_path):
    run = make_run(0)
    measure_speed(run, {("teacher", 0): tmp_path / "dense", ("student", 0): run.checkpoint(0)})
    assert (run.evals_dir / "speed.json").exists()


def test_speed_is_measured_side_by_side(make_run, monkeypatch):
    from moe_compress.evaluation import extras, timing

    monkeypatch.setattr(extras, "model_speed", lambda *args, **kwargs: {"rows": []})  # see test_speed
    monkeypatch.setattr(timing, "_MOST_CALLS", 1)
    run = make_run(0)
    measured = {("teacher", 0): teacher_path(run.config), ("student", 0): run.checkpoint(0)}
    measure_speed(run, measured)
    speed = json.loads((run.evals_dir / "speed.json").read_text())
    assert speed["svd_values"] == "random" and speed["machine"]["threads"] >= 1
    variants = {(row["tokens"], row["variant"]) for row in speed["layer"]["rows"]}
    assert {(tokens, name) for tokens in (1, 16, 512) for name in ("moe-compress", "per-expert SVD")} < variants
    assert (1, "original, batched_mm") in variants and (512, "original, batched_mm") not in variants
    measure_speed(run, measured | {("svd", 4): run.checkpoint(0)})
    assert json.loads((run.evals_dir / "speed.json").read_text())["svd_values"] == "baseline"
