"""The teacher's pass over the held-out text: made by one of all processes that need it, found by the others."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from moe_compress.config import Config
from moe_compress.distillation.fingerprints import teacher_fingerprint, tokenizer_fingerprint
from moe_compress.errors import UserError
from moe_compress.evaluation.claims import claimed
from moe_compress.evaluation.measure import load
from moe_compress.evaluation.perplexity import held_out_text, score_text
from moe_compress.evaluation.results import text_settings
from moe_compress.evaluation.teacher_text import FORMAT, TeacherText, TeacherTextWriter
from moe_compress.files import file_in_progress, fingerprint
from moe_compress.modeling import load_tokenizer

MOST_DEATHS = 2  # at one piece of work, before it is given up
_WAIT_SECONDS = 1.0


def teacher_text(teacher: Path, config: Config, directory: Path) -> TeacherText:
    """What a teacher makes of the text of `evaluation.perplexity`; it is loaded only if nobody has scored it yet.

    Args:
        teacher: its directory.
        config: the settings; the text, the seed and `model.dtype` are read.
        directory: where `teacher_text-<fingerprint>.h5` is kept.

    Raises:
        UserError: the teacher or the text cannot be had, or processes died at it again and again.
    """
    made_from = fingerprint(
        {
            "format": FORMAT,
            "teacher": teacher_fingerprint(teacher),
            "text": text_settings(config),
            "dtype": config.model.dtype,
            "seed": config.seed,
        }
    )
    path = directory / f"teacher_text-{made_from}.h5"
    tokenizer = load_tokenizer(teacher, trust_remote_code=config.model.trust_remote_code)
    while not path.exists():
        with claimed(directory / "claims", path.stem) as attempt:
            if attempt > MOST_DEATHS:
                raise UserError(f"{attempt - 1} processes died while scoring the teacher {teacher} (out of memory?)")
            if attempt and not path.exists():
                _make(path, teacher, tokenizer, config)
        if not attempt:
            time.sleep(_WAIT_SECONDS)
    return TeacherText(path, tokenizer_fingerprint(tokenizer))


def _make(path: Path, teacher: Path, tokenizer: Any, config: Config) -> None:
    rows, labelled = held_out_text(config, tokenizer)
    model: Any = load(teacher, config)
    with file_in_progress(path) as temporary:
        writer = TeacherTextWriter(temporary, rows, config.seed, labelled)
        writer.finish(score_text(model, rows, labelled=labelled, keep=writer))
