"""The stage `evaluate`: every checkpoint of a run measured once, the best one linked, samples written, speed timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.evaluation.claims import claimed
from moe_compress.evaluation.extras import measure_speed, write_sample_file
from moe_compress.evaluation.harness import check_tasks, run_tasks
from moe_compress.evaluation.machine import placement
from moe_compress.evaluation.perplexity import held_out_rows, score_text
from moe_compress.evaluation.results import (
    Key,
    Record,
    append_result,
    choose_best,
    latest_results,
    link_best,
    metrics_of,
    read_results,
    settings_fingerprint,
)
from moe_compress.modeling import count_parameters, load_model, load_tokenizer, resolve_model_path

if TYPE_CHECKING:
    from moe_compress.run import Run

STAGE = "evaluate"
BASELINE = "baseline_svd"
_WAIT_SECONDS = 5.0


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


def evaluate_run(run: Run) -> None:
    """Measure teacher, zero-shot student, every checkpoint, and the SVD baseline where there is one, each once.

    Leaves `RUN/evals/results.jsonl`, `samples.json` and `speed.json`, and links `RUN/best`. What was measured with
    the same settings, here or by a watcher, is not measured again; what failed then is tried again.

    Raises:
        UserError: no checkpoint, an unknown task or metric, or a model that could not be measured (after the rest was).
    """
    console = Console()
    check_tasks(run.config.evaluation)
    targets = run_targets(run)
    evaluator = Evaluator(run, console, retry_errors=True)
    if run.finished(STAGE) and not evaluator.pending(targets):
        console.print(f"evaluate: finished already, see {run.evals_dir}", highlight=False, soft_wrap=True)
        return
    with run.stage(STAGE):
        while pending := evaluator.pending(targets):
            if not any([evaluator.measure(target) for target in pending]):
                time.sleep(_WAIT_SECONDS)  # all of it is in the hands of watchers
        evaluator.release()
        update_best(run)
        students = {target.key: target.path for target in targets}
        measured = {key: path for key, path in students.items() if "error" not in evaluator.latest().get(key, {})}
        if ("teacher", 0) in measured and any(model == "student" for model, _ in measured):
            write_sample_file(run, measured)
            measure_speed(run, measured)
    failed = [evaluator.latest()[target.key] for target in targets if "error" in evaluator.latest()[target.key]]
    if failed:
        names = ", ".join(_name(record) for record in failed)
        raise UserError(f"{names} could not be measured: {failed[0]['error']} (all else was, see {run.evals_dir})")


def evaluate_model(
    path: str | Path,
    label: str,
    step: int,
    config: Config,
    teacher: Any = None,
    *,
    model: Any = None,
    rows: torch.Tensor | None = None,
) -> Record:
    """Measure one model on the text and the tasks of the settings.

    Args:
        path: its directory (or hub id).
        label: what to call it in the record.
        step: its training step.
        config: the settings; `evaluation`, `model.dtype` and `seed` are read.
        teacher: a loaded model to compare it with.
        model: the model itself, if it is loaded already.
        rows: the held-out text, if it is packed already (`held_out_rows`).

    Returns:
        The record of `results.jsonl`: text score, tasks, sizes, routing per layer, and what was measured how.

    Raises:
        UserError: the model cannot be loaded, or a setting cannot be used.
    """
    start = time.perf_counter()
    evaluation = config.evaluation
    trust = config.model.trust_remote_code
    tokenizer = load_tokenizer(path, trust_remote_code=trust)
    if model is None:
        model = load_model(path, dtype=config.model.dtype, trust_remote_code=trust, **placement(config))
    if rows is None:
        rows = held_out_rows(config, tokenizer)
    score = asdict(score_text(model, rows, teacher))
    score["sequence_losses"] = [round(loss, 6) for loss in score["sequence_losses"]]
    sizes = count_parameters(model)
    return {
        "model": label,
        "step": step,
        "path": str(path),
        **score,
        "tasks": run_tasks(model, tokenizer, evaluation, config.seed),
        "bytes": sizes.total_bytes,
        "expert_bytes": sizes.expert_bytes,
        "parameters": sizes.total,
        "expert_parameters": sizes.expert,
        "active_parameters": sizes.active,
        "active_bytes": sizes.active_bytes,
        "settings": settings_fingerprint(config),
        "device": str(model.device),
        "seconds": round(time.perf_counter() - start, 2),
        "time": round(time.time(), 1),
    }


class Evaluator:
    """Measures checkpoints of one run, sharing the work with other processes through claims.

    The teacher is loaded when it is first needed and kept.
    """

    def __init__(self, run: Run, console: Console, *, retry_errors: bool = False) -> None:
        """`retry_errors`: whether what failed in another process is tried again (once) in this one."""
        self.run = run
        self.console = console
        self.settings = settings_fingerprint(run.config)
        self._retry_errors = retry_errors
        self._attempted: set[Key] = set()
        self._teacher: Any = None
        self._rows: torch.Tensor | None = None

    def latest(self) -> dict[Key, Record]:
        """The results with the present settings."""
        return latest_results(read_results(self.run.evals_dir), self.settings)

    def pending(self, targets: Iterable[Target]) -> list[Target]:
        """Those targets that are not measured yet."""
        latest = self.latest()
        return [target for target in targets if not self._is_done(target, latest)]

    def measure(self, target: Target) -> bool:
        """Measure one target and append its record, also if it fails; False if another process is at it."""
        claims = self.run.evals_dir / "claims"
        with claimed(claims, f"{target.model}-{target.step}-{self.settings}") as ours:
            if not ours:
                return False
            if self._is_done(target, self.latest()):
                return True
            # Without these nothing can be measured: their failure is not the checkpoint's.
            teacher, rows = self.teacher(), self.rows()
            self._attempted.add(target.key)
            self.console.print(f"evaluating {target.model} {target.path.name}", highlight=False)
            try:
                if target.model == "teacher":
                    record = evaluate_model(target.path, *target.key, self.run.config, model=teacher, rows=rows)
                else:
                    record = evaluate_model(target.path, *target.key, self.run.config, teacher, rows=rows)
            except Exception as error:  # one checkpoint that cannot be measured must not stop the others
                record = _failure(target, error, self.settings)
            if target.path.is_relative_to(self.run.path):  # so that a run can be moved
                record["path"] = str(target.path.relative_to(self.run.path))
            append_result(self.run.evals_dir, record)
            _free_memory()
        self.console.print(_summary(record), highlight=False, soft_wrap=True)
        return True

    def teacher(self) -> Any:
        """The original model, loaded."""
        if self._teacher is None:
            config = self.run.config
            self._teacher = load_model(
                teacher_path(config),
                dtype=config.model.dtype,
                trust_remote_code=config.model.trust_remote_code,
                **placement(config),
            )
        return self._teacher

    def rows(self) -> torch.Tensor:
        """The held-out text `[N, L]`, packed once; the students have the tokenizer of the teacher."""
        if self._rows is None:
            config = self.run.config
            tokenizer = load_tokenizer(teacher_path(config), trust_remote_code=config.model.trust_remote_code)
            self._rows = held_out_rows(config, tokenizer)
        return self._rows

    def release(self) -> None:
        """Let go of the teacher's memory."""
        self._teacher = None
        _free_memory()

    def _is_done(self, target: Target, latest: dict[Key, Record]) -> bool:
        record = latest.get(target.key)
        if record is None:
            return False
        return "error" not in record or target.key in self._attempted or not self._retry_errors


