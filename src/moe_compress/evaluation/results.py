"""`RUN/evals/results.jsonl`: one JSON line per measured checkpoint, and the best of them linked as `RUN/best`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from moe_compress.config import Config
from moe_compress.distillation.fingerprints import teacher_fingerprint
from moe_compress.errors import UserError
from moe_compress.files import append_line, fingerprint

Record = dict[str, Any]
Key = tuple[str, int]

RESULTS = "results.jsonl"


def settings_fingerprint(config: Config) -> str:
    """A hash of the settings that decide what a measurement says; other values make another measurement."""
    evaluation = config.evaluation
    teacher = config.distillation.teacher.model_path
    measured = {
        "tasks": evaluation.tasks,
        "include_path": evaluation.include_path,
        "limit": evaluation.limit,
        "perplexity": text_settings(config),
        "loops": (evaluation.loop_samples, evaluation.generate_tokens) if evaluation.loop_samples else None,
        "seed": config.seed,
        "model": asdict(config.model),
        **({"teacher": teacher} if teacher and teacher != config.model.name else {}),
    }
    return fingerprint(measured)


def text_settings(config: Config) -> dict[str, Any]:
    """The settings that decide what is scored of which held-out text."""
    text = config.evaluation.perplexity
    masked = text.messages_column is not None and text.mask_prompts
    # Without the extra key, what was once measured on whole conversations would pass for this.
    return asdict(text) | ({"scored": "answers"} if masked else {})


def read_results(evals_dir: Path) -> list[Record]:
    """Every record, in the order of writing; a line that another process is writing at this moment is left out."""
    path = evals_dir / RESULTS
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def latest_results(records: Iterable[Record], settings: str | None = None) -> dict[Key, Record]:
    """The last record of each (model, step), of those measured with the given settings where these are given.

    A record of an error yields to an earlier success with the same weights: only the next success replaces that.
    """
    latest: dict[Key, Record] = {}
    for record in records:
        if settings is not None and record.get("settings") != settings:
            continue
        key = (record["model"], int(record["step"]))
        before = latest.get(key, record)
        if "error" not in record or "error" in before or not _same(record.get("weights"), before.get("weights")):
            latest[key] = record
    return latest


def is_of(record: Record, checkpoint: Path) -> bool:
    """Whether a record is of the weights that a directory has now, as far as it says (those of old versions do not)."""
    return _same(record.get("weights"), weights_of(checkpoint))


def weights_of(checkpoint: Path) -> str | None:
    """The `teacher_fingerprint` of a directory, taken once per state of its files; None if it cannot be read."""
    try:
        files = [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]
        return _fingerprint(
            checkpoint, tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        )
    except (UserError, OSError):
        return None


@cache
def _fingerprint(checkpoint: Path, state: tuple[tuple[str, int, int], ...]) -> str:
    return teacher_fingerprint(checkpoint)


def _same(one: str | None, other: str | None) -> bool:
    return None in (one, other) or one == other


def append_result(evals_dir: Path, record: Record) -> None:
    """Append one record; numbers that JSON has no name for (nan, inf) become null."""
    append_line(evals_dir / RESULTS, jsonable(record))


def jsonable(value: Any) -> Any:
    """The value with every nan and infinity replaced by None."""
    if isinstance(value, dict):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def metrics_of(record: Record) -> dict[str, float]:
    """Every metric of a record by its name: `perplexity`, `kl`, ..., and `<task>.<metric>` of the tasks."""
    names = ("perplexity", "loss", "kl", "top1_agreement", "routing_agreement", "load_entropy", "loop_rate")
    metrics = {name: record[name] for name in names if isinstance(record.get(name), (int, float))}
    for task, entry in record.get("tasks", {}).items():
        for metric, value in entry.items():
            if isinstance(value, (int, float)) and not metric.endswith("_stderr") and metric not in _NOT_METRICS:
                metrics[f"{task}.{metric}"] = value
    return metrics


_NOT_METRICS = {"few_shot", "documents"}


def lost_tasks(record: Record) -> dict[str, str]:
    """The tasks of a record that could not be measured, each with its error."""
    return {task: entry["error"] for task, entry in record.get("tasks", {}).items() if "error" in entry}


def choose_best(records: Iterable[Record], metric: str, greater_is_better: bool, run_path: Path) -> Record | None:
    """The best measured student checkpoint that still exists as it was, the earliest of equals; None without any.

    Raises:
        UserError: no record has that metric, and not because it was not finite or a task had no data.
    """
    students = [record for record in records if record["model"] == "student" and "error" not in record]
    there = [record for record in students if (run_path / record["path"]).is_dir()]
    candidates = [record for record in there if is_of(record, run_path / record["path"])]
    scored = [(metrics_of(record)[metric], record) for record in candidates if metric in metrics_of(record)]
    if candidates and not scored and not any(_may_lack(record, metric) for record in candidates):
        known = sorted({name for record in candidates for name in metrics_of(record)})
        raise UserError(f"evaluation.metric is '{metric}', which was not measured; choose one of: {', '.join(known)}")
    if not scored:
        return None
    sign = -1.0 if greater_is_better else 1.0
    return min(scored, key=lambda entry: (sign * entry[0], entry[1]["step"]))[1]


def _may_lack(record: Record, metric: str) -> bool:
    """Whether a metric may be missing from a record although its name is right."""
    task, _, name = metric.rpartition(".")
    values = record.get("tasks", {}).get(task, {}) if task else record
    return values.get(name, "") is None or bool(task and lost_tasks(record))


def link_best(run_path: Path, checkpoint: Path) -> None:
    """Point `RUN/best` at a checkpoint of the run, relatively (a run can be moved) and atomically."""
    link = run_path / "best"
    temporary = run_path / f".best.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(checkpoint, run_path), target_is_directory=True)
    os.replace(temporary, link)


def best_name(run_path: Path) -> str | None:
    """The name of the checkpoint that `RUN/best` points to, if it is there."""
    link = run_path / "best"
    return Path(os.readlink(link)).name if link.is_symlink() and link.exists() else None
