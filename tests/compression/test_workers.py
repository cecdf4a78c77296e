"""Several processes: each layer is done by one, the bytes are those of one process, and one failure ends all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import HashStore

from moe_compress.compression import compress, workers
from moe_compress.compression.workers import PeerFailed, Team
from moe_compress.config import Config
from moe_compress.run import Run
from tests.compression.runs import files_of

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def teams(monkeypatch: pytest.MonkeyPatch) -> list[Team]:
    """Two processes' view of one job, in one process."""
    store = HashStore()
    monkeypatch.setattr(workers, "_torchrun_store", lambda: store)
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        made.append(Team("job"))
    return made


def test_everything_is_taken_once_and_the_faster_takes_more(teams: list[Team]) -> None:
    first, second = (team.take("layers", 7) for team in teams)
    taken = [next(first), next(second), next(second), next(second), next(first), *second, *first]
    assert sorted(taken) == list(range(7))
    assert list(teams[0].take("copies", 2)) == [0, 1]  # another queue of the same job
    assert list(Team("other job").take("layers", 2)) == [0, 1]


def test_the_leader_waits_for_all(teams: list[Team]) -> None:
    order: list[str] = []

    def lead() -> None:
        teams[0].arrive("done")
        order.append("leader goes on")

    thread = threading.Thread(target=lead)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    order.append("other arrives")
    teams[1].arrive("done")
    thread.join(10)
    assert order == ["other arrives", "leader goes on"]


@pytest.mark.parametrize("what", ["take", "wait", "arrive"])
def test_a_failure_ends_all(teams: list[Team], what: str) -> None:
    with pytest.raises(ValueError, match="bad layer"), teams[1].together():
        raise ValueError("bad layer")
    steps: dict[str, Callable[[], Any]] = {
        "take": lambda: list(teams[0].take("layers", 3)),
        "wait": lambda: teams[0].wait("never"),
        "arrive": lambda: teams[0].arrive("done"),
    }
    with pytest.raises(SystemExit) as end, teams[0].together():
        steps[what]()
    assert end.value.code == 2
    assert isinstance(end.value.__cause__, PeerFailed) and str(end.value.__cause__) == "rank 1: bad layer"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As torchrun gives each process; the number of threads decides the order of a sum, and so its last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torchrun(run: Run, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "moe_compress", "compress", f"run={run.path}"],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.fixture
def four_layers(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    make_model("olmoe", num_hidden_layers=4).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ["plain", "sequential", "fisher"])
def test_two_processes_give_the_bytes_of_one(
    kind: str, four_layers: Path, settings: Callable[..., Config], tmp_path: Path, one_thread: None
) -> None:
    """And they continue what one process began."""
    config = settings(four_layers, calibrate=True)
    config.compression.calibration.sequential = kind == "sequential"
    config.compression.calibration.fisher = kind == "fisher"
    single = Run.create(tmp_path / "single", config)
    compress(single)
    run = Run.create(tmp_path / "run", config)
    partial = run.checkpoints_dir / ".checkpoint-0.partial"
    partial.mkdir(parents=True)
    kept = partial / "model-00002.safetensors"
    shutil.copy(single.checkpoint(0) / kept.name, kept)
    written = kept.stat().st_mtime_ns
    result = torchrun(run)
    assert result.returncode == 0, result.stderr
    assert files_of(run.checkpoint(0)) == files_of(single.checkpoint(0))
    assert (run.checkpoint(0) / kept.name).stat().st_mtime_ns == written
    assert (run.path / "compression.json").read_bytes() == (single.path / "compression.json").read_bytes()
    assert Run.open(run.path).finished("compress")
    assert not (run.path / "calibration").exists()


def test_a_failing_process_is_told_once_and_ends_all(
    four_layers: Path, settings: Callable[..., Config], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    for file in four_layers.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][0, 0] = float("nan")
            save_file(tensors, file, {"format": "pt"})
    run = Run.create(tmp_path / "run", settings(four_layers))
    result = torchrun(run)
    assert result.returncode != 0
    told = [line for line in result.stderr.splitlines() if "error: tensor" in line]
    assert len(told) == 1 and name in told[0] and "NaN" in told[0]
    assert not run.checkpoint(0).exists() and not Run.open(run.path).finished("compress")
