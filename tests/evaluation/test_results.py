"""Results: what counts as the latest, which checkpoint is best, and how it is linked."""

from __future__ import annotations

import json
import math

import pytest

from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.evaluation.results import (
    append_result,
    choose_best,
    latest_results,
    link_best,
    metrics_of,
    read_results,
    settings_fingerprint,
    weights_of,
)


def record(step: int, model: str = "student", **values: object) -> dict:
    return {"model": model, "step": step, "path": f"checkpoints/checkpoint-{step}", "settings": "s", **values}


def test_records_go_to_json_and_back(tmp_path):
    append_result(tmp_path, record(0, loss=math.nan, perplexity=math.inf, sequence_losses=[1.0, math.nan]))
    with (tmp_path / "results.jsonl").open("a") as stream:
        stream.write('{"model": "stu')  # another process is writing
    (found,) = read_results(tmp_path)
    assert (found["loss"], found["perplexity"], found["sequence_losses"]) == (None, None, [1.0, None])
    assert "NaN" not in (tmp_path / "results.jsonl").read_text()
    assert read_results(tmp_path / "none") == []


def test_latest_is_per_model_step_and_settings():
    records = [
        record(0, perplexity=9.0),
        record(0, perplexity=8.0),
        record(0, "svd", perplexity=7.0),
        record(0, perplexity=1.0) | {"settings": "other"},
        record(5, error="lost"),
        record(0, error="came later"),
    ]
    latest = latest_results(records, "s")
    assert latest["student", 0]["perplexity"] == 8.0
    assert latest["svd", 0]["perplexity"] == 7.0
    assert latest["student", 5]["error"] == "lost"
    assert latest_results([*records, record(5, perplexity=2.0)], "s")["student", 5]["perplexity"] == 2.0


def test_fingerprint_follows_what_is_measured():
    base = settings_fingerprint(Config())
    changed, same = Config(), Config()
    changed.evaluation.perplexity.max_length = 7
    same.evaluation.poll_seconds = 1.0
    same.evaluation.devices = ["cpu"]
    same.distillation.teacher.model_path = same.model.name
    other = Config()
    other.distillation.teacher.model_path = "another/teacher"
    assert settings_fingerprint(changed) != base == settings_fingerprint(same) != settings_fingerprint(other)


def test_metrics_by_name():
    tasks = {"next": {"acc": 0.5, "acc_stderr": 0.1, "few_shot": 0, "documents": 9}, "lost": {"error": "no network"}}
    assert metrics_of(record(0, perplexity=3.0, kl=None, tasks=tasks)) == {"perplexity": 3.0, "next.acc": 0.5}


def test_best_is_chosen_among_existing_students(tmp_path):
    for step in (0, 1, 2, 3):
        (tmp_path / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
    records = [
        record(0, perplexity=9.0, kl=0.1),
        record(1, perplexity=3.0, kl=0.3),
        record(2, perplexity=3.0, kl=0.2),
        record(3, error="broken"),
        record(4, perplexity=1.0, kl=0.0),  # deleted by rotation
        record(0, "teacher", perplexity=0.5),
    ]
    assert choose_best(records, "perplexity", False, tmp_path)["step"] == 1
    assert choose_best(records, "kl", True, tmp_path)["step"] == 1
    assert choose_best(records, "kl", False, tmp_path)["step"] == 0
    assert choose_best([], "kl", False, tmp_path) is None
    with pytest.raises(UserError, match="'accuracy', which was not measured; choose one of: kl, perplexity"):
        choose_best(records, "accuracy", True, tmp_path)


def test_what_was_trained_again_is_not_the_best_by_its_old_score(tmp_path):
    for step in (0, 1):
        (tmp_path / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"checkpoints/checkpoint-{step}/config.json").write_text(f'{{"step": {step}}}')
    weights = [weights_of(tmp_path / f"checkpoints/checkpoint-{step}") for step in (0, 1)]
    old, now = record(1, kl=0.1, weights=weights[0]), record(0, kl=0.2, weights=weights[0])
    assert choose_best([old, now], "kl", False, tmp_path) == now
    assert choose_best([old | {"weights": weights[1]}, now], "kl", False, tmp_path)["step"] == 1


def test_a_metric_that_may_come_yet_is_not_refused(tmp_path):
    (tmp_path / "checkpoints/checkpoint-0").mkdir(parents=True)
    lost = {"next": {"error": "no network"}}
    for metric, values in (
        ("perplexity", {"perplexity": None, "load_entropy": 0.9}),
        ("next.acc", {"kl": 0.1, "tasks": lost}),
        ("next.ppl", {"kl": 0.1, "tasks": {"next": {"ppl": None}}}),
    ):
        assert choose_best([record(0, **values)], metric, False, tmp_path) is None
    with pytest.raises(UserError, match="'accuracy', which was not measured"):
        choose_best([record(0, kl=0.1, tasks=lost)], "accuracy", False, tmp_path)


def test_best_is_a_relative_link_that_can_be_moved(tmp_path):
    run = tmp_path / "run"
    for step in (0, 1):
        (run / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoints/checkpoint-{step}/config.json").write_text(json.dumps(step))
        link_best(run, run / f"checkpoints/checkpoint-{step}")
    moved = run.rename(tmp_path / "moved")
    assert json.loads((moved / "best/config.json").read_text()) == 1
    assert sorted(path.name for path in moved.iterdir()) == ["best", "checkpoints"]
