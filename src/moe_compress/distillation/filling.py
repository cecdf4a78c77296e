"""Filling a cache file by file: which are finished, writing those that are not, and declaring the cache complete."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compress.config import GenerationConfig
from moe_compress.data import Row
from moe_compress.distillation.chunks import HeadLogits, TeacherHead
from moe_compress.distillation.data import collate
from moe_compress.distillation.encoders import Encoder, make_encoder
from moe_compress.distillation.fingerprints import rows_fingerprint
from moe_compress.distillation.manifest import (
    MANIFEST,
    CacheFile,
    Header,
    check_header,
    listed_files,
    read_manifest,
    read_part,
    summary,
    write_manifest,
    write_part,
)
from moe_compress.distillation.records import Record, targets_of
from moe_compress.distillation.writer import write_file
from moe_compress.errors import UserError

# What a model is called with, int64 `[n, length]` each, to its logits `[n, length, vocabulary]`, or to what its head
# makes them from.
Forward = Callable[[Mapping[str, Tensor]], Tensor | TeacherHead]


def write_parts(
    directory: Path,
    listing: Path,
    header: Header,
    batch_size: int,
    parts: Iterator[tuple[int, list[Row]]],
    mine: Callable[[int], bool],
    forward: Forward,
    done: Mapping[str, CacheFile],
    bar: Any,
) -> None:
    """Write those files of this worker that are not `done`, and complete the cache if they were the last.

    Args:
        directory: the cache, existing.
        listing: the worker's own manifest.
        header: what every part of the cache is made from.
        batch_size: sequences per forward pass.
        parts: number and rows of every file of the cache in turn.
        mine: whether this worker writes the file of a number.
        forward: the teacher.
        done: files finished already, by any worker, by name.
        bar: told of every sequence.
    """
    encoder = make_encoder(header)
    isolate = header["dataset"]["packing"] == "isolate"
    listed = {file.name: file for file in read_part(listing)[1]} if listing.exists() else {}
    contents: dict[str, str] = {}
    sequences = 0
    for number, rows in parts:
        start, sequences = sequences, sequences + len(rows)
        name = f"logits-{number:06d}.h5"
        contents[name] = rows_fingerprint(rows)
        if name in done:
            _check_content(directory, {name: done[name]}, contents)
        elif mine(number):
            listed[name] = write_file(
                directory / name,
                start=start,
                rows=rows,
                length=header["sequence_length"],
                encoder=encoder,
                vocab_size=header["vocab_size"],
                compression=header["compression"],
                records=_records(rows, start, encoder, forward, batch_size, isolate, bar),
            )
            write_part(listing, header, listed.values())
            continue
        if mine(number):
            bar.update(len(rows))
    if not listing.exists():
        write_part(listing, header, [])
    files = listed_files(directory, header)
    _check_content(directory, files, contents)
    if len(files) < len(contents):
        print(f"teacher logits: {len(files)} of {len(contents)} files are written; the other workers have the rest")
        return
    write_manifest(directory, {**header, "num_sequences": sequences}, files.values())
    for leftover in directory.glob(".logits-*.tmp"):  # of killed writers: nobody is writing any more
        leftover.unlink(missing_ok=True)
    facts = summary(files.values())
    print(
        f"teacher logits: {facts['tokens']:,} tokens in {facts['bytes'] / 1e6:.1f} MB, "
        f"{facts['bytes_per_token']:.1f} bytes per token, in {directory}"
    )


def numbered_parts(rows: Iterator[Row], header: Header) -> Iterator[tuple[int, list[Row]]]:
    """Number and rows of each file of a cache in turn, one file's rows in memory at a time."""
    number = 0
    while part := list(islice(rows, header["sequences_per_file"])):
        yield number, part
        number += 1


def _records(
    rows: Sequence[Row], start: int, encoder: Encoder, forward: Forward, batch_size: int, isolate: bool, bar: Any
) -> Iterator[Record]:
    """What the encoder makes of the teacher's logits, for each row in turn."""
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        inputs = collate(batch, isolate=isolate)
        del inputs["labels"]
        logits = forward(inputs)
        for number, row in enumerate(batch):
            targets = torch.from_numpy(targets_of(row["labelled"]).nonzero()[0])
            yield encoder.encode(_rows(logits, number, targets, encoder.vocab_size), start + first + number)
        bar.update(len(batch))


def _rows(logits: Tensor | TeacherHead, number: int, index: Tensor, vocab_size: int) -> Tensor | HeadLogits:
    """The logits `[n, vocab_size]` of the tokens `index` of sequence `number` of a batch."""
    if isinstance(logits, TeacherHead):
        hidden = logits.hidden[number]
        return HeadLogits(hidden.index_select(0, index.to(hidden.device)), logits.head, vocab_size)
    return logits[number].index_select(0, index.to(logits.device))[:, :vocab_size]


def _check_content(directory: Path, files: Mapping[str, CacheFile], contents: Mapping[str, str]) -> None:
    for name, file in files.items():
        if contents.get(name) != file.content:
            raise UserError(
                f"teacher cache: {directory / name} holds other text than the data set has now; make the cache again "
                "with distillation.teacher.generation.force_regenerate=true, or use another cache_dir"
            )


def finished_files(directory: Path, header: Header, settings: GenerationConfig) -> dict[str, CacheFile]:
    """The files that count as done, after removing what `force_regenerate` or damage makes void."""
    manifest = directory / MANIFEST
    if settings.force_regenerate and _is_void(directory, header):
        _wipe(directory)
    files = listed_files(directory, header, forget=True)
    if manifest.exists():
        have, entries = read_manifest(directory)
        check_header(have, header, directory)
        if any(entry.name not in files for entry in entries):
            manifest.unlink()  # a file was deleted or cut: the cache is to be completed again
    return files


def _is_void(directory: Path, header: Header) -> bool:
    """Whether a forced run starts anew: the cache is complete or foreign. An unfinished one goes on."""
    if (directory / MANIFEST).exists():
        return True
    try:
        listed_files(directory, header)
    except UserError:
        return True
    return False


def _wipe(directory: Path) -> None:
    for pattern in (MANIFEST, "part-*.json", "logits-*.h5"):
        for path in directory.glob(pattern):
            path.unlink()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Let one worker at a time look at and clear the directory."""
    with (directory / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
