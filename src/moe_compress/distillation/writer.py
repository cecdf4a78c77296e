"""Writing one HDF5 file of the teacher cache: whole and synced under its final name, or not there at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moe_compress.distillation.encoders import Encoder, Field, token_dtype
from moe_compress.distillation.manifest import CacheFile
from moe_compress.files import file_in_progress, sha256_of_file

Batch = dict[str, np.ndarray]


def _filters(compression: str) -> dict[str, Any]:
    # fletcher32 lets HDF5 itself notice a damaged chunk when it is read.
    options: dict[str, Any] = {"shuffle": compression != "none", "fletcher32": True}
    if compression != "none":
        options["compression"] = compression
    return options


def write_file(
    path: Path,
    *,
    start: int,
    rows: int,
    length: int,
    encoder: Encoder,
    vocab_size: int,
    compression: str,
    batches: Iterable[Batch],
) -> CacheFile:
    """Write the records of sequences `start` to `start + rows` under a temporary name, sync, rename.

    Args:
        path: final name; a file there, left unlisted by a killed writer, is replaced.
        batches: consecutive sequences: `input_ids` `[n, length]` and the encoder's fields `[n, length, ...]`.
        compression: `gzip`, `lzf` or `none`.

    Returns:
        The file's entry for the manifest.
    """
    layout = {"input_ids": Field((), token_dtype(vocab_size)), **encoder.fields()}
    with file_in_progress(path) as temporary:
        with h5py.File(temporary, "w") as file:
            arrays = {
                name: file.create_dataset(
                    # One sequence is one chunk: what a random read fetches and unpacks is what it needs.
                    name,
                    (rows, length, *field.shape),
                    field.dtype,
                    chunks=(1, length, *field.shape),
                    **_filters(compression),
                )
                for name, field in layout.items()
            }
            done = 0
            for batch in batches:
                count = len(batch["input_ids"])
                for name, array in arrays.items():
                    array[done : done + count] = batch[name]
                done += count
            if done != rows:
                raise RuntimeError(f"{path.name}: {done} sequences written where {rows} were due")
        digest = sha256_of_file(temporary)
        size = temporary.stat().st_size
    return CacheFile(name=path.name, start=start, rows=rows, bytes=size, sha256=digest)
