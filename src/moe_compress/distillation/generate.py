"""Filling the teacher cache: the stage `teacher-logits`, by one worker or many, resumable at every file.

The data is divided into files of `sequences_per_file` consecutive sequences, and the files into contiguous ranges, one
for each worker. So the set of files is the same for any number of workers, and what a killed worker finished counts
even if it is restarted with another number of workers.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from moe_compress.config import Config, GenerationConfig
from moe_compress.data import packed_dataset
from moe_compress.distillation.encoders import make_encoder
from moe_compress.distillation.fingerprints import rows_fingerprint
from moe_compress.distillation.manifest import (
    MANIFEST,
    CacheFile,
    Header,
    check_header,
    listed_files,
    part_name,
    read_manifest,
    read_part,
    write_manifest,
    write_part,
)
from moe_compress.distillation.teachers import expected_header, load_teacher, teacher_path, vocabulary_size
from moe_compress.distillation.writer import write_file
from moe_compress.errors import UserError
from moe_compress.modeling import load_tokenizer

if TYPE_CHECKING:
    from moe_compress.run import Run

Forward = Callable[[Tensor], Tensor]


def generate_teacher_logits(run: Run) -> None:
    """Write this worker's part of the teacher cache of a run; does nothing where the cache is complete already.

    Raises:
        UserError: the settings do not fit each other, or the directory holds the cache of something else.
    """
    config = run.config
    if not config.distillation.teacher.use_cached_logits:
        print("teacher logits: distillation.teacher.use_cached_logits is false, the teacher will run live")
        return
    directory = run.teacher_logits_dir
    with run.stage("teacher-logits"):
        fill_cache(config, directory)
    if (directory / MANIFEST).exists():
        header, files = read_manifest(directory)
        run.record("teacher-logits", path=str(directory), **_summary(header, files))


def fill_cache(config: Config, directory: Path) -> None:
    """Write this worker's part of a cache to `directory`: what `generate_teacher_logits` does, without a run."""
    settings = config.distillation.teacher.generation
    _check(settings)
    source = teacher_path(config)
    tokenizer = load_tokenizer(str(source), trust_remote_code=config.model.trust_remote_code)
    dataset = packed_dataset(config.distillation.dataset, tokenizer, config.seed)

    @cache  # loaded only if there is something to write
    def teacher() -> Any:
        return load_teacher(config, "cuda" if torch.cuda.is_available() else "cpu").eval()

    vocab_size = vocabulary_size(source, config)
    header: Header = expected_header(config, tokenizer, vocab_size) | {
        "dtype": "float16",
        "num_sequences": len(dataset),
        "sequences_per_file": settings.sequences_per_file,
        "compression": settings.compression,
        "content": rows_fingerprint(dataset),
    }
    make_encoder(header)  # refuses a top_k that does not fit before anything is written
    directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory):
        done = _finished(directory, header, settings)
    if (directory / MANIFEST).exists():
        print(f"teacher logits: {directory} is complete already")
        return

    @torch.no_grad()
    def forward(input_ids: Tensor) -> Tensor:
        model = teacher()
        logits: Tensor = model(input_ids=input_ids.to(model.device), use_cache=False).logits
        if logits.shape[-1] != vocab_size:
            raise UserError(
                f"the teacher at {source} gives {logits.shape[-1]} logits but its config says vocab_size={vocab_size}"
            )
        return logits

    write_range(directory, header, settings, dataset, forward, done)


