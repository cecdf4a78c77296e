"""What the stage needs before it begins, and what must not change when it goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_compress.config import Config, StageConfig
from moe_compress.distillation import distill
from moe_compress.distillation.data import TrainingOrder
from moe_compress.distillation.stages import needs_teacher, reads_cache
from moe_compress.errors import UserError
from moe_compress.run import Run

from .conftest import MakeRun
from .test_training import Killed, kill_at, log_of, steps_of


def killed_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Run:
    """A run of 4 steps of 2 sequences that ended in its fourth, after checkpoint-2."""
    run = make_run(per_device_train_batch_size=2, max_steps=4, **options)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            distill(run)
    return run


def test_a_resumed_training_sees_the_rest_of_the_data_or_is_refused(
    make_run: MakeRun, filled_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = killed_run(make_run, monkeypatch, cache=filled_cache)
    seen: list[int] = []
    index = TrainingOrder.index
    monkeypatch.setattr(
        TrainingOrder, "index", lambda self, item: (seen.append(self.first + item), index(self, item))[1]
    )
    training = run.config.distillation.training
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match=r"on 2 sequences a step so far, and 2 \(processes\) x 1 .* x 2 .* are 4"):
            distill(run)
    training.per_device_train_batch_size = 1
    with pytest.raises(UserError, match="set these two in .*config.yaml to make it 2 again"):
        distill(run)
    assert steps_of(run) == [0, 2] and not seen
    training.gradient_accumulation_steps = 2
    distill(run)
    assert seen == [4, 5, 6, 7] and [line["step"] for line in log_of(run)] == [1, 2, 3, 4]


def test_a_training_that_did_not_keep_the_sequences_of_a_step_goes_on(
    make_run: MakeRun, filled_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = killed_run(make_run, monkeypatch, cache=filled_cache)
    manifest = run.path / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["stages"]["distill"]["facts"]["sequences_per_step"]
    manifest.write_text(json.dumps(content))
    distill(run)
    assert steps_of(run) == [0, 2, 4]


def test_before_any_checkpoint_the_batch_may_change(
    make_run: MakeRun, filled_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = killed_run(make_run, monkeypatch, cache=filled_cache, save_steps=4)
    run.config.distillation.training.per_device_train_batch_size = 3
    distill(run)
    assert steps_of(run) == [0, 4] and run.facts("distill")["sequences_per_step"] == 3


@pytest.mark.parametrize(
    ("alpha", "router_weight", "stages", "needed"),
    [
        (0.5, 0.0, [], True),
        (0.0, 0.0, [], False),
        (0.0, 0.1, [], True),
        (0.5, 0.1, [{"kind": "blockwise"}], False),
        (0.5, 0.0, [{"kind": "blockwise"}, {"alpha": 0.0}], False),
        (0.5, 0.0, [{"kind": "blockwise"}, {}], True),
        (0.0, 0.0, [{"kind": "blockwise", "alpha": 1.0}, {}, {"alpha": 0.2}], True),
    ],
)
def test_a_teacher_is_needed_where_a_stage_compares_with_it(
    alpha: float, router_weight: float, stages: list[dict[str, Any]], needed: bool
) -> None:
    distillation = Config().distillation
    distillation.loss.alpha, distillation.loss.router_weight = alpha, router_weight
    distillation.stages = [StageConfig(steps=1, **stage) for stage in stages]
    assert needs_teacher(distillation) == reads_cache(distillation) == needed
    distillation.teacher.use_cached_logits = False
    assert needs_teacher(distillation) == needed and not reads_cache(distillation)
