"""The teacher behind one interface: `CachedTeacher` unpacks what the cache holds, `LiveTeacher` runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig

from moe_compress.config import Config
from moe_compress.distillation.encoders import Encoder
from moe_compress.distillation.fingerprints import teacher_fingerprint, tokenizer_fingerprint
from moe_compress.distillation.manifest import FORMAT_VERSION, Header, dataset_settings
from moe_compress.distillation.targets import DenseTargets, TeacherTargets
from moe_compress.modeling import load_model, resolve_model_path


class TeacherSource(Protocol):
    """Targets for the tokens of a batch."""

    def __call__(self, inputs: Mapping[str, Tensor], record: Mapping[str, Tensor] | None) -> TeacherTargets:
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


class LiveTeacher:
    """Targets from a model that runs beside the student."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], record: Mapping[str, Tensor] | None) -> TeacherTargets:
        return DenseTargets(self.model(**inputs, use_cache=False).logits)


def teacher_path(config: Config) -> Path:
    """The directory of the teacher's checkpoint; downloads it from the hub if it is not there yet."""
    other = config.distillation.teacher.model_path
    return resolve_model_path(other) if other else resolve_model_path(config.model.name, config.model.revision)


def vocabulary_size(checkpoint: Path, config: Config) -> int:
    """The width of a checkpoint's logits, from its config."""
    loaded = AutoConfig.from_pretrained(checkpoint, trust_remote_code=config.model.trust_remote_code)
    return int(loaded.get_text_config().vocab_size)


def load_teacher(config: Config, device: str | torch.device) -> Any:
    """The teacher as a model on `device`, in `model.dtype`."""
    return load_model(
        str(teacher_path(config)),
        dtype=config.model.dtype,
        device=device,
        trust_remote_code=config.model.trust_remote_code,
    )


def expected_header(config: Config, tokenizer: Any, vocab_size: int) -> Header:
    """What the cache of a run must have been made from.

    Args:
        config: the settings of the run.
        tokenizer: the tokenizer of the student.
        vocab_size: the width of the student's logits.
    """
    distillation = config.distillation
    path = teacher_path(config)
    return {
        "format_version": FORMAT_VERSION,
        "teacher_name": distillation.teacher.model_path or config.model.name,
        "teacher": teacher_fingerprint(path),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocab_size": vocab_size,
        "sequence_length": distillation.dataset.max_length,
        "encoder": "topk",
        "top_k": distillation.teacher.generation.top_k,
        "dataset": dataset_settings(distillation.dataset, config.seed),
    }
