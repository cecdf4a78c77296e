"""Writing one HDF5 file of the teacher cache: whole and synced under its final name, or not there at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moe_compress.data import Row
from moe_compress.distillation.encoders import Encoder
from moe_compress.distillation.fingerprints import rows_fingerprint
from moe_compress.distillation.manifest import CacheFile
from moe_compress.distillation.records import AXES, OFFSETS, Field, Record, flatten, text_fields
from moe_compress.files import file_in_progress, sha256_of_file

# A guess of the entries per target, for the size of a chunk; any value is correct.
_ENTRIES_PER_TARGET = 8
# A chunk that is filled by several writes must stay in memory until it is full.
_CHUNK_CACHE_BYTES = 32 * 2**20


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
    rows: Sequence[Row],
    length: int,
    encoder: Encoder,
    vocab_size: int,
    compression: str,
    records: Iterable[Record],
) -> CacheFile:
    """Write the records of sequences `start` to `start + len(rows)` under a temporary name, sync, rename.

    Args:
        path: final name; a file there, left unlisted by a killed writer, is replaced.
        start: number of the first sequence in the whole cache.
        rows: the text of the sequences.
        length: tokens of a sequence at most.
        encoder: knows the fields of `records`.
        vocab_size: ids there are.
        compression: `gzip`, `lzf` or `none`.
        records: for each row in turn, what the encoder made of its targets.

    Returns:
        The file's entry for the manifest.
    """
    fields = {**text_fields(vocab_size, length), **encoder.fields()}
    offsets = np.zeros((len(rows) + 1, len(AXES)), np.int64)
    with file_in_progress(path) as temporary:
        with h5py.File(temporary, "w", rdcc_nbytes=_CHUNK_CACHE_BYTES) as file:
            arrays = {name: _create(file, name, field, length, compression) for name, field in fields.items()}
            for number, (row, record) in enumerate(zip(rows, records, strict=True)):
                ends = _append(arrays, fields, {**row, **record}, offsets[number])
                offsets[number + 1] = ends
            file.create_dataset(OFFSETS, data=offsets, chunks=offsets.shape, **_filters("gzip"))
        digest = sha256_of_file(temporary)
        size = temporary.stat().st_size
    return CacheFile(
        name=path.name,
        start=start,
        rows=len(rows),
        tokens=int(offsets[-1, 0]),
        bytes=size,
        content=rows_fingerprint(rows),
        sha256=digest,
    )


def _create(file: h5py.File, name: str, field: Field, length: int, compression: str) -> h5py.Dataset:
    """A growing array. A full sequence is one chunk: what a random read fetches and unpacks is what it needs."""
    shape = () if field.axis == "entry" else field.shape
    chunk = length * (_ENTRIES_PER_TARGET if field.axis == "entry" else 1)
    return file.create_dataset(
        name, (0, *shape), field.dtype, maxshape=(None, *shape), chunks=(chunk, *shape), **_filters(compression)
    )


def _append(
    arrays: Mapping[str, h5py.Dataset], fields: Mapping[str, Field], record: Record, starts: np.ndarray
) -> np.ndarray:
    ends = starts.copy()
    for name, field in fields.items():
        axis = AXES.index(field.axis)
        values = flatten(name, field, record)
        ends[axis] = starts[axis] + len(values)
        arrays[name].resize(ends[axis], axis=0)
        arrays[name][starts[axis] : ends[axis]] = values
    return ends
