"""What of a run is to be measured, and `Evaluator`, which measures it, sharing the work with other processes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.evaluation import measure
from moe_compress.evaluation.claims import claimed
from moe_compress.evaluation.results import (
    Key,
    Record,
    append_result,
    choose_best,
    is_of,
    jsonable,
    latest_results,
    link_best,
    lost_tasks,
    read_results,
    settings_fingerprint,
    weights_of,
)
from moe_compress.evaluation.teacher_pass import MOST_DEATHS, teacher_text
from moe_compress.evaluation.teacher_text import TeacherText
from moe_compress.evaluation.trackers import Trackers
from moe_compress.manifest import LOCKS_NAME, locked
from moe_compress.modeling import resolve_model_path
from moe_compress.modeling.checkpoint import read_config, weight_files

if TYPE_CHECKING:
    from moe_compress.run import Run

BASELINE = "baseline_svd"
# Files of a checkpoint that nothing but people and their file systems need.
_FOR_READERS = ("README", "LICENSE", "NOTICE", ".")


@dataclass(frozen=True)
class Target:
    """A model to measure: its label (`teacher`, `student` or `svd`), its training step, and where it is."""

    model: str
    step: int
    path: Path

    @property
    def key(self) -> Key:
        """What tells this measurement from others of the run."""
        return self.model, self.step

    def claim(self, settings: str) -> str:
        """The name of the claim to this measurement with settings of a fingerprint."""
        return f"{self.model}-{self.step}-{settings}"


class Evaluator:
    """Measures checkpoints of one run, sharing the work with other processes through claims."""

    def __init__(
        self, run: Run, say: Callable[[str], None] = print, *, retry_errors: bool = False, device: str = ""
    ) -> None:
        """`retry_errors`: whether what failed before, in whole or for a task, is tried again (once); `device`: what the
        claims say."""
        self.run = run
        self.say = say
        self.settings = settings_fingerprint(run.config)
        self.claims = run.evals_dir / "claims"
        self._device = device
        self._retry_errors = retry_errors
        self._attempted: set[Key] = set()
        self._teacher_text: TeacherText | None = None
        self._trackers = Trackers(run, say)

    def latest(self) -> dict[Key, Record]:
        """The results with the present settings."""
        return latest_results(read_results(self.run.evals_dir), self.settings)

    def pending(self, targets: Iterable[Target]) -> list[Target]:
        """Those targets that are not measured yet."""
        latest = self.latest()
        return [target for target in targets if not self._is_done(target, latest)]

    def measure(self, target: Target) -> bool:
        """Measure one target and append its record, also if it fails; False if another process is at it."""
        # Without it nothing can be measured: what goes wrong with it is not the checkpoint's fault.
        teacher = self.teacher_text()
        with claimed(self.claims, target.claim(self.settings), device=self._device) as attempt:
            if not attempt:
                return False
            if self._is_done(target, self.latest()):
                return True
            self._attempted.add(target.key)
            self.say(f"evaluating {target.model} {target.path.name}")
            weights = weights_of(target.path)
            try:
                if attempt > MOST_DEATHS:
                    raise UserError(f"{attempt - 1} evaluators died at it (out of memory?)")
                score = teacher.score if target.model == "teacher" else None
                record = measure.evaluate_model(target.path, *target.key, self.run.config, teacher, score=score)
            except Exception as error:  # one checkpoint that cannot be measured must not stop the others
                record = failure(target, error, self.settings)
            if target.path.is_relative_to(self.run.path):  # so that a run can be moved
                record["path"] = str(target.path.relative_to(self.run.path))
            record["weights"] = weights
            update_best(self.run, record)
            free_memory()
        self._trackers.log(record)
        return True

    def teacher_text(self) -> TeacherText:
        """What the original makes of the held-out text."""
        if self._teacher_text is None:
            config = self.run.config
            self._teacher_text = teacher_text(teacher_path(config), config, self.run.evals_dir)
            free_memory()
        return self._teacher_text

    def close(self) -> None:
        """Link the best checkpoint, and end what the trackers hold open."""
        update_best(self.run)
        self._trackers.close()

    def _is_done(self, target: Target, latest: dict[Key, Record]) -> bool:
        record = latest.get(target.key)
        if record is None or not is_of(record, target.path):
            return False
        failed = "error" in record or lost_tasks(record)
        return not failed or target.key in self._attempted or not self._retry_errors


def run_targets(run: Run) -> list[Target]:
    """Everything of a run that is to be measured, the teacher first.

    Raises:
        UserError: the run has no checkpoint.
    """
    students = student_targets(run)
    if not students:
        raise no_checkpoint(run)
    targets = [Target("teacher", 0, teacher_path(run.config)), *students]
    baseline = run.path / BASELINE
    if (baseline / "config.yaml").is_file():
        checkpoints = type(run).open(baseline).checkpoints()
        targets += [Target("svd", step, path) for step, path in dict([*checkpoints[:1], *checkpoints[-1:]]).items()]
    return targets


def student_targets(run: Run) -> list[Target]:
    """The checkpoints of the run itself, by step."""
    return [Target("student", step, path) for step, path in run.checkpoints()]


def is_whole(target: Target) -> bool:
    """Whether weights, config, tokenizer and code are there: not of a checkpoint that somebody is still copying."""
    try:
        weight_files(target.path)
        read_config(target.path)
    except UserError:
        return False
    beside = [file.name for file in target.path.with_name("checkpoint-0").glob("*") if file.is_file()]
    needed = [name for name in beside if ".safetensors" not in name and not name.startswith(_FOR_READERS)]
    return all((target.path / name).exists() for name in needed)


def no_checkpoint(run: Run) -> UserError:
    """The error of a run that has nothing to measure yet."""
    return UserError(f"{run.path} has no checkpoint to evaluate; run `moe-compress compress run={run.path}` first")


def teacher_path(config: Config) -> Path:
    """The directory of the original model."""
    other = config.distillation.teacher.model_path
    return resolve_model_path(other) if other else resolve_model_path(config.model.name, config.model.revision)


def update_best(run: Run, *new: Record) -> None:
    """Append new records, and link `RUN/best` to the best checkpoint of all, in one step for all processes.

    The link comes first: a trainer may delete a checkpoint as soon as its record is there, but not the best one.

    Raises:
        UserError: no record has the metric of the settings.
    """
    evaluation = run.config.evaluation
    with locked(run.path / LOCKS_NAME / "best", wait=True):
        records = [*read_results(run.evals_dir), *map(jsonable, new)]
        latest = latest_results(records, settings_fingerprint(run.config))
        try:
            best = choose_best(latest.values(), evaluation.metric, evaluation.greater_is_better, run.path)
            if best is not None:
                link_best(run.path, run.path / best["path"])
        finally:
            for record in new:
                append_result(run.evals_dir, record)


def failure(target: Target, error: Exception, settings: str) -> Record:
    """The record of a target that could not be measured."""
    if not target.path.exists():
        error = UserError(f"{target.path} was deleted before it was measured")
    return {
        "model": target.model,
        "step": target.step,
        "path": str(target.path),
        "error": error_text(error),
        "settings": settings,
        "time": round(time.time(), 1),
    }


def error_text(error: Exception) -> str:
    """An error in one line, with its type unless it is the user's mistake."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def require_measured(run: Run, records: Iterable[Record]) -> None:
    """Name what could not be measured.

    Raises:
        UserError: one of the records is of a failure, or lacks a task.
    """
    failed: dict[str, str] = {}
    for record in records:
        if "error" in record:
            failed[f"{record['model']} at step {record['step']}"] = record["error"]
        for task, error in lost_tasks(record).items():
            failed[f"task {task}"] = error
    if failed:
        error = next(iter(failed.values()))
        raise UserError(f"{', '.join(failed)} could not be measured: {error} (what was, is in {run.evals_dir})")


def free_memory() -> None:
    """Give back the memory of models that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