def write_range(
    directory: Path,
    header: Header,
    settings: GenerationConfig,
    dataset: Any,
    forward: Forward,
    done: dict[str, CacheFile],
) -> None:
    """Write the files of this worker's range that are not `done`, and complete the cache if they were the last.

    Args:
        directory: the cache, existing.
        header: what every part of it is made from.
        settings: worker, batch size.
        dataset: rows of token ids, column `input_ids`.
        forward: int64 `[n, length]` to logits `[n, length, vocabulary]`.
        done: files finished already, by name.
    """
    encoder = make_encoder(header)
    per_file, length = header["sequences_per_file"], header["sequence_length"]
    total = -(-len(dataset) // per_file)
    worker, workers = settings.worker_id, settings.total_workers
    mine = range(worker * total // workers, (worker + 1) * total // workers)
    part = directory / part_name(worker, workers)
    listed = {file.name: file for file in read_part(part)[1]} if part.exists() else {}
    listed = {name: file for name, file in listed.items() if name in done}
    sequences = sum(min(per_file, len(dataset) - number * per_file) for number in mine)
    label = f"teacher logits {worker + 1}/{workers}" if workers > 1 else "teacher logits"
    with tqdm(total=sequences, desc=label, unit="seq", dynamic_ncols=True, mininterval=1) as bar:
        for number in mine:
            start = number * per_file
            rows = min(per_file, len(dataset) - start)
            name = f"logits-{number:06d}.h5"
            if name in done:
                bar.update(rows)
                continue

            def batches(start: int = start, rows: int = rows) -> Iterator[dict[str, np.ndarray]]:
                for first in range(start, start + rows, settings.batch_size):
                    ids = np.asarray(dataset[first : min(first + settings.batch_size, start + rows)]["input_ids"])
                    yield {"input_ids": ids, **encoder.encode(forward(torch.from_numpy(ids).long()))}
                    bar.update(len(ids))

            listed[name] = write_file(
                directory / name,
                start=start,
                rows=rows,
                length=length,
                encoder=encoder,
                vocab_size=header["vocab_size"],
                compression=header["compression"],
                batches=batches(),
            )
            write_part(part, header, listed.values())
    if not part.exists():
        write_part(part, header, [])
    files = listed_files(directory, header)
    if len(files) == total:
        write_manifest(directory, header, files.values())
        for leftover in directory.glob(".logits-*.tmp"):  # of killed writers: nobody is writing any more
            leftover.unlink(missing_ok=True)
        summary = _summary(header, list(files.values()))
        print(
            f"teacher logits: {summary['tokens']:,} tokens in {summary['bytes'] / 1e6:.1f} MB, "
            f"{summary['bytes_per_token']:.1f} bytes per token, in {directory}"
        )
    else:
        print(f"teacher logits: {len(files)} of {total} files are written; the other workers have the rest")


def _summary(header: Header, files: list[CacheFile]) -> dict[str, Any]:
    size = sum(file.bytes for file in files)
    tokens = header["num_sequences"] * header["sequence_length"]
    return {"tokens": tokens, "bytes": size, "bytes_per_token": round(size / tokens, 2), "teacher": header["teacher"]}


def _check(settings: GenerationConfig) -> None:
    group = "distillation.teacher.generation"
    if settings.total_workers < 1 or not 0 <= settings.worker_id < settings.total_workers:
        raise UserError(
            f"{group}.worker_id={settings.worker_id} must be from 0 to total_workers - 1 "
            f"(total_workers={settings.total_workers})"
        )
    for name in ("batch_size", "sequences_per_file"):
        if getattr(settings, name) < 1:
            raise UserError(f"{group}.{name}={getattr(settings, name)} must be at least 1")
    if settings.compression not in ("gzip", "lzf", "none"):
        raise UserError(f"{group}.compression={settings.compression} must be gzip, lzf or none")


def _finished(directory: Path, header: Header, settings: GenerationConfig) -> dict[str, CacheFile]:
    """The files that count as done, after removing what `force_regenerate` or damage makes void."""
    manifest = directory / MANIFEST
    if settings.force_regenerate and _is_void(directory, header):
        _wipe(directory)
    files = listed_files(directory, header)
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
def _lock(directory: Path) -> Iterator[None]:
    """Let one worker at a time look at and clear the directory."""
    with (directory / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
