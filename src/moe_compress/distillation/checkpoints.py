"""Checkpoints of the student: what is in them, how training goes on from one, and which of them are kept.

A checkpoint is a Transformers model directory with the files of the zero-shot checkpoint (config, tokenizer, code) and
every tensor in the type it has there, so that its bytes are the same. What training needs beyond that is in its folder
`training_state`: the Trainer's state, and the fp32 values of those weights that the stored type rounds. Only the newest
checkpoint has that folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging as hf_logging

from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.evaluation.claims import is_alive
from moe_compress.evaluation.results import is_of, read_results
from moe_compress.files import directory_in_progress
from moe_compress.modeling import load_model
from moe_compress.modeling.side_files import copy_side_files

if TYPE_CHECKING:
    from moe_compress.run import Run

TRAINING_STATE = "training_state"
SPIKE_STATE = "spikes.json"  # see `spikes`
_MASTER = "master_weights.safetensors"

# In this folder of the run's evaluations is a file of each process that watches (`evaluation.claims.presence`); as long
# as one of them lives, checkpoints that results.jsonl does not have yet are kept.
WATCHERS = "watchers"


def stored_dtypes(model: Any) -> dict[str, torch.dtype]:
    """The type of every tensor of a model as loaded, to store it in again."""
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def save_student(
    model: Any, state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], directory: Path, origin: Path
) -> None:
    """Write a model directory that differs from the zero-shot checkpoint in nothing but the values of its weights.

    Args:
        model: the student, unwrapped.
        state: its full state dict.
        dtypes: type in which each tensor is stored.
        directory: existing directory to write to.
        origin: the zero-shot checkpoint, whose other files are copied.
    """
    converted: dict[int, Tensor] = {}
    stored = {}
    for name, tensor in state.items():
        # Tied tensors must stay one tensor, or save_pretrained would not know them; empty ones share no memory.
        key = tensor.data_ptr() if tensor.numel() else id(tensor)
        if key not in converted:
            converted[key] = tensor.detach().to("cpu", dtypes[name])
        stored[name] = converted[key]
    # Its own bar would break the trainer's.
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model.save_pretrained(directory, state_dict=stored)
    finally:
        if shown:
            hf_logging.enable_progress_bar()
    # The config that save_pretrained writes tells of the training (its type, its use_cache), not of the checkpoint.
    shutil.copyfile(origin / "config.json", directory / "config.json")
    copy_side_files(origin, directory)


def save_master_weights(state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], directory: Path) -> None:
    """Write the fp32 values of the tensors that lose something in the type they are stored in."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.data_ptr() in seen or tensor.dtype == dtypes[name]:
            continue
        seen.add(tensor.data_ptr())
        if not torch.equal(tensor.to(dtypes[name]).to(tensor.dtype), tensor):
            kept[name] = tensor.detach().cpu().contiguous()
    save_file(kept, directory / _MASTER)


def write_checkpoint(run: Run, step: int, student: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Write the checkpoint of a step from which another stage can begin, and drop those that are kept no longer."""
    state = student.state_dict()
    with directory_in_progress(run.checkpoint(step)) as directory:
        save_student(student, state, dtypes, directory, run.checkpoint(0))
        (directory / TRAINING_STATE).mkdir()
        save_master_weights(state, dtypes, directory / TRAINING_STATE)
        carried = run.checkpoints()[-1][1] / TRAINING_STATE / SPIKE_STATE
        if carried.exists():
            shutil.copyfile(carried, directory / TRAINING_STATE / SPIKE_STATE)
    rotate(run, run.config.distillation.training.save_total_limit)


def load_master_weights(model: Any, checkpoint: Path) -> None:
    """Replace the rounded weights of a model loaded from `checkpoint`, now in fp32, by what they were in training.

    Raises:
        UserError: the checkpoint has no training state, or that of another model.
    """
    path = checkpoint / TRAINING_STATE / _MASTER
    if not path.exists():
        raise UserError(
            f"{checkpoint} has no {TRAINING_STATE}, so that training cannot go on from it; "
            "move it out of the run to go on from an earlier one"
        )
    unknown = model.load_state_dict(load_file(path), strict=False).unexpected_keys
    if unknown:
        raise UserError(f"{path} is of another model: it has {unknown[0]}")


def load_student(checkpoint: Path, config: Config, *, resumed: bool) -> tuple[Any, dict[str, torch.dtype]]:
    """The student in fp32, and the types its tensors are stored in.

    Args:
        checkpoint: the checkpoint to load.
        config: the settings of the run.
        resumed: whether training wrote it, so that its fp32 weights are there too.
    """
    model = load_model(str(checkpoint), dtype="auto", trust_remote_code=config.model.trust_remote_code)
    dtypes = stored_dtypes(model)
    model.float()
    if resumed:
        load_master_weights(model, checkpoint)
    return model, dtypes


def rotate(run: Run, limit: int) -> None:
    """Drop the training state of all checkpoints but the newest, and all but the `limit` newest checkpoints.

    Never dropped: the zero-shot checkpoint, the target of `RUN/best`, and, while an evaluator is watching (see
    `WATCHERS`), those of which there is no result and no failure yet. A `limit` of 0 or less keeps all.
    """
    trained = [(step, path) for step, path in run.checkpoints() if step > 0]
    for _, path in trained[:-1]:
        _remove(path / TRAINING_STATE)
    if limit < 1:
        return
    watched = any(is_alive(file) for file in (run.evals_dir / WATCHERS).glob("*"))
    # Before `best`: an evaluator links what is the best before it writes the result.
    records = read_results(run.evals_dir) if watched else []
    best = _resolved(run.path / "best")
    for step, path in trained[:-limit]:
        evaluated = any(
            record["model"] == "student" and record["step"] == step and is_of(record, path) for record in records
        )
        if path.resolve() != best and (evaluated or not watched):
            _remove(path)


def _resolved(link: Path) -> Path | None:
    return link.resolve() if link.exists() else None


def _remove(path: Path) -> None:
    """Delete a directory so that nobody sees half of it."""
    if not path.exists():
        return
    root = path.parent if path.name != TRAINING_STATE else path.parent.parent
    doomed = root / f".{path.parent.name}-{path.name}.removed"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
