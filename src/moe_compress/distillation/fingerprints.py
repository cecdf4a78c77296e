"""Short hashes that tell whether a cache was made from this teacher, this tokenizer and this text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_compress.files import fingerprint
from moe_compress.modeling.checkpoint import read_config

_SAMPLE_BYTES = 2**20

# Text on which tokenizers that share a vocabulary but not their rules differ: spaces, digits, case, code, scripts.
_PROBE = (
    "The quick brown fox; isn't 3.14159 <= 10_000?\n\n    def f(x, *args):\n\treturn x[::-1]  # naïve café\r\n"
    "北京 привет 🙂 ALLCAPS camelCase https://example.org/a?b=c&d=%20  trailing spaces   "
)


def teacher_fingerprint(path: Path) -> str:
    """A hash of a checkpoint directory: its config, and name, size, first and last megabyte of each weights file.

    Sampling keeps it instant for models of any size, and tells a retrained model from its predecessor.
    """
    config = read_config(path)
    for volatile in ("transformers_version", "_name_or_path", "use_cache"):
        config.pop(volatile, None)
    weights = []
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]):
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest = hashlib.sha256(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
        weights.append((file.name, size, digest.hexdigest()))
    return fingerprint({"config": config, "weights": weights})


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what a tokenizer does: its vocabulary, its special tokens, and the ids of a probing text.

    By behaviour and not by file, because saving and loading a tokenizer rewrites its files.
    """
    return fingerprint(
        {
            "vocabulary": sorted(tokenizer.get_vocab().items()),
            "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
            "probe": tokenizer(_PROBE, add_special_tokens=False)["input_ids"],
        }
    )


def rows_fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """A hash of what a model reads of rows: token ids, document numbers, and which tokens are labels."""
    digest = hashlib.sha256()
    for row in rows:
        for name in ("input_ids", "documents", "labelled"):
            array = np.asarray(row[name], dtype="<u4")
            digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.hexdigest()[:16]
