"""The teacher cache: what is written comes back, mismatches are refused, interruptions and workers lose nothing."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from moe_compress.config import Config
from moe_compress.data import rows_in_memory
from moe_compress.distillation import TeacherCache, encoders, filling, generate, generate_teacher_logits
from moe_compress.distillation.chunks import LinearHead
from moe_compress.distillation.data import collate
from moe_compress.distillation.encoders import TopKEncoder
from moe_compress.distillation.fingerprints import teacher_fingerprint, tokenizer_fingerprint
from moe_compress.distillation.generate import fill_cache
from moe_compress.distillation.records import token_dtype
from moe_compress.distillation.teachers import expected_header, load_teacher
from moe_compress.distillation.verify import verify_cache
from moe_compress.errors import UserError
from moe_compress.files import sha256_of_file
from moe_compress.modeling import load_tokenizer

from .conftest import LENGTH, VOCABULARY, MakeRun, make_tokenizer, save_model


def content(directory: Path) -> dict[str, str]:
    """Checksums of the cache's HDF5 files."""
    return {path.name: sha256_of_file(path) for path in sorted(directory.glob("*.h5"))}


def expected(config: Config) -> dict[str, Any]:
    return expected_header(config, load_tokenizer(config.model.name))


@pytest.fixture
def config(make_run: MakeRun) -> Config:
    return make_run("unused").config


def test_round_trip_holds_the_tokens_and_the_teachers_top_k(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    generate_teacher_logits(run)
    config = run.config
    rows = rows_in_memory(config.distillation.dataset, load_tokenizer(config.model.name), config.seed)
    cache = TeacherCache(run.teacher_logits_dir, expected(config))
    assert len(cache) == len(rows) == 22
    assert len(cache.files) == 5 and cache.files[-1].rows == 2
    model = load_teacher(config)
    for index in (21, 0, 4, 5):
        record = cache[index]
        ids = torch.tensor(rows[index]["input_ids"])
        assert record["input_ids"].dtype == token_dtype(VOCABULARY) == np.uint8
        assert record["input_ids"].tolist() == ids.tolist()
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        top, indices = logits.topk(8, dim=-1)
        found = cache.encoder.decode({name: torch.from_numpy(array) for name, array in record.items()})
        assert torch.equal(found.indices, indices)
        torch.testing.assert_close(found.logits, top, atol=5e-3, rtol=1e-3)
        torch.testing.assert_close(found.logsumexp, logits.logsumexp(-1))
    size = sum(path.stat().st_size for path in run.teacher_logits_dir.glob("*.h5"))
    assert f"{size / (22 * LENGTH):.1f} bytes per token" in capsys.readouterr().out
    assert run.finished("teacher-logits")
    assert run.facts("teacher-logits")["tokens"] == 22 * LENGTH
    with pytest.raises(IndexError):
        cache[22]


def test_a_complete_cache_is_left_alone_and_forced_anew(config: Config, tmp_path: Path) -> None:
    fill_cache(config, tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.h5")}
    fill_cache(config, tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.h5")} == before
    config.distillation.teacher.generation.force_regenerate = True
    fill_cache(config, tmp_path / "cache")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.h5")}
    assert after.keys() == before.keys() and all(after[path] > before[path] for path in before)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda config: setattr(config.distillation.dataset, "max_length", 8), "sequence_length"),
        (lambda config: setattr(config.distillation.dataset, "max_samples", 9), "dataset.max_samples"),
        (lambda config: setattr(config.distillation.dataset, "split", "validation"), "dataset.split"),
        (lambda config: setattr(config.distillation.teacher.generation, "top_k", 5), "top_k"),
        (lambda config: setattr(config, "seed", 8), "dataset.seed"),
    ],
)
def test_other_settings_are_refused(
    config: Config, tmp_path: Path, change: Callable[[Config], None], field: str
) -> None:
    fill_cache(config, tmp_path / "cache")
    have = TeacherCache(tmp_path / "cache").header
    before = content(tmp_path / "cache")
    change(config)
    want = expected(config)
    with pytest.raises(UserError, match=rf"{field} is .* in the cache but .* is expected") as error:
        TeacherCache(tmp_path / "cache", want)
    for header in (have, want):
        value = header
        for part in field.split("."):
            value = value[part]
        assert repr(value) in str(error.value)
    if field != "dataset.split":  # the text file has the split it is asked for
        with pytest.raises(UserError, match=field):
            fill_cache(config, tmp_path / "cache")
    assert content(tmp_path / "cache") == before


