"""Our own method: the product's `compress` stage as it is, with any of its settings changed."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.quality.methods.base import Method, Task
from benchmarks.quality.models import TestModel
from moe_compress.compression import compress
from moe_compress.modeling import load_model
from moe_compress.run import Run
from moe_compress.settings import compose

VERSION = 5  # raise it when the same settings give other weights


def product(name: str, overrides: list[str], source: TestModel) -> Method:
    """A method that runs the `compress` stage with `key=value` overrides on top of the defaults.

    Bytes are spent to the last rank (`rank_multiple=1`) and the calibration text is that of all methods, unless the
    overrides say otherwise.
    """

    def run(task: Task) -> Any:
        settings = [
            "compression.rank_multiple=1",
            f"model={source.path}",
            f"compression.target_ratio={task.ratio}",
            f"compression.calibration.dataset.name={source.text('train').name}",
            f"compression.calibration.dataset.max_samples={task.rows.shape[0]}",
            f"compression.calibration.dataset.max_length={task.rows.shape[1]}",
            "compression.calibration.batch_size=8",
            f"seed={task.seed}",
            *overrides,
        ]
        with TemporaryDirectory() as directory, redirect_stdout(io.StringIO()):
            path = Path(directory) / "run"
            made = Run.create(path, compose([*settings, f"run={path}"]))
            compress(made)
            return load_model(made.checkpoint(0), dtype="float32")

    return Method(name, run, {"overrides": overrides, "version": VERSION})