def run_targets(run: Run) -> list[Target]:
    """Everything of a run that is to be measured, the teacher first.

    Raises:
        UserError: the run has no checkpoint.
    """
    students = student_targets(run)
    if not students:
        raise UserError(f"{run.path} has no checkpoint to evaluate; run `moe-compress compress run={run.path}` first")
    targets = [Target("teacher", 0, teacher_path(run.config)), *students]
    baseline = run.path / BASELINE
    if (baseline / "config.yaml").is_file():
        checkpoints = type(run).open(baseline).checkpoints()
        targets += [Target("svd", step, path) for step, path in dict([*checkpoints[:1], *checkpoints[-1:]]).items()]
    return targets


def student_targets(run: Run) -> list[Target]:
    """The complete checkpoints of the run itself, by step."""
    return [Target("student", step, path) for step, path in run.checkpoints()]


def teacher_path(config: Config) -> Path:
    """The directory of the original model."""
    other = config.distillation.teacher.model_path
    return resolve_model_path(other) if other else resolve_model_path(config.model.name, config.model.revision)


def update_best(run: Run) -> None:
    """Link `RUN/best` to the best checkpoint measured so far, if any is."""
    evaluation = run.config.evaluation
    latest = latest_results(read_results(run.evals_dir), settings_fingerprint(run.config))
    best = choose_best(latest.values(), evaluation.metric, evaluation.greater_is_better, run.path)
    if best is not None:
        link_best(run.path, run.path / best["path"])


def _failure(target: Target, error: Exception, settings: str) -> Record:
    text = " ".join(str(error).split()) or type(error).__name__
    if not target.path.exists():
        text = f"{target.path} was deleted before it was measured"
    return {
        "model": target.model,
        "step": target.step,
        "path": str(target.path),
        "error": text if isinstance(error, UserError) else f"{type(error).__name__}: {text}",
        "settings": settings,
        "time": round(time.time(), 1),
    }


def _summary(record: Record) -> str:
    if "error" in record:
        return f"  {_name(record)} FAILED: {record['error']}"
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in metrics_of(record).items())
    lost = [f"\n  task {task} not measured: {entry['error']}" for task, entry in record.get("tasks", {}).items()
            if "error" in entry]  # fmt: skip
    return f"  {_name(record)}: {metrics} ({record['seconds']:.0f} s){''.join(lost)}"


def _name(record: Record) -> str:
    return f"{record['model']} at step {record['step']}"


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
