"""The cells of the table: one JSON file each, named by a hash of everything that decides it, so that nothing is
measured twice and a new method costs only its own cells."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.quality.distil import Training, cached_targets, distil
from benchmarks.quality.forms import expert_bytes, round_stored
from benchmarks.quality.methods.base import Method, Task
from benchmarks.quality.models import TestModel
from benchmarks.quality.score import score, teacher_log_probs
from moe_compress.config import EvaluationConfig
from moe_compress.data import packed_dataset
from moe_compress.errors import UserError
from moe_compress.evaluation.harness import run_tasks
from moe_compress.files import fingerprint, user_cache, write_json
from moe_compress.modeling import load_model, load_tokenizer

KEY = ("format", "model", "method", "settings", "ratio", "seed", "protocol", "training")
FORMAT = 1  # raise it when cells of before are not comparable any more


def default_cache() -> Path:
    """Where cells, teacher targets and test models are kept."""
    return user_cache() / "quality"


def cell_fingerprint(cell: dict[str, Any]) -> str:
    """Of everything that decides a cell, given its key or the whole of it."""
    return fingerprint({name: cell[name] for name in KEY})


@dataclass(frozen=True)
class Protocol:
    """What all methods have in common: text, measures, distillation.

    Attributes:
        calibration_rows, validation_rows, test_rows: rows of `length` tokens; validation chooses the learning rate.
        task_limit: documents per lm_eval task; 0 leaves the tasks out.
    """

    length: int = 512
    calibration_rows: int = 128
    validation_rows: int = 16
    test_rows: int = 48
    task_limit: int = 100
    training: Training = field(default_factory=Training)


class Bench:
    """One test model under one protocol, and the cells measured so far: those in the cache and those of a record."""

    def __init__(
        self,
        source: TestModel,
        protocol: Protocol,
        cache: Path,
        console: Console | None = None,
        record: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.source, self.protocol, self.cache = source, protocol, cache
        self.console = console or Console()
        self._shared: dict[int, dict[str, Any]] = {}
        self._record = {cell_fingerprint(cell): cell for cell in record}
        self._last: tuple[str, Any] = ("", None)

    @cached_property
    def teacher(self) -> Any:
        """The original in fp32."""
        return load_model(self.source.path, dtype="float32", require_moe=True)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.source.path)

    def rows(self, split: str, number: int, seed: int = 0) -> Tensor:
        """The first `number` packed rows [N, L] of a split in the order of a seed."""
        text = self.source.text(split)
        text.max_samples, text.max_length = number, self.protocol.length
        return torch.tensor(packed_dataset(text, self.tokenizer, seed)["input_ids"][:])

    @cached_property
    def held_out(self) -> dict[str, tuple[Tensor, list[Tensor]]]:
        """Validation and test rows, each with the teacher's log-probabilities."""
        sizes = {"validation": self.protocol.validation_rows, "test": self.protocol.test_rows}
        found = {split: self.rows(split, number) for split, number in sizes.items()}
        return {split: (rows, teacher_log_probs(self.teacher, rows)) for split, rows in found.items()}

    @cached_property
    def training_data(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows to distil on, other than the first calibration rows of any seed but by chance, and the targets."""
        training = self.protocol.training
        rows = self.rows("train", training.steps * training.batch_size, seed=1_000_003)
        key = fingerprint([self.source.fingerprint, rows.tolist(), training.top_k])
        file = self.cache / "targets" / f"{key}.safetensors"
        return rows, cached_targets(self.teacher, rows, training.top_k, file)

    @cached_property
    def _common(self) -> dict[str, Any]:
        """What all cells have in common, but for the training."""
        protocol = asdict(self.protocol)
        protocol.pop("training")
        text = self.source.given_text
        return protocol if text is None else {**protocol, "text": text}

    def key(self, method: Method, ratio: float, seed: int, learning_rate: float | None) -> dict[str, Any]:
        """Everything that decides a cell."""
        training = asdict(self.protocol.training)
        training.pop("learning_rates")
        return {
            "format": FORMAT,
            "model": self.source.fingerprint,
            "method": method.name,
            "settings": method.settings,
            "ratio": ratio,
            "seed": seed,
            "protocol": self._common,
            "training": None if learning_rate is None else {**training, "learning_rate": learning_rate},
        }

    def file(self, key: dict[str, Any]) -> Path:
        return self.cache / "cells" / self.source.name / f"{key['method']}-{key['ratio']}-{cell_fingerprint(key)}.json"

    def cached(self, method: Method, ratio: float, seed: int, learning_rate: float | None) -> dict[str, Any] | None:
        """A cell that was measured before, or None."""
        key = self.key(method, ratio, seed, learning_rate)
        file = self.file(key)
        return json.loads(file.read_text()) if file.exists() else self._record.get(cell_fingerprint(key))

    def run(self, method: Method, ratio: float, seed: int, learning_rates: tuple[float, ...]) -> None:
        """Measure a method zero-shot and after distillation at each learning rate; what is cached is left alone.

        A budget that a method cannot meet is a cell too: `{"error": one line}`.
        """
        wanted = [lr for lr in (None, *learning_rates) if self.cached(method, ratio, seed, lr) is None]
        if not wanted:
            return
        start = time.perf_counter()
        try:
            student = self._student(method, ratio, seed)
        except (UserError, ValueError) as error:
            for lr in wanted:
                self._write(self.key(method, ratio, seed, lr), {"error": str(error)})
            self.console.print(f"{method.name} {ratio} seed {seed}: {error}", highlight=False)
            return
        seconds = time.perf_counter() - start
        for lr in wanted:
            model, facts = student, {"fit_seconds": round(seconds, 1)}
            if lr is not None:
                start = time.perf_counter()
                model = copy.deepcopy(student)
                facts["training_loss"] = distil(model, *self.training_data, self.protocol.training, lr, seed)
                facts["training_seconds"] = round(time.perf_counter() - start, 1)
                round_stored(model)
            self._write(self.key(method, ratio, seed, lr), self.measure(model) | facts)

    def _student(self, method: Method, ratio: float, seed: int) -> Any:
        """As `compress`; the last one is kept, since a search of the learning rate comes back to it."""
        key = cell_fingerprint(self.key(method, ratio, seed, None))
        if self._last[0] != key:
            self._last = ("", None)
            self._last = (key, self.compress(method, ratio, seed))
        return self._last[1]

    def compress(self, method: Method, ratio: float, seed: int) -> Any:
        """A student as it would be stored.

        Raises:
            UserError, ValueError: the method cannot meet the budget.
        """
        calibration = self.rows("train", self.protocol.calibration_rows, seed)
        task = Task(self.teacher, calibration, ratio, seed, self._shared.setdefault(seed, {}))
        with torch.no_grad():
            student = round_stored(method.compress(task))
        found, allowed = expert_bytes(student), ratio * expert_bytes(self.teacher)
        if found > allowed * 1.001:
            raise RuntimeError(f"{method.name} keeps {found:,} expert bytes where {allowed:,.0f} are allowed")
        return student

    def measure(self, model: Any) -> dict[str, Any]:
        """Bytes, validation, test and tasks of a student."""
        with torch.no_grad():
            facts: dict[str, Any] = {
                "expert_bytes": expert_bytes(model),
                "kept": expert_bytes(model) / expert_bytes(self.teacher),
            }
            for split, (rows, reference) in self.held_out.items():
                facts[split] = score(model, rows, reference)
            if self.protocol.task_limit and self.source.tasks:
                config = EvaluationConfig(tasks=dict.fromkeys(self.source.tasks, 0), limit=self.protocol.task_limit)
                facts["tasks"] = {
                    name: entry.get("acc") for name, entry in run_tasks(model, self.tokenizer, config, 0).items()
                }
        return facts

    def reference(self) -> dict[str, Any]:
        """The cell of the teacher itself."""
        method = Method("teacher", lambda task: task.teacher, {})
        found = self.cached(method, 1.0, 0, None)
        if found is None:
            self._write(self.key(method, 1.0, 0, None), self.measure(self.teacher))
            found = self.cached(method, 1.0, 0, None)
        assert found is not None
        return found

    def _write(self, key: dict[str, Any], facts: dict[str, Any]) -> None:
        write_json(self.file(key), {**key, **facts})
        if "test" in facts:
            training = key["training"]
            label = "zero-shot" if training is None else f"distilled at {training['learning_rate']:g}"
            test = facts["test"]
            self.console.print(
                f"{key['method']} {key['ratio']} seed {key['seed']} {label}: kept {facts['kept']:.4f}, "
                f"perplexity {test['perplexity']:.3f}, KL {test['kl']:.4f}, top-1 {test['top1']:.3f}",
                highlight=False,
            )

    def cells(self) -> list[dict[str, Any]]:
        """All cells of this protocol (whatever the training), those of other weights of the model too."""
        files = sorted((self.cache / "cells" / self.source.name).glob("*.json"))
        measured = [json.loads(file.read_text()) for file in files]
        found = self._record | {cell_fingerprint(cell): cell for cell in measured}
        return [cell for cell in found.values() if cell["format"] == FORMAT and cell["protocol"] == self._common]
