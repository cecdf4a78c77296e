"""Spikes: what counts as one, skipping its update, and going back past its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from moe_compress.config import SpikeConfig, StageConfig
from moe_compress.distillation import DistillationTrainer, distill
from moe_compress.distillation.data import TrainingOrder
from moe_compress.distillation.objective import Measured, Objective
from moe_compress.distillation.spikes import SpikeDetector
from moe_compress.errors import UserError
from moe_compress.run import Run

from .conftest import MakeRun
from .test_training import Killed, changed, kill_at, log_of, steps_of, weights


def spikes_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.logs_dir / "spikes.jsonl").read_text().splitlines()]


def watch(run: Run, action: str, **options: Any) -> Run:
    run.config.distillation.training.spikes = SpikeConfig(action=action, window=4, **options)
    return run


def spoil(monkeypatch: pytest.MonkeyPatch, run: Run, positions: set[int], seen: list[int]) -> None:
    """Make the loss of the sequences at these positions of the order a hundred times as large."""
    first = {tuple(TrainingOrderOf(run)[position]["input_ids"]): position for position in range(22)}
    measure = Objective.__call__

    def spoiled(self: Objective, model: Any, inputs: Any, *arguments: Any) -> Measured:
        batch = [first[tuple(row)] for row in inputs["input_ids"].tolist()]
        seen.extend(batch)
        found = measure(self, model, inputs, *arguments)
        return Measured(100 * found.loss, found.sums) if positions & set(batch) else found

    monkeypatch.setattr(Objective, "__call__", spoiled)


def TrainingOrderOf(run: Run) -> TrainingOrder:
    from moe_compress.distillation.reader import TeacherCache

    return TrainingOrder(TeacherCache(run.teacher_logits_dir), seed=run.config.seed, first=0, count=22)


def test_a_spike_is_far_above_the_running_median_and_does_not_move_it(tmp_path: Path) -> None:
    detector = SpikeDetector(SpikeConfig(action="skip", window=4, loss_factor=2.0, grad_norm_factor=5.0))
    assert detector.check(50.0, 1.0) is None  # nothing to compare with yet
    assert [detector.check(1.0, 1.0) for _ in range(4)] == [None] * 4
    spike = detector.check(2.1, 1.0)
    assert spike is not None and spike.loss_median == 1.0 and detector.in_a_row == 1
    assert detector.check(1.9, 1.0) is None and detector.in_a_row == 0
    assert detector.check(1.0, 5.1) is not None
    detector.save(tmp_path, 3)
    again = SpikeDetector(detector.settings)
    again.load(tmp_path)
    assert (again.losses, again.grad_norms, again.in_a_row) == (detector.losses, detector.grad_norms, 1)


def test_losses_that_are_not_positive_are_no_spikes() -> None:
    detector = SpikeDetector(SpikeConfig(action="skip", window=4, loss_factor=2.0))
    assert [detector.check(loss, 1.0) for loss in (-0.01, -0.012, -0.011, -0.01, -0.009)] == [None] * 5
    assert detector.check(0.05, 1.0) is not None and detector.check(0.0, 1.0) is None


def test_a_skipped_step_leaves_weights_and_momenta_alone(
    make_run: MakeRun, filled_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = watch(make_run(cache=filled_cache, save_steps=1, max_steps=6, gradient_accumulation_steps=2), "skip")
    spoil(monkeypatch, run, {15}, [])  # in the second half of step 4
    momenta: dict[int, torch.Tensor] = {}
    training_step = DistillationTrainer.training_step

    def look(self: DistillationTrainer, *arguments: Any) -> torch.Tensor:
        state = self.optimizer.state
        momenta[self.state.global_step] = sum((s["exp_avg"].abs().sum() for s in state.values()), torch.zeros(()))
        return training_step(self, *arguments)

    monkeypatch.setattr(DistillationTrainer, "training_step", look)
    distill(run)
    (spike,) = spikes_of(run)
    assert (spike["step"], spike["action"]) == (4, "skip") and spike["loss"] > 2 * spike["loss_median"]
    assert changed(weights(run, 3), weights(run, 4)) == set()
    assert changed(weights(run, 4), weights(run, 5)) != set()
    assert momenta[3] == momenta[4] != momenta[5]
    assert steps_of(run) == [0, 1, 2, 3, 4, 5, 6]


def test_a_rollback_goes_on_in_other_data_and_survives_a_kill(
    make_run: MakeRun, filled_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [
        StageConfig(name="one", steps=7, lr_scheduler_type="constant"),
        StageConfig(name="two", steps=2, lr_scheduler_type="constant"),
    ]
    whole = watch(make_run("whole", cache=filled_cache, stages=stages, save_steps=2), "rollback")
    seen: list[int] = []
    spoil(monkeypatch, whole, {7}, seen)  # in step 4, after checkpoint-2
    distill(whole)
    (spike,) = spikes_of(whole)
    assert (spike["step"], spike["action"]) == (4, "rollback")
    # Steps 3 and 4 are done again with the data of what would have been steps 5 and 6, and so on.
    assert seen == [*range(8), *range(8, 22)]
    assert [line["step"] for line in log_of(whole)] == list(range(1, 10))
    assert steps_of(whole) == [0, 2, 4, 6, 7, 8, 9]

    broken = watch(make_run("broken", cache=filled_cache, stages=stages, save_steps=2), "rollback")
    for step in (5, 8):  # after the return, and in the next stage
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                distill(broken)
    distill(broken)
    assert log_of(broken) == log_of(whole)
    assert [line["step"] for line in spikes_of(broken)] == [4]
    assert changed(weights(whole, 9), weights(broken, 9)) == set()


@pytest.mark.parametrize("known", [True, False], ids=["norm", "no norm"])
def test_a_resumed_training_logs_a_spike_once(
    make_run: MakeRun, filled_cache: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    run = watch(make_run(cache=filled_cache, max_steps=6, save_steps=4, gradient_accumulation_steps=2), "skip")
    spoil(monkeypatch, run, {9}, [])  # in step 3
    if not known:  # as DeepSpeed may have it
        monkeypatch.setattr(Trainer, "_get_grad_norm", lambda self, model, grad_norm=None: None)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            distill(run)
    assert len(spikes_of(run)) == 1
    distill(run)
    assert [spike["step"] for spike in spikes_of(run)] == [3]


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_spikes_without_end_stop_the_training(
    make_run: MakeRun, filled_cache: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    run = watch(make_run(cache=filled_cache, max_steps=10, save_steps=2), action, limit=2)
    spoil(monkeypatch, run, set(range(6, 22)), [])
    message = "the last 3 steps were spikes" if action == "skip" else "3 spikes after checkpoint-2"
    with pytest.raises(UserError, match=message):
        distill(run)
    assert len(spikes_of(run)) == 3