def test_other_teacher_tokenizer_and_vocabulary_are_refused(
    config: Config, tmp_path: Path, words: list[str], student_dir: Path
) -> None:
    fill_cache(config, tmp_path / "cache")
    good = expected(config)
    config.model.name = str(student_dir)
    with pytest.raises(UserError, match="teacher is '"):
        TeacherCache(tmp_path / "cache", expected(config))
    other_words = save_model(tmp_path / "other", 1, words[::-1])
    config.model.name = str(other_words)
    with pytest.raises(UserError, match="tokenizer is '"):
        TeacherCache(tmp_path / "cache", {**good, "tokenizer": expected(config)["tokenizer"]})
    with pytest.raises(UserError, match="sequence_length is 16 in the cache but 17 "):
        TeacherCache(tmp_path / "cache", {**good, "sequence_length": 17})
    with pytest.raises(UserError, match="encoder is 'topk' in the cache but 'sample' "):
        TeacherCache(tmp_path / "cache", {**good, "encoder": "sample"})
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(UserError, match="format_version is 1 in the cache but 2 is expected"):
        TeacherCache(tmp_path / "cache")


def test_teacher_fingerprint_tells_weights_apart_and_survives_a_move(teacher_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in teacher_dir.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert teacher_fingerprint(copy) == teacher_fingerprint(teacher_dir)
    weights = copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert teacher_fingerprint(copy) != teacher_fingerprint(teacher_dir)


def test_tokenizer_fingerprint_survives_saving(words: list[str], tmp_path: Path) -> None:
    tokenizer = make_tokenizer(words)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    loaded(["a longer text", "text"], truncation=True, max_length=2)  # leaves a setting in the fast tokenizer
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(make_tokenizer(words[1:])) != tokenizer_fingerprint(tokenizer)


class Killed(BaseException):
    """Stands for a process that ends at once."""


@pytest.mark.parametrize("moment", ["while writing the third file", "between rename and list of the third"])
def test_an_interrupted_generation_resumes_to_the_same_set(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    fill_cache(config, tmp_path / "whole")
    broken = tmp_path / "broken"
    if moment.startswith("while"):
        encode, calls = TopKEncoder.encode, iter(range(100))

        def dies(self: TopKEncoder, logits: torch.Tensor, sequence: int) -> dict[str, np.ndarray]:
            if next(calls) == 13:  # five sequences a file
                raise Killed
            return encode(self, logits, sequence)

        monkeypatch.setattr(TopKEncoder, "encode", dies)
    else:
        write_part = filling.write_part

        def dies_before(path: Path, header: Any, files: Any) -> None:
            if len(list(files)) == 3:
                raise Killed
            write_part(path, header, files)

        monkeypatch.setattr(filling, "write_part", dies_before)
    with pytest.raises(Killed):
        fill_cache(config, broken)
    monkeypatch.undo()
    with pytest.raises(UserError, match="is not complete"):
        TeacherCache(broken)
    kept = {path.name: path.stat().st_mtime_ns for path in broken.glob("*.h5")}
    assert set(kept) >= {"logits-000000.h5", "logits-000001.h5"}
    fill_cache(config, broken)
    for name in ("logits-000000.h5", "logits-000001.h5"):
        assert (broken / name).stat().st_mtime_ns == kept[name]
    assert content(broken) == content(tmp_path / "whole")
    assert [replace(file) for file in TeacherCache(broken).files] == TeacherCache(tmp_path / "whole").files
    assert not list(broken.glob(".*.tmp"))


@pytest.mark.parametrize("encoder", ["topk", "sample"])
def test_logits_made_a_few_tokens_at_a_time_give_the_same_records(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    config.distillation.teacher.generation.encoder = encoder
    with monkeypatch.context() as patch:
        patch.setattr(generate, "headless", lambda model: None)
        fill_cache(config, tmp_path / "whole")
    made: list[int] = []
    logits = LinearHead.logits

    def look(self: LinearHead, hidden: torch.Tensor) -> torch.Tensor:
        made.append(hidden[..., 0].numel())
        return logits(self, hidden)

    monkeypatch.setattr(LinearHead, "logits", look)
    monkeypatch.setattr(encoders, "_CHUNK_BYTES", 4 * VOCABULARY * 5)
    fill_cache(config, tmp_path / "chunked")
    assert max(made) == 5 and sum(made) == 22 * LENGTH
    whole, chunked = TeacherCache(tmp_path / "whole"), TeacherCache(tmp_path / "chunked")
    for index in range(22):
        for name, array in whole[index].items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(array.astype(float), chunked[index][name].astype(float), atol=1e-3)
            else:
                np.testing.assert_array_equal(array, chunked[index][name])


def test_two_workers_write_the_set_of_one(config: Config, tmp_path: Path) -> None:
    fill_cache(config, tmp_path / "one")
    two = tmp_path / "two"
    generation = config.distillation.teacher.generation
    generation.total_workers = 2
    generation.worker_id = 1
    fill_cache(config, two)
    assert sorted(content(two)) == ["logits-000002.h5", "logits-000003.h5", "logits-000004.h5"]
    with pytest.raises(UserError, match="all workers"):
        TeacherCache(two)
    generation.worker_id = 0
    fill_cache(config, two)
    assert content(two) == content(tmp_path / "one")
    assert TeacherCache(two).files == TeacherCache(tmp_path / "one").files
    assert sorted(path.name for path in two.glob("part-*")) == ["part-00000-of-00002.json", "part-00001-of-00002.json"]


def test_another_number_of_workers_goes_on_with_what_is_done(config: Config, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    generation = config.distillation.teacher.generation
    generation.worker_id, generation.total_workers = 1, 3
    fill_cache(config, cache)
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*.h5")}
    assert 0 < len(kept) < 5
    generation.worker_id, generation.total_workers = 0, 1
    fill_cache(config, cache)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert len(TeacherCache(cache)) == 22


def test_a_missing_cut_or_damaged_file_is_named_and_made_again(config: Config, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fill_cache(config, cache)
    good = content(cache)
    victim = cache / "logits-000002.h5"
    victim.unlink()
    with pytest.raises(UserError, match="logits-000002.h5 is missing"):
        TeacherCache(cache)
    fill_cache(config, cache)
    assert content(cache) == good

    data = victim.read_bytes()
    victim.write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"logits-000002.h5 has \d+ bytes"):
        TeacherCache(cache)
    # Damage within one stored chunk, size kept: HDF5's own checksum stops the read, `verify` finds the file.
    victim.write_bytes(data)
    with h5py.File(victim) as file:
        chunk = file["log_probs"].id.get_chunk_info(3)
    middle = chunk.byte_offset + chunk.size // 2
    victim.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    damaged = TeacherCache(cache)
    with pytest.raises(UserError, match=r"1 of 5 files are damaged: logits-000002.h5 has another checksum"):
        verify_cache(cache, config, sequences=0)
    assert damaged[12]["log_probs"].shape == (LENGTH, 8)
    with pytest.raises(UserError, match=r"logits-000002.h5 is damaged"):
        damaged[13]
    victim.unlink()
    fill_cache(config, cache)
    assert content(cache) == good


def test_a_file_made_again_by_another_worker_is_listed_as_it_is_now(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, generation = tmp_path / "cache", config.distillation.teacher.generation
    generation.compression, generation.total_workers = "none", 2
    for generation.worker_id in range(2):
        fill_cache(config, cache)
    before = TeacherCache(cache).files[3]
    (cache / before.name).unlink()
    encode = TopKEncoder.encode

    def elsewhere(self: TopKEncoder, logits: torch.Tensor, sequence: int) -> dict[str, np.ndarray]:
        record = encode(self, logits, sequence)
        return {**record, "logsumexp": record["logsumexp"] + np.float32(1e-4)}  # another device rounds otherwise

    monkeypatch.setattr(TopKEncoder, "encode", elsewhere)
    generation.worker_id, generation.total_workers = 0, 1
    fill_cache(config, cache)
    after = TeacherCache(cache).files[3]
    assert (after.name, after.bytes) == (before.name, before.bytes) and after.sha256 != before.sha256
    verify_cache(cache, config, sequences=0)


def test_reading_from_loader_workers(config: Config, tmp_path: Path) -> None:
    fill_cache(config, tmp_path / "cache")
    cache = TeacherCache(tmp_path / "cache")
    cache[0]  # opens a file in the parent, which the workers must not use
    loader = DataLoader(cache, batch_size=4, num_workers=2, collate_fn=collate)
    batches = list(loader)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.tolist() == [cache[index]["input_ids"].tolist() for index in range(22)]
    assert batches[0]["teacher"]["indices"].shape == (4, LENGTH, 8)
    assert pickle.loads(pickle.dumps(cache))[3]["input_ids"].tolist() == cache[3]["input_ids"].tolist()


def test_a_damaged_file_is_the_same_line_from_a_loader_worker(config: Config, tmp_path: Path) -> None:
    fill_cache(config, tmp_path / "cache")
    path = tmp_path / "cache" / "logits-000002.h5"
    path.write_bytes(bytes(path.stat().st_size))
    cache = TeacherCache(tmp_path / "cache")
    with pytest.raises(UserError, match="is damaged .*; delete it and run `moe-compress teacher-logits`$") as here:
        cache[12]
    with pytest.raises(UserError) as there:
        list(DataLoader(cache, batch_size=4, num_workers=1, collate_fn=collate))
    assert str(there.value) == str(here.value) and str(here.value).startswith("teacher cache: ")
    assert len(str(here.value).splitlines()) == 1


def test_bad_settings_are_one_line(config: Config, tmp_path: Path) -> None:
    generation = config.distillation.teacher.generation
    for changes, message in [
        ({"top_k": VOCABULARY + 1}, "top_k=98 must be between 1 and the vocabulary size 97"),
        ({"worker_id": 2, "total_workers": 2}, "worker_id=2 must be"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ]:
        config.distillation.teacher.generation = replace(generation, **changes)
        with pytest.raises(UserError, match=message):
            fill_cache(config, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*.h5"))


def test_a_damaged_manifest_is_named(config: Config, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fill_cache(config, cache)
    manifest = cache / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["files"][1]
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match="sequences from 5 on are missing"):
        TeacherCache(cache)
    manifest.write_text("{")
    with pytest.raises(UserError, match="manifest.json cannot be read"):
        TeacherCache(cache)
