"""Everything a run has left behind, read once: settings, manifest, compression, training, evaluation, speed, samples.

What a run does not have yet is None or empty; nothing is made up for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_compress.evaluation.results import Record, best_name, is_of, latest_results, read_results, settings_fingerprint
from moe_compress.run import Run

BASELINE = "baseline_svd"


@dataclass
class RunData:
    """The files of a run.

    Attributes:
        name, path: the run.
        config: the frozen settings, as plain values.
        manifest: which stages ran, when, with which versions.
        compression, baseline_compression: `compression.json` of the run and of its SVD baseline.
        training, baseline_training: log lines of the distillation.
        results: all measurements with the present settings of what there is now (not of a checkpoint that was trained
            again since), by (model, step), errors included.
        best: name of the checkpoint that `RUN/best` points to.
        speed, samples: what `evaluate` measured and generated.
    """

    name: str
    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any] = field(default_factory=dict)
    compression: dict[str, Any] | None = None
    baseline_compression: dict[str, Any] | None = None
    training: list[dict[str, Any]] = field(default_factory=list)
    baseline_training: list[dict[str, Any]] = field(default_factory=list)
    results: dict[tuple[str, int], Record] = field(default_factory=dict)
    best: str | None = None
    speed: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)

    def measured(self, model: str) -> list[Record]:
        """The successful measurements of one model label, by step."""
        found = [record for (label, _), record in self.results.items() if label == model and "error" not in record]
        return sorted(found, key=lambda record: record["step"])

    def teacher(self) -> Record | None:
        """The measurement of the original model."""
        return next(iter(self.measured("teacher")), None)

    def zero_shot(self, model: str = "student") -> Record | None:
        """The measurement before distillation."""
        return next((record for record in self.measured(model) if record["step"] == 0), None)

    def distilled(self, model: str = "student") -> Record | None:
        """The measurement of the last checkpoint, which nothing but the number of steps has chosen."""
        return next((record for record in reversed(self.measured(model)) if record["step"] > 0), None)

    def failures(self) -> list[Record]:
        """Checkpoints that could not be measured."""
        return [record for record in self.results.values() if "error" in record]


def collect(run: Run) -> RunData:
    """Read a run directory."""
    baseline = run.path / BASELINE
    latest = latest_results(read_results(run.evals_dir), settings_fingerprint(run.config))
    return RunData(
        name=run.config.experiment_name,
        path=run.path,
        config=asdict(run.config),
        manifest=_json(run.path / "manifest.json") or {},
        compression=_json(run.path / "compression.json"),
        baseline_compression=_json(baseline / "compression.json"),
        training=list(_lines(run.logs_dir / "train.jsonl")),
        baseline_training=list(_lines(baseline / "logs" / "train.jsonl")),
        results={key: record for key, record in latest.items() if is_of(record, run.path / record["path"])},
        best=best_name(run.path),
        speed=_json(run.evals_dir / "speed.json"),
        samples=(_json(run.evals_dir / "samples.json") or {}).get("samples", []),
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # a line being written
