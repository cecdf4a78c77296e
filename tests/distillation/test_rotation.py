"""Which checkpoints are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_compress.config import Config
from moe_compress.distillation.checkpoints import TRAINING_STATE, WATCHERS, rotate
from moe_compress.evaluation.claims import process_identity
from moe_compress.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with checkpoints 0, 5, 10, ... 30, all of them with training state."""
    run = Run(tmp_path, Config())
    for step in range(0, 31, 5):
        folder = run.checkpoint(step) / TRAINING_STATE
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
        for name in ("config.json", "model.safetensors"):
            (run.checkpoint(step) / name).write_text("{}")
    run.evals_dir.mkdir()
    return run


def steps(run: Run) -> list[int]:
    return [step for step, _ in run.checkpoints()]


def results(run: Run, *lines: object) -> None:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (run.evals_dir / "results.jsonl").write_text(text)


def test_the_newest_and_the_zero_shot_are_kept(run: Run) -> None:
    rotate(run, 3)
    assert steps(run) == [0, 20, 25, 30]
    assert sorted(path.name for path in run.checkpoints_dir.iterdir()) == sorted(f"checkpoint-{s}" for s in steps(run))


def test_only_the_newest_can_be_resumed(run: Run) -> None:
    rotate(run, 3)
    # That of the zero-shot student would not be ours.
    assert [s for s in steps(run) if (run.checkpoint(s) / TRAINING_STATE).exists()] == [0, 30]


def test_the_target_of_best_is_kept(run: Run) -> None:
    (run.path / "best").symlink_to(Path("checkpoints") / "checkpoint-10")
    rotate(run, 1)
    assert steps(run) == [0, 10, 30]
    assert (run.path / "best" / "config.json").exists()


def test_a_dangling_best_protects_nothing(run: Run) -> None:
    (run.path / "best").symlink_to("nowhere")
    rotate(run, 1)
    assert steps(run) == [0, 30]


def test_what_a_watcher_has_not_evaluated_is_kept(run: Run) -> None:
    (run.evals_dir / WATCHERS).mkdir()
    watcher = run.evals_dir / WATCHERS / "host-1.json"
    watcher.write_text(json.dumps(process_identity()))
    rotate(run, 1)
    assert steps(run) == list(range(0, 31, 5))
    results(
        run,
        {"model": "teacher", "step": 5},
        {"model": "student", "step": 10, "perplexity": 3.0},
        {"model": "student", "step": 15, "error": "out of memory"},
        {"model": "student", "step": 20, "perplexity": 2.0},
        '{"model": "student", "st',
    )
    rotate(run, 1)
    assert steps(run) == [0, 5, 25, 30]
    results(run, {"model": "student", "step": 5, "weights": "of a training before"})
    rotate(run, 1)
    assert steps(run) == [0, 5, 25, 30]
    watcher.write_text(json.dumps({**process_identity(), "started": "before"}))  # killed: its file stays
    rotate(run, 1)
    assert steps(run) == [0, 30]


@pytest.mark.parametrize("limit", [0, -1, 50])
def test_no_limit_keeps_all(run: Run, limit: int) -> None:
    rotate(run, limit)
    assert steps(run) == list(range(0, 31, 5))
