"""The teacher behind one interface: `CachedTeacher` unpacks what the cache holds, `live.LiveTeacher` runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig

from moe_compress.config import Config
from moe_compress.distillation.chunks import TeacherHead
from moe_compress.distillation.encoders import Encoder, encoder_settings
from moe_compress.distillation.fingerprints import teacher_fingerprint, tokenizer_fingerprint
from moe_compress.distillation.manifest import FORMAT_VERSION, Header, dataset_settings
from moe_compress.distillation.sharded import shard_teacher
from moe_compress.distillation.targets import TeacherTargets
from moe_compress.errors import UserError
from moe_compress.modeling import load_model, resolve_model_path
from moe_compress.torchrun import local_rank, local_world_size


class TeacherSource(Protocol):
    """Targets for the tokens of a batch."""

    def __call__(
        self, inputs: Mapping[str, Tensor], record: Mapping[str, Tensor] | None
    ) -> TeacherTargets | TeacherHead:
        """Targets `[batch, length, ...]` for what a model is called with, `input_ids` and perhaps `position_ids`
        `[batch, length]`; `record` is what the data set holds beside it."""


class CachedTeacher:
    """Targets from the records of a `TeacherCache`."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, inputs: Mapping[str, Tensor], record: Mapping[str, Tensor] | None) -> TeacherTargets:
        if record is None:
            raise ValueError("a cached teacher needs the batch's record")
        return self.encoder.decode(record)


def teacher_path(config: Config) -> Path:
    """The directory of the teacher's checkpoint; downloads it from the hub if it is not there yet."""
    other = config.distillation.teacher.model_path
    return resolve_model_path(other) if other else resolve_model_path(config.model.name, config.model.revision)


def vocabulary_size(checkpoint: Path, config: Config) -> int:
    """The width of a checkpoint's logits, from its config."""
    loaded = AutoConfig.from_pretrained(checkpoint, trust_remote_code=config.model.trust_remote_code)
    return int(loaded.get_text_config().vocab_size)


def common_vocabulary(teacher: int, student: int, tokenizer: Any) -> int:
    """The ids that teacher and student are compared on, where their vocabularies may be padded to different sizes.

    Args:
        teacher: width of the teacher's logits.
        student: width of the student's.
        tokenizer: the one they share.

    Raises:
        UserError: they differ in ids that the tokenizer uses.
    """
    used = max(tokenizer.get_vocab().values()) + 1
    if teacher != student and min(teacher, student) < used:
        raise UserError(
            f"the teacher has a vocabulary of {teacher} tokens and the student one of {student}, but the tokenizer "
            f"uses {used}: only unused padding may differ; use models of the same tokenizer"
        )
    return min(teacher, student)


def load_teacher(config: Config) -> Any:
    """The teacher, in `model.dtype`, on this process's device, or sharded over the ranks (`teacher.fsdp`).

    Raises:
        UserError: it cannot be loaded or sharded.
    """

    def load(device: str) -> Any:
        return load_model(
            str(teacher_path(config)),
            dtype=config.model.dtype,
            device=device,
            trust_remote_code=config.model.trust_remote_code,
        )

    if config.distillation.teacher.fsdp:
        return shard_teacher(lambda: load("cpu"))
    return load(f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")


def load_spread_teacher(config: Config) -> Any:
    """The teacher for writing logits: as `load_teacher`, or spread by accelerate as `device_map` says."""
    teacher = config.distillation.teacher
    if teacher.device_map is None:
        return load_teacher(config)
    if teacher.fsdp:
        raise UserError("distillation.teacher.device_map and fsdp both spread the teacher; keep one of them")
    if local_world_size() > 1:
        raise UserError(
            "distillation.teacher.device_map spreads the teacher of one process over all GPUs: instead of torchrun use "
            "GPUS_PER_WORKER with scripts/generate_teacher_logits_parallel.sh"
        )
    memory = {int(device) if device.isdecimal() else device: size for device, size in teacher.max_memory.items()}
    return load_model(
        str(teacher_path(config)),
        dtype=config.model.dtype,
        trust_remote_code=config.model.trust_remote_code,
        device_map=teacher.device_map,
        max_memory=memory or None,
        offload_folder=teacher.offload_folder,
    )


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs and leaves its logits: its device, or the first accelerator it is spread over."""
    places = getattr(model, "hf_device_map", None)
    if not places:
        return torch.device(model.device)
    for place in places.values():
        if str(place) not in ("cpu", "disk"):
            return torch.device(f"cuda:{place}" if isinstance(place, int) else place)
    return torch.device("cpu")


def expected_header(config: Config, tokenizer: Any) -> Header:
    """What the cache of a run must have been made from, but for the vocabulary, which may be padded differently.

    Args:
        config: the settings of the run.
        tokenizer: the tokenizer of the student.
    """
    distillation, other = config.distillation, config.distillation.teacher.model_path
    return {
        "format_version": FORMAT_VERSION,
        "teacher_name": other or config.model.name,
        "teacher_revision": None if other else config.model.revision,
        "teacher_dtype": config.model.dtype,
        "teacher": teacher_fingerprint(teacher_path(config)),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "sequence_length": distillation.dataset.max_length,
        **encoder_settings(distillation.teacher.generation, config.seed),
        "dataset": dataset_settings(distillation.dataset, config.seed),
    }
