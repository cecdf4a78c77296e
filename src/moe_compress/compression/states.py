"""Hidden states of a text, or their gradients, on disk: written as they are computed, read some sequences at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from moe_compress.compression.checkpoint import DTYPE_NAMES, made_by, read_header, read_tensor
from moe_compress.compression.shards import Source, tensor_source, write_shard

_NAME = "hidden"


class StateFile:
    """A safetensors file with one tensor [N, L, H], for N sequences."""

    def __init__(self, path: Path, key: str) -> None:
        """Name a file, which need not exist; `key` is what decides its content."""
        self.path = path
        self.key = key

    def exists(self) -> bool:
        """Whether it is there, whole, and was made by the same."""
        return made_by(self.path, self.key)

    def write(self, batches: Iterator[Tensor], sequences: int) -> None:
        """Write batches [B, L, H] as they come, one at a time in memory; `sequences` is how many come in all."""
        first = next(batches)

        def chunks() -> Iterator[bytearray | memoryview]:
            yield from tensor_source(first).chunks()
            for batch in batches:
                yield from tensor_source(batch).chunks()

        shape = (sequences, *first.shape[1:])
        source = Source(DTYPE_NAMES[first.dtype], shape, sequences * first[0].nbytes, chunks)
        write_shard(self.path, {_NAME: source}, {"fingerprint": self.key})

    def read(self, start: int, stop: int) -> Tensor:
        """The states of the sequences from `start` up to `stop`, [stop - start, L, H], in main memory."""
        entry = read_header(self.path).entries[_NAME]
        each = entry.nbytes // entry.shape[0]
        here = replace(
            entry,
            shape=(stop - start, *entry.shape[1:]),
            start=entry.start + start * each,
            nbytes=(stop - start) * each,
        )
        return read_tensor(here)

    def remove(self) -> None:
        """Delete the file, if it is there."""
        self.path.unlink(missing_ok=True)
