"""`kill -9` at random moments: started again, it ends with the files of an uninterrupted run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_compress.config import Config
from moe_compress.run import Run

KILLS = 4
# Imports once and forks a process per attempt, before anything is computed: an attempt is then short enough for many.
SCRIPT = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import datasets, transformers.models.olmoe.modeling_olmoe
from moe_compress.compression.pipeline import compress
from moe_compress.run import Run

base, kills = Path(sys.argv[1]), int(sys.argv[2])
results = sys.stdout
sys.stdout = open(os.devnull, "w")
random.seed(sys.argv[3])

def attempt(path, delay=None):
    process = os.fork()
    if process == 0:
        try:
            compress(Run.open(path))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

start = time.monotonic()
assert attempt(base / "whole") == 0
length = time.monotonic() - start
config = Run.open(base / "whole").config
runs, codes, left = [], [], []
while codes.count(-signal.SIGKILL) < kills and len(codes) < 5 * kills:
    run = Run.create(base / f"killed-{len(runs)}", config)
    runs.append(str(run.path))
    for _ in range(3):
        codes.append(attempt(run.path, random.uniform(0, length)))
        left.append(sorted(file.name for file in run.path.rglob("*.safetensors")))
        if codes[-1] == 0:  # it ended before it was killed: others are faster than the first was
            length *= 0.8
            break
    assert attempt(run.path) == 0
print(json.dumps({"runs": runs, "codes": codes, "left": left}), file=results)
"""


def files_of(run: Path) -> dict[str, bytes]:
    checkpoint = run / "checkpoints" / "checkpoint-0"
    files = {str(file.relative_to(run)): file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()}
    return {**files, "compression.json": (run / "compression.json").read_bytes()}


@pytest.mark.parametrize("kind", ["plain", "sequential", "fisher"])
def test_killed_at_random_moments(
    kind: str, make_model: Callable[..., Any], tokenizer: Any, settings: Callable[..., Config], tmp_path: Path
) -> None:
    make_model("olmoe", num_hidden_layers=3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = settings(tmp_path / "model", calibrate=True)
    config.compression.calibration.sequential = kind == "sequential"
    config.compression.calibration.fisher = kind == "fisher"
    config.compression.allocation = "greedy" if kind == "fisher" else "uniform"
    Run.create(tmp_path / "whole", config)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(KILLS), f"seed {kind}"],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["codes"].count(-9) >= KILLS, facts
    expected = files_of(tmp_path / "whole")
    assert len(expected) > 5
    for path in facts["runs"]:
        assert files_of(Path(path)) == expected, facts
        leftovers = [file.name for file in (Path(path) / "checkpoints").rglob(".*")]
        assert leftovers == [] and not (Path(path) / "calibration").exists()
