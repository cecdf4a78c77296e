"""`moe-compress cache`: what a cache holds, every damage by the name of its file, and agreement with the teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import pytest

from moe_compress.cli import main
from moe_compress.config import Config
from moe_compress.distillation import TeacherCache
from moe_compress.distillation.fingerprints import teacher_fingerprint
from moe_compress.distillation.generate import fill_cache
from moe_compress.distillation.manifest import CacheFile
from moe_compress.distillation.teachers import expected_header
from moe_compress.distillation.verify import (
    file_problems,
    show_cache,
    teacher_as_recorded,
    teacher_distance,
    verify_cache,
)
from moe_compress.errors import UserError
from moe_compress.files import sha256_of_file
from moe_compress.modeling import load_tokenizer

from .conftest import MakeRun, base_config, save_model


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Path]:
    """A cache of each encoder."""
    base = tmp_path_factory.mktemp("caches")
    made = {}
    for encoder in ("topk", "sample"):
        config = base_config(request.getfixturevalue("teacher_dir"), request.getfixturevalue("text_file"))
        config.distillation.teacher.generation.encoder = encoder
        made[encoder] = base / encoder
        fill_cache(config, made[encoder])
    return made


@pytest.fixture
def config(make_run: MakeRun) -> Config:
    return make_run("unused").config


@pytest.mark.parametrize("encoder", ["topk", "sample"])
def test_a_good_cache_agrees_with_its_teacher(
    caches: dict[str, Path], config: Config, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verify_cache(caches[encoder], config, sequences=4)
    assert "5 files are good" in capsys.readouterr().out
    distance, tolerance = teacher_distance(TeacherCache(caches[encoder]), config, 4)
    assert distance < tolerance == 0.01


@pytest.mark.parametrize("encoder", ["topk", "sample"])
def test_another_teacher_is_noticed(
    caches: dict[str, Path], config: Config, encoder: str, tmp_path: Path, words: list[str]
) -> None:
    config.distillation.teacher.model_path = str(save_model(tmp_path / "other", 3, words))
    with pytest.raises(UserError, match="made from another teacher"):
        verify_cache(caches[encoder], config, sequences=2)
    # A teacher that says something else although its files look the same: only the logits tell.
    cache = TeacherCache(caches[encoder])
    cache.header["teacher"] = teacher_fingerprint(Path(config.distillation.teacher.model_path))
    distance, tolerance = teacher_distance(cache, config, 4)
    assert distance > 5 * tolerance


def rewrite(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def resize(file: h5py.File) -> None:
    file["counts"].resize(file["counts"].shape[0] - 1, axis=0)


def unlabel(file: h5py.File) -> None:
    file["labelled"][20] = 0


def other_text(file: h5py.File) -> None:
    file["input_ids"][3] = (file["input_ids"][3] + 1) % 97


def beyond(file: h5py.File) -> None:
    file["indices"][2] = 97


def retype(file: h5py.File) -> None:
    values = file["entropy"][:]
    del file["entropy"]
    file["entropy"] = values.astype("float32")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (resize, "holds counts"),
        (unlabel, "holds other text than the manifest says"),
        (other_text, "holds other text than the manifest says"),
        (beyond, "holds indices beyond the vocabulary of 97"),
        (retype, r"holds entropy \(80, 2\) float32 instead of \(80, 2\) float16"),
    ],
)
def test_structure_is_checked_even_where_the_checksum_is_right(
    caches: dict[str, Path], config: Config, tmp_path: Path, change: Callable[[h5py.File], None], problem: str
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(caches["sample"], cache)
    header = TeacherCache(cache).header
    path = cache / "logits-000001.h5"
    rewrite(path, change)
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["files"][1] = asdict(entry_of(manifest, 1, path))
    (cache / "manifest.json").write_text(json.dumps(manifest))
    assert not list(file_problems(cache / "logits-000000.h5", TeacherCache(cache).files[0], header))
    with pytest.raises(UserError, match=rf"1 of 5 files are damaged: logits-000001.h5 {problem}"):
        verify_cache(cache, config, sequences=0)


def entry_of(manifest: dict[str, Any], number: int, path: Path) -> CacheFile:
    """The entry of a file with the checksum and size it has now."""
    return replace(CacheFile(**manifest["files"][number]), sha256=sha256_of_file(path), bytes=path.stat().st_size)


def test_every_damaged_file_is_named(caches: dict[str, Path], config: Config, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(caches["topk"], cache)
    (cache / "logits-000000.h5").unlink()
    data = (cache / "logits-000003.h5").read_bytes()
    (cache / "logits-000003.h5").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"2 of 5 .*: logits-000000.h5 is missing; logits-000003.h5 has \d+ bytes"):
        verify_cache(cache, config, sequences=0)
    fill_cache(config, cache)
    verify_cache(cache, config, sequences=0)


def test_the_command(caches: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cache = caches["sample"]
    assert main(["cache", "info", str(cache)]) == 0
    out = capsys.readouterr().out
    header, files = TeacherCache(cache).header, TeacherCache(cache).files
    size = sum(file.bytes for file in files)
    for words in ("complete", "22 of up to 16 tokens", f"{size / 352:.1f}", "samples 50", "uint8", header["teacher"]):
        assert words in out, words
    assert "\x1b" not in out
    assert main(["cache", "verify", str(cache), "--sequences", "2"]) == 0  # the teacher as the manifest names it
    assert "the teacher agrees on 2 sequences" in capsys.readouterr().out
    for arguments, message in (
        (["cache"], "cache needs `info` or `verify`"),
        (["cache", "info"], "needs a cache directory, or run=RUN"),
        (["cache", "info", str(tmp_path / "none")], "does not exist"),
        (["cache", "verify", str(cache), "model=" + str(tmp_path)], "config.json"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_the_teacher_is_the_one_recorded_its_revision_too(config: Config, tmp_path: Path) -> None:
    config.model.revision = "v1.5"
    fill_cache(config, tmp_path / "cache")

    def recorded(*given: str) -> tuple[Any, ...]:
        found = Config()
        found.model.revision = "given"
        teacher_as_recorded(found, tmp_path / "cache", given=given)
        return found.distillation.teacher.model_path or found.model.name, found.model.revision, found.model.dtype

    assert recorded() == (config.model.name, "v1.5", "float32")
    assert recorded("model.revision") == (config.model.name, "given", "float32")
    assert recorded("model.name")[1] == "given"
    show_cache(tmp_path / "cache")
    config.model.revision = None  # it names the teacher, whose fingerprint is what must agree
    TeacherCache(tmp_path / "cache", expected_header(config, load_tokenizer(config.model.name)))
    manifest = tmp_path / "cache" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["header"]["teacher_revision"]  # as in a cache of an earlier version
    manifest.write_text(json.dumps(content))
    assert recorded()[1] is None
    config.distillation.teacher.model_path, config.model.revision = config.model.name, "of the student"
    assert expected_header(config, load_tokenizer(config.model.name))["teacher_revision"] is None


def test_the_command_for_machines(caches: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(caches["topk"], cache)

    def said(*arguments: str, code: int = 0) -> Any:
        assert main(["cache", *arguments, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    facts = said("info", str(cache))
    files = TeacherCache(cache).files
    assert facts["complete"] is True and facts["sequences"] == 22 and facts["tokens"] == 22 * 16
    assert facts["header"] == TeacherCache(cache).header
    assert facts["files"] == [asdict(file) for file in files] and facts["bytes"] == sum(file.bytes for file in files)

    found = said("verify", str(cache), "--sequences", "2")
    assert found["good"] is True and [file["problem"] for file in found["files"]] == [None] * 5
    assert found["teacher"]["sequences"] == 2 and found["teacher"]["distance"] < found["teacher"]["tolerance"] == 0.01
    assert said("verify", str(cache), "--sequences", "0")["teacher"] is None

    (cache / "logits-000003.h5").unlink()
    found = said("verify", str(cache), code=2)
    assert found["good"] is False and found["teacher"] is None
    assert [file["problem"] for file in found["files"]] == [None, None, None, "is missing", None]


def test_an_unfinished_cache_says_what_it_has(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = config.distillation.teacher.generation
    generation.worker_id, generation.total_workers = 1, 2
    fill_cache(config, tmp_path / "cache")
    capsys.readouterr()
    assert main(["cache", "info", str(tmp_path / "cache")]) == 0
    out = capsys.readouterr().out
    assert "not complete" in out and "12 of up to 16 tokens" in out
    with pytest.raises(UserError, match="is not complete"):
        verify_cache(tmp_path / "cache", config, sequences=0)
