"""`evaluate_model`: everything that is measured of one model, as one record; the watcher and all commands use it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_compress.config import Config
from moe_compress.distillation.fingerprints import tokenizer_fingerprint
from moe_compress.distillation.teachers import common_vocabulary
from moe_compress.errors import UserError
from moe_compress.evaluation.harness import run_tasks
from moe_compress.evaluation.loops import loop_check
from moe_compress.evaluation.machine import placement
from moe_compress.evaluation.perplexity import held_out_text, score_text
from moe_compress.evaluation.results import Record, settings_fingerprint
from moe_compress.evaluation.scores import TextScore
from moe_compress.evaluation.teacher_text import TeacherText
from moe_compress.modeling import count_parameters, load_model, load_tokenizer


def load(path: str | Path, config: Config, placed: Mapping[str, Any] | None = None) -> Any:
    """A model in the type that the settings want, where they want it, or where `placed` (a `placement`) says."""
    return load_model(
        path,
        dtype=config.model.dtype,
        trust_remote_code=config.model.trust_remote_code,
        **(placement(config) if placed is None else placed),
    )


def evaluate_model(
    path: str | Path,
    label: str,
    step: int,
    config: Config,
    teacher: TeacherText | None = None,
    *,
    score: TextScore | None = None,
) -> Record:
    """Measure one model on the text and the tasks of the settings.

    Args:
        path: its directory (or hub id).
        label: what to call it in the record.
        step: its training step.
        config: the settings; `evaluation`, `model.dtype` and `seed` are read.
        teacher: what the original makes of the held-out text, to compare the model with it.
        score: what the model makes of the text, if that is known already (then nothing is compared).

    Returns:
        The record of `results.jsonl`: text score, loops, tasks, sizes, routing per layer, and what was measured how.

    Raises:
        UserError: the model cannot be loaded, has another tokenizer than the teacher, or a setting cannot be used.
    """
    start = time.perf_counter()
    evaluation = config.evaluation
    tokenizer = load_tokenizer(path, trust_remote_code=config.model.trust_remote_code)
    if teacher is None:
        rows, labelled = held_out_text(config, tokenizer)
    else:
        rows, labelled = teacher.rows, teacher.labelled
        if teacher.tokenizer not in (None, tokenizer_fingerprint(tokenizer)):
            raise UserError(f"{path} has another tokenizer than the teacher; they cannot be compared token by token")
    model = load(path, config)
    if score is None:
        shared = None
        if teacher is not None:
            width = model.config.get_text_config().vocab_size
            shared = common_vocabulary(teacher.vocabulary, width, tokenizer)
        score = score_text(model, rows, teacher, labelled=labelled, vocabulary=shared)
    text = asdict(score)
    text["sequence_losses"] = [round(loss, 6) for loss in text["sequence_losses"]]
    loops = {}
    if evaluation.loop_samples:
        loops = loop_check(model, rows, evaluation.loop_samples, evaluation.generate_tokens, config.seed)
    sizes = count_parameters(model)
    return {
        "model": label,
        "step": step,
        "path": str(path),
        **text,
        **loops,
        "tasks": run_tasks(model, tokenizer, evaluation, config.seed),
        "bytes": sizes.total_bytes,
        "expert_bytes": sizes.expert_bytes,
        "parameters": sizes.total,
        "expert_parameters": sizes.expert,
        "active_parameters": sizes.active,
        "active_bytes": sizes.active_bytes,
        "settings": settings_fingerprint(config),
        "device": str(model.device),
        "seconds": round(time.perf_counter() - start, 2),
        "time": round(time.time(), 1),
    }
