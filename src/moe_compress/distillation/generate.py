"""Filling the teacher cache: the stage `teacher-logits`, by one worker or many, resumable at every file.

The rows of the data set are divided into files of `sequences_per_file` consecutive ones. Of a data set in memory each
worker writes a contiguous range of files. A stream passes through every worker, which holds one file's rows at a time
and writes each N-th file. So the set of files is the same for any number of workers, and what a killed worker finished
counts even if it is restarted with another number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from moe_compress.config import Config, GenerationConfig
from moe_compress.data import read_rows, rows_in_memory
from moe_compress.data.chat import chat_template
from moe_compress.distillation.chunks import TeacherHead
from moe_compress.distillation.encoders import make_encoder
from moe_compress.distillation.filling import Forward, finished_files, locked, numbered_parts, write_parts
from moe_compress.distillation.fingerprints import rows_fingerprint
from moe_compress.distillation.heads import HeadlessModel, headless
from moe_compress.distillation.manifest import MANIFEST, Header, part_name, read_manifest, summary
from moe_compress.distillation.sharded import Together, join_ranks, need_ranks
from moe_compress.distillation.teachers import (
    common_vocabulary,
    expected_header,
    input_device,
    load_spread_teacher,
    teacher_path,
    vocabulary_size,
)
from moe_compress.errors import UserError
from moe_compress.files import fingerprint
from moe_compress.modeling import load_tokenizer, resolve_model_path
from moe_compress.torchrun import rank, world_size

if TYPE_CHECKING:
    from moe_compress.run import Run


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
        _wait_for_ranks()  # rank 0 says for all that the stage is finished
    if (directory / MANIFEST).exists():
        header, files = read_manifest(directory)
        run.record("teacher-logits", path=str(directory), teacher=header["teacher"], **summary(files))


def fill_cache(config: Config, directory: Path) -> None:
    """Write this worker's part of a cache to `directory`: what `generate_teacher_logits` does, without a run."""
    settings, dataset = config.distillation.teacher.generation, config.distillation.dataset
    _check(settings)
    source = teacher_path(config)
    tokenizer = load_tokenizer(str(source), trust_remote_code=config.model.trust_remote_code)
    width = vocabulary_size(source, config)
    student = vocabulary_size(resolve_model_path(config.model.name, config.model.revision), config)
    header: Header = expected_header(config, tokenizer) | {
        "vocab_size": common_vocabulary(width, student, tokenizer),
        "sequences_per_file": settings.sequences_per_file,
        "compression": settings.compression,
    }
    make_encoder(header)  # refuses a top_k that does not fit before anything is written
    if dataset.messages_column is not None:
        header["chat_template"] = fingerprint(chat_template(tokenizer))
    rows = None
    if not dataset.streaming:
        rows = rows_in_memory(dataset, tokenizer, config.seed)
        header |= {"num_sequences": len(rows), "content": rows_fingerprint(rows)}
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        done = finished_files(directory, header, settings)
    if (directory / MANIFEST).exists():
        print(f"teacher logits: {directory} is complete already")
        return
    forward: Forward = _teacher_forward(config, width)
    together = None
    if config.distillation.teacher.fsdp:
        need_ranks()
        join_ranks()
        forward = together = Together(forward)
    worker, workers = _worker(settings)
    parts = numbered_parts(read_rows(dataset, tokenizer, config.seed) if rows is None else iter(rows), header)
    if rows is None:
        mine: Callable[[int], bool] = lambda number: number % workers == worker  # noqa: E731
        expected = dataset.max_samples
    else:
        total = -(-len(rows) // header["sequences_per_file"])
        mine = range(worker * total // workers, (worker + 1) * total // workers).__contains__
        expected = len(rows)
    bar = tqdm(
        total=expected and -(-expected // workers),
        desc=f"teacher logits {worker + 1}/{workers}" if workers > 1 else "teacher logits",
        unit="seq",
        dynamic_ncols=True,
        mininterval=1,
    )
    with bar:
        write_parts(
            directory,
            directory / part_name(worker, workers),
            header,
            settings.batch_size,
            parts,
            mine,
            forward,
            done,
            bar,
        )
    if together is not None:
        together.drain()


def _teacher_forward(config: Config, width: int) -> Forward:
    """The teacher, loaded with its first forward pass; its logits, or where its head is linear what it makes them from.

    Args:
        width: logits that its config promises.
    """

    @cache
    def teacher() -> tuple[Any, HeadlessModel | None]:
        model = load_spread_teacher(config)
        return model, headless(model)

    @torch.no_grad()
    def forward(inputs: Mapping[str, Tensor]) -> Tensor | TeacherHead:
        model, without_head = teacher()
        placed = {name: value.to(input_device(model)) for name, value in inputs.items()}
        result: Tensor | TeacherHead
        if without_head is not None:
            before: TeacherHead = without_head.run(model, placed, TeacherHead)
            result, found = before, before.head.weight.shape[0]
        else:
            logits: Tensor = model(**placed, use_cache=False).logits
            result, found = logits, logits.shape[-1]
        if found != width:
            raise UserError(
                f"the teacher at {teacher_path(config)} gives {found} logits but its config says vocab_size={width}"
            )
        return result

    return forward


def _worker(settings: GenerationConfig) -> tuple[int, int]:
    """Number of this worker and how many there are: as set, and under torchrun every rank is one."""
    return settings.worker_id * world_size() + rank(), settings.total_workers * world_size()


def _wait_for_ranks() -> None:
    if world_size() > 1:
        join_ranks()
        torch.distributed.barrier()


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
