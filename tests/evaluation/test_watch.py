"""The watcher: each checkpoint exactly once, whoever else watches, whatever is broken, until training has ended."""

from __future__ import annotations

import json
import threading
import time

import pytest

from moe_compress.evaluation import evaluate
from moe_compress.evaluation.results import read_results
from moe_compress.evaluation.watch import watch
from moe_compress.run import Run

from .test_claims import dead_pid, leave_claim


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """Steps measured, in order; the measurement itself is quick, and fails at step 13."""
    steps: list[int] = []

    def quick(path, label, step, config, teacher=None, **_):
        steps.append(step)
        if step == 13:
            raise RuntimeError("out of luck\nsecond line")
        return {
            "model": label, "step": step, "path": str(path), "perplexity": 100.0 - step, "seconds": 0,
            "settings": evaluate.settings_fingerprint(config),
        }  # fmt: skip

    monkeypatch.setattr(evaluate, "evaluate_model", quick)
    monkeypatch.setattr(evaluate.Evaluator, "teacher", lambda self: None)
    monkeypatch.setattr(evaluate.Evaluator, "rows", lambda self: None)
    return steps


def complete(run: Run) -> None:
    (run.path / "training_complete.json").write_text("{}")


def test_watches_until_training_is_complete_and_all_is_measured(make_run, measured, student_dir):
    run = make_run(0)
    watcher = threading.Thread(target=watch, args=(run,), daemon=True)
    watcher.start()
    for step in (2, 4, 6):
        time.sleep(0.1)
        assert watcher.is_alive()
        assert list((run.evals_dir / "watchers").iterdir())  # the trainer sees that somebody watches
        run.checkpoint(step).symlink_to(student_dir, target_is_directory=True)
    complete(run)
    watcher.join(120)
    assert not watcher.is_alive()
    assert measured == [0, 2, 4, 6]
    assert (run.path / "best").resolve() == run.checkpoint(6).resolve()
    assert not (run.evals_dir / "watchers").exists()
    watch(run)
    assert measured == [0, 2, 4, 6]


def test_a_failing_checkpoint_stops_nothing_and_is_not_tried_again(make_run, measured):
    run = make_run(0, 13, 20)
    complete(run)
    watch(run)
    watch(run)
    assert measured == [0, 13, 20]
    failure = read_results(run.evals_dir)[1]
    assert failure["error"] == "RuntimeError: out of luck second line"
    assert (failure["model"], failure["step"], failure["path"]) == ("student", 13, "checkpoints/checkpoint-13")


def test_what_is_not_a_complete_checkpoint_is_not_touched(make_run, measured):
    run = make_run(0)
    (run.checkpoints_dir / ".checkpoint-5.partial").mkdir()
    run.checkpoint(7).mkdir()
    (run.checkpoint(7) / "config.json").write_text("{}")
    watch(run, once=True)
    assert measured == [0]


def test_once_ends_although_training_goes_on(make_run, measured):
    watch(make_run(0, 2), once=True)
    assert measured == [0, 2]


def claim_name(run: Run, step: int) -> str:
    return f"student-{step}-{evaluate.settings_fingerprint(run.config)}"


def test_a_stale_claim_is_taken_over_and_a_live_one_is_not(make_run, measured):
    run = make_run(0, 2)
    claims = run.evals_dir / "claims"
    claims.mkdir(parents=True)
    leave_claim(claims, claim_name(run, 0), pid=dead_pid())
    live = leave_claim(claims, claim_name(run, 2))  # this very process, which lives
    watch(run, once=True)
    assert measured == [0]
    complete(run)
    watcher = threading.Thread(target=watch, args=(run,), daemon=True)
    watcher.start()
    time.sleep(0.3)
    assert watcher.is_alive() and measured == [0]  # it waits for the owner of the live claim
    live.write_text(json.dumps({**json.loads(live.read_text()), "pid": dead_pid()}))
    watcher.join(120)
    assert measured == [0, 2]


def test_watchers_share_a_run(make_run, measured):
    run = make_run(*range(0, 12, 2))
    complete(run)
    watchers = [threading.Thread(target=watch, args=(Run.open(run.path),), daemon=True) for _ in range(3)]
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join(120)
    assert sorted(measured) == list(range(0, 12, 2))


def test_a_deleted_checkpoint_is_recorded(make_run, monkeypatch):
    run = make_run(0)
    monkeypatch.setattr(evaluate.Evaluator, "teacher", lambda self: None)
    monkeypatch.setattr(evaluate.Evaluator, "rows", lambda self: run.checkpoint(0).unlink())
    watch(run, once=True)
    (failure,) = read_results(run.evals_dir)
    assert failure["error"].endswith("checkpoint-0 was deleted before it was measured")
