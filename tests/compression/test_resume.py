"""The compress stage goes on after an interruption, keeps nothing of other settings, and survives a full disk."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_compress.compression import compress, job, pipeline, writer
from moe_compress.compression.layer import LayerInput
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.run import Run
from tests.compression.runs import compressed, files_of

Settings = Callable[..., Config]


def test_interrupted_and_resumed_gives_the_same_bytes(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_dir("mixtral")
    monkeypatch.setattr(writer, "SHARD_BYTES", 10_000)
    whole = compressed(settings(source, calibrate=True), tmp_path / "whole")
    fitted: list[str] = []
    real_fit, real_write, real_report = job.fit_layer, writer.write_shard, pipeline.write_json

    def fit(layer: LayerInput, *arguments: Any) -> Any:
        if len(fitted) == 1:
            fitted.append("killed")
            raise KeyboardInterrupt
        fitted.append(layer.name)
        return real_fit(layer, *arguments)

    monkeypatch.setattr(job, "fit_layer", fit)
    run = Run.create(tmp_path / "run", settings(source, calibrate=True))
    with pytest.raises(KeyboardInterrupt):
        compress(run)
    assert not run.checkpoint(0).exists() and not run.finished("compress")
    partial = run.checkpoints_dir / ".checkpoint-0.partial"
    assert (partial / "model-00001.safetensors").exists()
    (partial / ".model-00002.safetensors.1.tmp").write_bytes(b"half of a shard")
    first = (partial / "model-00001.safetensors").stat().st_mtime_ns

    def no_calibration(*arguments: Any) -> None:
        raise AssertionError("the Gram matrices were collected again")

    monkeypatch.setattr(job.CalibrationWalk, "_pass", no_calibration)

    copies: list[str] = []

    def write(path: Path, *arguments: Any) -> None:  # killed again while the other tensors are copied
        if path.name > "model-00002" and len(copies) < 2:
            copies.append(path.name)
            if len(copies) == 2:
                raise KeyboardInterrupt
        real_write(path, *arguments)

    monkeypatch.setattr(writer, "write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        compress(Run.open(run.path))
    assert fitted == ["model.layers.0.mlp.experts", "killed", "model.layers.1.mlp.experts"]

    def no_report(path: Path, value: Any) -> None:  # and once more after the checkpoint is in place
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "write_json", no_report)
    with pytest.raises(KeyboardInterrupt):
        compress(Run.open(run.path))
    assert run.checkpoint(0).exists()
    monkeypatch.setattr(pipeline, "write_json", real_report)
    compress(Run.open(run.path))
    assert len(fitted) == 3
    assert (run.checkpoint(0) / "model-00001.safetensors").stat().st_mtime_ns == first
    assert len(list(run.checkpoint(0).glob("*.safetensors"))) > 3
    assert files_of(run.checkpoint(0)) == files_of(whole.checkpoint(0))
    assert (run.path / "compression.json").read_bytes() == (whole.path / "compression.json").read_bytes()
    assert Run.open(run.path).finished("compress")


def test_shards_of_other_settings_are_not_kept(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_dir("olmoe")
    expected = compressed(settings(source, rank=2), tmp_path / "expected")
    other = compressed(settings(source, rank=1), tmp_path / "other")
    run = Run.create(tmp_path / "run", settings(source, rank=2))
    partial = run.checkpoints_dir / ".checkpoint-0.partial"
    shutil.copytree(other.checkpoint(0), partial)
    (partial / "model-00099.safetensors").write_bytes(b"left over")
    compress(run)
    assert files_of(run.checkpoint(0)) == files_of(expected.checkpoint(0))
    # A finished checkpoint of other settings is never overwritten.
    run = Run.create(tmp_path / "again", settings(source, rank=2))
    shutil.copytree(other.checkpoint(0), run.checkpoint(0))
    with pytest.raises(UserError, match="made by other settings"):
        compress(run)
    assert files_of(run.checkpoint(0)) == files_of(other.checkpoint(0))


def test_finished_is_not_repeated(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compressed(settings(model_dir("olmoe")), tmp_path / "run")

    def never(*arguments: Any) -> None:
        raise AssertionError("it was opened again")

    monkeypatch.setattr(pipeline, "open_model", never)
    compress(Run.open(run.path))


def test_a_full_disk_is_told_and_nothing_lost(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "run", settings(model_dir("olmoe")))
    real = writer.write_shard

    def full(path: Path, *arguments: Any) -> None:
        if path.name == "model-00002.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *arguments)

    monkeypatch.setattr(writer, "write_shard", full)
    with pytest.raises(UserError, match="is full; free some and run the same command again"):
        compress(run)
    assert (run.checkpoints_dir / ".checkpoint-0.partial" / "model-00001.safetensors").exists()
    monkeypatch.setattr(writer, "write_shard", real)
    compress(run)
    assert run.finished("compress")
