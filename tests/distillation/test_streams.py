"""Streams and several workers: the same set of files for any number of them, killed or not, with little in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_compress.config import Config
from moe_compress.data import Row, read_rows
from moe_compress.distillation import TeacherCache, generate
from moe_compress.distillation.generate import fill_cache
from moe_compress.errors import UserError
from moe_compress.modeling import load_tokenizer
from moe_compress.run import Run

from .conftest import MakeRun
from .test_cache import content


@pytest.fixture
def config(make_run: MakeRun) -> Config:
    config = make_run("unused").config
    config.distillation.dataset.streaming = True
    config.distillation.dataset.shuffle_buffer = 7
    config.distillation.teacher.generation.encoder = "sample"
    config.distillation.teacher.generation.samples = 6
    config.distillation.loss.temperature = 1.0
    return config


def fill(config: Config, directory: Path, worker: int = 0, workers: int = 1) -> None:
    generation = config.distillation.teacher.generation
    generation.worker_id, generation.total_workers = worker, workers
    fill_cache(config, directory)


def test_workers_interleave_a_stream_to_the_same_set(config: Config, tmp_path: Path) -> None:
    fill(config, tmp_path / "one")
    fill(config, tmp_path / "three", 2, 3)
    assert sorted(content(tmp_path / "three")) == ["logits-000002.h5"]
    with pytest.raises(UserError, match="all workers"):
        TeacherCache(tmp_path / "three")
    fill(config, tmp_path / "three", 0, 3)
    assert sorted(content(tmp_path / "three")) == ["logits-000000.h5", "logits-000002.h5", "logits-000003.h5"]
    fill(config, tmp_path / "three", 0, 2)  # goes on with another number of workers
    fill(config, tmp_path / "three", 1, 2)
    assert content(tmp_path / "three") == content(tmp_path / "one")
    cache = TeacherCache(tmp_path / "three")
    assert cache.files == TeacherCache(tmp_path / "one").files
    rows = list(read_rows(config.distillation.dataset, load_tokenizer(config.model.name), config.seed))
    assert len(cache) == len(rows) == 22
    assert all((cache[index]["input_ids"] == row["input_ids"]).all() for index, row in enumerate(rows))
    assert len(np.unique([row["input_ids"] for row in rows], axis=0)) == 22


def test_a_stream_is_not_held(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is taken from the stream before the files of those before it are written, and none beyond the limit."""
    taken = 0

    def counted(*arguments: Any) -> Iterator[Row]:
        nonlocal taken
        for row in read_rows(*arguments):
            assert taken <= 5 * (len(list(tmp_path.glob("cache/logits-*.h5"))) + 1)
            taken += 1
            yield row

    monkeypatch.setattr(generate, "read_rows", counted)
    config.distillation.dataset.max_samples = 12
    fill(config, tmp_path / "cache")
    assert len(TeacherCache(tmp_path / "cache")) == taken == 12


def test_a_stream_without_a_limit_is_read_to_its_end(config: Config, tmp_path: Path) -> None:
    config.distillation.dataset.max_samples = None
    fill(config, tmp_path / "cache")
    rows = list(read_rows(config.distillation.dataset, load_tokenizer(config.model.name), config.seed))
    cache = TeacherCache(tmp_path / "cache")
    assert len(cache) == len(rows) > 22
    before = content(tmp_path / "cache")
    fill(config, tmp_path / "cache")
    assert content(tmp_path / "cache") == before


def test_a_stream_that_has_changed_is_noticed(config: Config, tmp_path: Path) -> None:
    fill(config, tmp_path / "cache", 0, 2)
    text = Path(config.distillation.dataset.name).read_text()
    changed = tmp_path / "text.jsonl"
    changed.write_text(text)
    config.distillation.dataset.name = str(changed)
    fill(config, tmp_path / "copy", 0, 2)
    lines = [json.loads(line) for line in text.splitlines()]
    changed.write_text("".join(json.dumps({"text": line["text"] + " word1"}) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"logits-000000.h5 holds other text than the data set has now"):
        fill(config, tmp_path / "copy", 1, 2)


def test_every_rank_of_torchrun_is_a_worker(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(config, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        fill(config, tmp_path / "ranks")
        names = sorted(path.name for path in (tmp_path / "ranks").glob("part-*"))
        assert names == ["part-00000-of-00002.json", "part-00001-of-00002.json"][int(rank) :]
    assert content(tmp_path / "ranks") == content(tmp_path / "one")


# Imports once and forks two workers per attempt, which are killed together when so many files are finished.
SCRIPT = """
import json, os, signal, sys, time, traceback
from pathlib import Path
import datasets, transformers.models.olmoe.modeling_olmoe
from moe_compress.distillation.generate import fill_cache
from moe_compress.run import Run

run, base = Run.open(sys.argv[1]), Path(sys.argv[2])
results = sys.stdout
sys.stdout = open(os.devnull, "w")
os.environ["TQDM_DISABLE"] = "1"

def attempt(directory, files=None, writing=False):
    processes = []
    for worker in range(2):
        process = os.fork()
        if process == 0:
            try:
                generation = run.config.distillation.teacher.generation
                generation.worker_id, generation.total_workers = worker, 2
                fill_cache(run.config, directory)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        processes.append(process)
    def due():
        finished = len(list(directory.glob("*.h5"))) >= files
        return finished and (not writing or any(directory.glob(".logits-*.tmp")))
    ends = time.monotonic() + 60
    while files is not None and not due() and time.monotonic() < ends:
        time.sleep(0.0005)
    if files is not None:
        for process in processes:
            os.kill(process, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]

assert attempt(base / "whole") == [0, 0]
killed, left = 0, []
for number, (files, writing) in enumerate([(0, True), (1, False), (1, True), (3, False)]):
    directory = base / f"killed-{number}"
    killed += attempt(directory, files, writing).count(-signal.SIGKILL)
    left.append(len(list(directory.glob("*.h5"))))
    assert attempt(directory) == [0, 0]
print(json.dumps({"killed": killed, "left": left}), file=results)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_workers_resume_to_the_same_set(config: Config, make_run: MakeRun, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "settings", config)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(run.path), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["killed"] > 0 and any(0 < left < 5 for left in facts["left"]), facts
    for number in range(4):
        directory = tmp_path / f"killed-{number}"
        assert content(directory) == content(tmp_path / "whole")
        assert TeacherCache(directory).files == TeacherCache(tmp_path / "whole").files
        assert not list(directory.glob(".logits-*.tmp"))
