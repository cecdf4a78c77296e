"""`moe-compress cache info|verify`: what a cache holds, whether its files are whole, and whether the teacher agrees."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from moe_compress.config import Config
from moe_compress.distillation.data import collate
from moe_compress.distillation.encoders import make_encoder
from moe_compress.distillation.fingerprints import rows_fingerprint, teacher_fingerprint
from moe_compress.distillation.manifest import (
    MANIFEST,
    CacheFile,
    Header,
    dataset_words,
    read_manifest,
    read_part,
    summary,
)
from moe_compress.distillation.reader import TeacherCache
from moe_compress.distillation.records import AXES, ENTRIES, OFFSETS, targets_of, text_fields
from moe_compress.distillation.teachers import input_device, load_spread_teacher, teacher_path
from moe_compress.errors import UserError, first_line
from moe_compress.files import sha256_of_file

# How far the teacher may be from what it once said, by `Encoder.distance`: rounding of the stored 16 bits, and of
# another batch or device in the teacher's own type.
_TOLERANCE = {torch.float32: 0.01}
_TOLERANCE_HALF = 0.1


def cache_facts(directory: Path) -> dict[str, Any]:
    """What a cache holds, complete or not, from its manifests: `complete`, counts, `header` and `files`.

    Raises:
        UserError: there is none, or a manifest is damaged.
    """
    complete = (directory / MANIFEST).exists()
    parts = [read_part(part) for part in sorted(directory.glob("part-*.json"))]
    if complete or not parts:
        header, files = read_manifest(directory)  # says so if there is none
    else:
        header = parts[0][0]
        files = list({file.name: file for _, listed in parts for file in listed}.values())
    return {
        "directory": str(directory),
        "complete": complete,
        "workers": len(parts),
        **summary(files),
        "header": header,
        "files": [asdict(file) for file in files],
    }


def show_cache(directory: Path, *, as_json: bool = False) -> None:
    """Print `cache_facts` as a table or as JSON."""
    facts = cache_facts(directory)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        Console().print(_info_table(facts))


def teacher_as_recorded(config: Config, directory: Path, *, given: Collection[str]) -> None:
    """Let `config` name the teacher that a cache says it was made from, its revision and type, where not `given`."""
    header, _ = read_manifest(directory)
    if not {"model", "model.name", "distillation.teacher.model_path"} & set(given):
        config.distillation.teacher.model_path = None
        config.model.name = header["teacher_name"]
        if "model.revision" not in given:
            config.model.revision = header.get("teacher_revision")
    if "model.dtype" not in given:
        config.model.dtype = header["teacher_dtype"]


def verify_cache(directory: Path, config: Config, *, sequences: int, as_json: bool = False) -> None:
    """Check every file of a cache, and a random sample of sequences against the teacher; print what was found.

    Args:
        directory: the cache.
        config: says where the teacher is and how it is loaded.
        sequences: of the sample; 0 does not load the teacher, nor do damaged files.
        as_json: print one object: `good`, `files` with the `problem` of each (null where it is good), and `teacher`
            (null where it was not asked) with `sequences`, `distance` and `tolerance`.

    Raises:
        UserError: the cache is incomplete; files are damaged (each is named); or the teacher does not agree.
    """
    header, files = read_manifest(directory)
    checked = [(file, next(file_problems(directory / file.name, file, header), None)) for file in files]
    damaged = {file.name: problem for file, problem in checked if problem is not None}
    if not as_json:
        Console().print(_file_table(directory, checked))
        if not damaged:
            print(f"{len(files)} files are good: checksums, structure and counts")
    teacher, agrees = None, True
    if sequences > 0 and not damaged:
        distance, tolerance = teacher_distance(TeacherCache(directory), config, sequences)
        teacher = {"sequences": min(sequences, header["num_sequences"]), "distance": distance, "tolerance": tolerance}
        agrees = distance <= tolerance
    if as_json:
        listed = [{**asdict(file), "problem": problem} for file, problem in checked]
        good = not damaged and agrees
        print(json.dumps({"directory": str(directory), "good": good, "files": listed, "teacher": teacher}, indent=2))
    if damaged:
        named = "; ".join(f"{name} {problem}" for name, problem in damaged.items())
        raise UserError(
            f"teacher cache {directory}: {len(damaged)} of {len(files)} files are damaged: {named}; delete them and "
            "run `moe-compress teacher-logits` to make them again"
        )
    if teacher is None:
        return
    within = f"distance {teacher['distance']:.3g}, at most {teacher['tolerance']:g} is rounding"
    if not agrees:
        raise UserError(
            f"teacher cache {directory}: the teacher at {teacher_path(config)} says something else now ({within}); "
            "check model.dtype, or make the cache again"
        )
    if not as_json:
        print(f"the teacher agrees on {teacher['sequences']} sequences: {within}")


def _file_table(directory: Path, checked: Sequence[tuple[CacheFile, str | None]]) -> Table:
    table = Table("file", "sequences", "tokens", "MB", "state", title=f"teacher cache {directory}")
    for file, problem in checked:
        numbers = (f"{file.rows:,}", f"{file.tokens:,}", f"{file.bytes / 1e6:.1f}")
        table.add_row(file.name, *numbers, problem or "good", style="red" if problem else None)
    return table


def file_problems(path: Path, file: CacheFile, header: Header) -> Iterator[str]:
    """What is wrong with one file, in words, the simplest first."""
    if not path.is_file():
        yield "is missing"
        return
    size = path.stat().st_size
    if size != file.bytes:
        yield f"has {size} bytes instead of {file.bytes}"
    elif sha256_of_file(path) != file.sha256:
        yield "has another checksum than the manifest"
    try:
        with h5py.File(path, "r") as stored:
            yield from _structure_problems(stored, file, header)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        yield f"cannot be read ({first_line(error)})"


def _structure_problems(stored: h5py.File, file: CacheFile, header: Header) -> Iterator[str]:
    encoder = make_encoder(header)
    length = header["sequence_length"]
    offsets = stored[OFFSETS][:]
    if offsets.shape != (file.rows + 1, len(AXES)) or (np.diff(offsets, axis=0) < 0).any() or offsets[0].any():
        yield "does not say where its sequences begin"
        return
    for name, field in {**text_fields(header["vocab_size"], length), **encoder.fields()}.items():
        entries = int(offsets[-1, AXES.index(field.axis)])
        shape = (entries,) if field.axis == "entry" else (entries, *field.shape)
        if stored[name].shape != shape or stored[name].dtype != field.dtype:
            yield f"holds {name} {stored[name].shape} {stored[name].dtype} instead of {shape} {field.dtype}"
            return
    ends = offsets[:, 0]
    if ends[-1] != file.tokens or (np.diff(ends) > length).any():
        yield f"holds {ends[-1]} tokens instead of {file.tokens}"
    text = {name: stored[name][:] for name in text_fields(header["vocab_size"], length)}
    rows = [{name: values[start:end] for name, values in text.items()} for start, end in pairwise(ends)]
    if rows_fingerprint(rows) != file.content:
        yield "holds other text than the manifest says"
    targets = np.cumsum([0, *(targets_of(row["labelled"]).sum() for row in rows)])
    if (targets != offsets[:, 1]).any():
        yield "holds targets where no label is, or the other way round"
    if ENTRIES in stored:
        counts = np.concatenate([[0], np.cumsum(stored[ENTRIES][:], dtype=np.int64)])
        if (counts[offsets[:, 1]] != offsets[:, 2]).any():
            yield "holds more or fewer draws than its targets say"
    for name in ("input_ids", "indices"):
        if len(stored[name]) and int(stored[name][:].max()) >= header["vocab_size"]:
            yield f"holds {name} beyond the vocabulary of {header['vocab_size']}"


@torch.no_grad()
def teacher_distance(cache: TeacherCache, config: Config, sequences: int) -> tuple[float, float]:
    """The mean `Encoder.distance` of a random sample of sequences from what the teacher says now, and what is allowed.

    Raises:
        UserError: the teacher is another than the one the cache was made from.
    """
    path = teacher_path(config)
    if teacher_fingerprint(path) != cache.header["teacher"]:
        raise UserError(
            f"teacher cache {cache.directory} was made from another teacher than {path} "
            f"({cache.header['teacher_name']} then); give distillation.teacher.model_path or model"
        )
    model = load_spread_teacher(config)
    device = input_device(model)
    dataset = cache.header["dataset"]
    chosen = np.random.default_rng(config.seed).permutation(len(cache))[:sequences]
    distances = []
    for index in chosen:
        record = cache[int(index)]
        batch = collate([record], isolate=dataset["packing"] == "isolate")
        targets = cache.encoder.decode(batch.pop("teacher")).flatten()
        del batch["labels"]
        logits = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).logits[0].cpu()
        stored = torch.from_numpy(targets_of(record["labelled"]).nonzero()[0])
        now = logits[stored, : cache.vocab_size]
        distances.append(cache.encoder.distance(targets.rows(stored), now))
    return float(np.mean(distances)), _TOLERANCE.get(model.dtype, _TOLERANCE_HALF)


def _info_table(facts: Mapping[str, Any]) -> Table:
    header = facts["header"]
    encoder = make_encoder(header)
    settings = {name: header[name] for name in ("top_k", "samples", "sample_temperature") if name in header}
    text = text_fields(header["vocab_size"], header["sequence_length"])
    revision = f", revision {header['teacher_revision']}" if header.get("teacher_revision") else ""
    state = (
        "complete" if facts["complete"] else "not complete: run `moe-compress teacher-logits` (all workers) to go on"
    )
    rows: dict[str, Any] = {
        "state": state,
        "sequences": f"{facts['sequences']:,} of up to {header['sequence_length']:,} tokens",
        "tokens": f"{facts['tokens']:,}",
        "size": f"{facts['bytes'] / 1e6:,.1f} MB, compression {header['compression']}",
        "files": f"{len(facts['files']):,}, of {facts['workers']} workers",
        "bytes per token": f"{facts['bytes_per_token']:.1f}",
        "encoder": ", ".join([encoder.name, *(f"{name} {value}" for name, value in settings.items())]),
        "loss temperatures": encoder.temperatures,
        "vocabulary": f"{header['vocab_size']:,} ids in {text['input_ids'].dtype}",
        "teacher": f"{header['teacher_name']}{revision} ({header['teacher']}), model.dtype={header['teacher_dtype']}",
        "tokenizer": header["tokenizer"],
        "data set": dataset_words(header["dataset"]),
    }
    table = Table(show_header=False, title=f"teacher cache {facts['directory']}")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table
