"""A worker: each checkpoint exactly once, whoever else works, whatever is broken, until training has ended."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_compress.errors import UserError
from moe_compress.evaluation import evaluator, measure
from moe_compress.evaluation.claims import claimed
from moe_compress.evaluation.results import read_results, settings_fingerprint
from moe_compress.evaluation.teacher_pass import teacher_text
from moe_compress.evaluation.worker import Orders, work
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
            "settings": settings_fingerprint(config),
        }  # fmt: skip

    monkeypatch.setattr(measure, "evaluate_model", quick)
    monkeypatch.setattr(evaluator, "teacher_text", lambda *_: SimpleNamespace(score=None))
    return steps


def complete(run: Run) -> None:
    (run.path / "training_complete.json").write_text("{}")


def test_watches_until_training_is_complete_and_all_is_measured(make_run, measured, student_dir):
    run = make_run(0)
    watcher = threading.Thread(target=work, args=(run,), daemon=True)
    watcher.start()
    for step in (2, 4, 6):
        time.sleep(0.1)
        assert watcher.is_alive()
        run.checkpoint(step).symlink_to(student_dir, target_is_directory=True)
    complete(run)
    watcher.join(120)
    assert not watcher.is_alive()
    assert measured == [0, 2, 4, 6]
    assert (run.path / "best").resolve() == run.checkpoint(6).resolve()
    work(run)
    assert measured == [0, 2, 4, 6]


def test_a_failing_checkpoint_stops_nothing_and_is_not_tried_again(make_run, measured):
    run = make_run(0, 13, 20)
    complete(run)
    work(run)
    work(run)
    assert measured == [0, 13, 20]
    failure = read_results(run.evals_dir)[1]
    assert failure["error"] == "RuntimeError: out of luck second line"
    assert (failure["model"], failure["step"], failure["path"]) == ("student", 13, "checkpoints/checkpoint-13")


def test_a_checkpoint_that_was_trained_again_is_measured_again(make_run, measured, teacher_dir, monkeypatch):
    run = make_run(0, 2)
    work(run, once=True)
    run.checkpoint(2).unlink()
    run.checkpoint(2).symlink_to(teacher_dir, target_is_directory=True)
    work(run, once=True)
    assert measured == [0, 2, 2]
    run.checkpoint(0).unlink()
    run.checkpoint(0).symlink_to(teacher_dir, target_is_directory=True)
    monkeypatch.setattr(measure, "evaluate_model", None)  # it cannot be measured now, which is tried once
    for _ in range(2):
        work(run, once=True)
    assert len(read_results(run.evals_dir)) == 4
    assert evaluator.Evaluator(run).latest()["student", 0]["error"]


def test_a_checkpoint_renamed_away_while_it_is_looked_at_is_none(make_run, monkeypatch):
    run = make_run(0)
    run.checkpoint(2).mkdir()
    iterdir = Path.iterdir

    def late(path):
        if path.name == "checkpoint-2":
            path.rename(path.with_name(".removed"))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", late)
    assert [step for step, _ in run.checkpoints()] == [0]


def test_what_is_not_a_complete_checkpoint_is_not_touched(make_run, measured):
    run = make_run(0)
    (run.checkpoints_dir / ".checkpoint-5.partial").mkdir()
    run.checkpoint(7).mkdir()
    (run.checkpoint(7) / "config.json").write_text("{}")
    work(run, once=True)
    assert measured == [0]


def test_once_ends_although_training_goes_on(make_run, measured):
    work(make_run(0, 2), once=True)
    assert measured == [0, 2]


def claim_name(run: Run, step: int) -> str:
    return f"student-{step}-{settings_fingerprint(run.config)}"


def test_a_stale_claim_is_taken_over_and_a_live_one_is_not(make_run, measured):
    run = make_run(0, 2)
    claims = run.evals_dir / "claims"
    claims.mkdir(parents=True)
    leave_claim(claims, claim_name(run, 0), pid=dead_pid())
    live = leave_claim(claims, claim_name(run, 2))  # this very process, which lives
    work(run, once=True)
    assert measured == [0]
    complete(run)
    watcher = threading.Thread(target=work, args=(run,), daemon=True)
    watcher.start()
    time.sleep(0.3)
    assert watcher.is_alive() and measured == [0]  # it waits for the owner of the live claim
    live.write_text(json.dumps({**json.loads(live.read_text()), "pid": dead_pid()}))
    watcher.join(120)
    assert measured == [0, 2]


def test_watchers_share_a_run(make_run, measured):
    run = make_run(*range(0, 12, 2))
    complete(run)
    watchers = [threading.Thread(target=work, args=(Run.open(run.path),), daemon=True) for _ in range(3)]
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join(120)
    assert sorted(measured) == list(range(0, 12, 2))


def test_a_deleted_checkpoint_is_recorded(make_run, monkeypatch):
    run = make_run(0)

    def teacher(*_):
        run.checkpoint(0).unlink()
        return SimpleNamespace(score=None)

    monkeypatch.setattr(evaluator, "teacher_text", teacher)
    work(run, once=True)
    (failure,) = read_results(run.evals_dir)
    assert failure["error"].endswith("checkpoint-0 was deleted before it was measured")


def test_the_newest_first(make_run, measured, student_dir, monkeypatch):
    run = make_run(0, 2, 4)
    run.config.evaluation.order = "newest"
    complete(run)
    quick = measure.evaluate_model

    def and_one_more(path, label, step, *args, **options):
        if step == 4:
            run.checkpoint(6).symlink_to(student_dir, target_is_directory=True)  # which overtakes those that wait
        return quick(path, label, step, *args, **options)

    monkeypatch.setattr(measure, "evaluate_model", and_one_more)
    work(run)
    assert measured == [4, 6, 2, 0]


def test_what_a_file_system_leaves_behind_is_not_waited_for(make_run, measured):
    run = make_run(0, 2)
    own = run.checkpoint(0).resolve()
    run.checkpoint(0).unlink()
    shutil.copytree(own, run.checkpoint(0))
    (run.checkpoint(0) / ".README.md.7.tmp").touch()
    work(run, once=True)
    assert measured == [0, 2]


def test_a_checkpoint_still_being_copied_can_wait(make_run, measured, student_dir):
    run = make_run(0)
    shutil.copytree(student_dir, run.checkpoint(2))
    weights = run.checkpoint(2) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    work(run, once=True)
    assert measured == [0]
    weights.write_bytes(whole)
    work(run, once=True)
    assert measured == [0, 2]


@pytest.mark.parametrize("name, part", [("config.json", '{"model_type": '), ("tokenizer.json", None)])
def test_a_checkpoint_waits_for_its_config_and_tokenizer(make_run, measured, student_dir, name, part):
    run = make_run(0)
    shutil.copytree(student_dir, run.checkpoint(2))
    file = run.checkpoint(2) / name
    whole = file.read_text()
    file.unlink() if part is None else file.write_text(part)
    work(run, once=True)
    assert measured == [0]
    file.write_text(whole)
    work(run, once=True)
    assert measured == [0, 2]


def test_what_is_incomplete_at_the_end_is_recorded(make_run, student_dir):
    run = make_run(0)
    shutil.copytree(student_dir, run.checkpoint(2))
    weights = run.checkpoint(2) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    complete(run)
    work(run)
    done, failure = read_results(run.evals_dir)
    assert (done["step"], failure["step"]) == (0, 2) and done["kl"] > 0
    assert "truncated or damaged" in failure["error"]


def test_what_kills_its_evaluators_is_given_up(make_run, measured):
    run = make_run(0, 2)
    claims = run.evals_dir / "claims"
    for number in range(2):
        leave_claim(claims, claim_name(run, 0), number, pid=dead_pid())
    work(run, once=True)
    failure, done = read_results(run.evals_dir)
    assert failure["error"] == "2 evaluators died at it (out of memory?)" and done["step"] == 2
    assert measured == [2] and not list(claims.iterdir())


def test_the_teacher_is_scored_once_by_one_of_many(config, teacher_dir, tmp_path, monkeypatch):
    passes: list[object] = []
    load = measure.load
    monkeypatch.setattr("moe_compress.evaluation.teacher_pass.load", lambda *args: passes.append(args) or load(*args))
    texts: list[object] = []
    threads = [
        threading.Thread(target=lambda: texts.append(teacher_text(teacher_dir, config, tmp_path)), daemon=True)
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(passes) == 1 and len({text.path for text in texts}) == 1 and len(texts) == 3
    teacher_text(teacher_dir, config, tmp_path)
    assert len(passes) == 1
    config.evaluation.perplexity.max_samples = 5  # another text is another file
    assert teacher_text(teacher_dir, config, tmp_path).score.sequences == 5
    assert len(passes) == 2


def test_a_teacher_that_kills_ends_it(config, teacher_dir, tmp_path, monkeypatch):
    def die(path, *_):
        leave_claim(tmp_path / "claims", path.stem, 1, pid=dead_pid())
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_compress.evaluation.teacher_pass._make", die)
    with pytest.raises(KeyboardInterrupt):
        teacher_text(teacher_dir, config, tmp_path)
    with pytest.raises(UserError, match="2 processes died while scoring the teacher"):
        teacher_text(teacher_dir, config, tmp_path)


def test_orders_survive_their_way(config):
    from dataclasses import asdict

    from moe_compress.schema import flatten

    config.evaluation.devices = ["cuda:2", "cuda:3"]
    config.evaluation.prompt = "class ${X}:\n    'é'"
    text = json.dumps(asdict(Orders("r", flatten(config), ["cuda:3"], True, 1)))
    received = Orders(**json.loads(text)).config()
    assert received.evaluation.devices == ["cuda:3"]
    config.evaluation.devices = ["cuda:3"]
    assert received == config


def test_the_best_is_linked_before_its_record_is_there(make_run, measured, monkeypatch):
    run = make_run(0, 2)
    append = evaluator.append_result

    def look_then_append(directory, record):
        assert (run.path / "best").resolve() == run.path.joinpath(record["path"]).resolve()
        append(directory, record)

    monkeypatch.setattr(evaluator, "append_result", look_then_append)
    monkeypatch.setattr(evaluator.Trackers, "log", lambda self, record: pytest.fail("opened before the best is linked"))
    with pytest.raises(pytest.fail.Exception):
        work(run, once=True)
    assert len(read_results(run.evals_dir)) == 1


def test_a_result_is_not_repeated_by_whoever_waited_for_the_claim(make_run, measured):
    run = make_run(0)
    first, second = evaluator.Evaluator(run), evaluator.Evaluator(run)
    (target,) = second.pending(evaluator.student_targets(run))
    with claimed(first.claims, target.claim(first.settings)):
        assert not second.measure(target)
    assert first.measure(target) and second.measure(target)
    assert measured == [0]
