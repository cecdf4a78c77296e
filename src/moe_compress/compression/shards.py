"""Writing safetensors files piece by piece, so that a shard needs no more memory than its largest piece.

The bytes are those of the safetensors format (https://github.com/huggingface/safetensors#format): eight bytes of
header length, the header as JSON padded to eight bytes, then the tensors without gaps. The library's own writer wants
all tensors of a file in memory at once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from moe_compress.compression.checkpoint import COPY_BYTES, DTYPE_NAMES, DTYPES, Checkpoint
from moe_compress.files import file_in_progress

Item = TypeVar("Item")


@dataclass(frozen=True)
class Source:
    """One tensor to write: what it is, and a function that yields its bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterator[bytearray | memoryview]]


def tensor_source(tensor: torch.Tensor) -> Source:
    """A tensor in memory (any device, any strides)."""
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)

    def chunks() -> Iterator[memoryview]:
        view = flat.numpy().data
        for start in range(0, len(view), COPY_BYTES):
            yield view[start : start + COPY_BYTES]

    return Source(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), flat.numel(), chunks)


def disk_source(checkpoint: Checkpoint, name: str, *, finite: bool = False) -> Source:
    """A tensor of a checkpoint, copied byte for byte; with `finite`, NaN and infinity are refused (UserError)."""
    entry = checkpoint[name]
    read = checkpoint.finite_chunks if finite else checkpoint.chunks
    return Source(entry.dtype, entry.shape, entry.nbytes, lambda: read(name))


def write_shard(path: Path, sources: Mapping[str, Source], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file under a temporary name, sync it and rename it into place.

    The same tensors and metadata give the same bytes, in whatever order they come.
    """

    def alignment(item: tuple[str, Source]) -> tuple[int, str]:
        name, source = item
        return -(DTYPES[source.dtype].itemsize if source.dtype in DTYPES else 1), name

    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    ordered = sorted(sources.items(), key=alignment)  # wide types first, so that every tensor is aligned
    offset = 0
    for name, source in ordered:
        header[name] = {
            "dtype": source.dtype,
            "shape": list(source.shape),
            "data_offsets": [offset, offset + source.nbytes],
        }
        offset += source.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file_in_progress(path) as temporary, temporary.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)))
        stream.write(raw)
        for _, source in ordered:
            for piece in source.chunks():
                stream.write(piece)


def split_by_size(sizes: Iterable[tuple[Item, int]], limit: int) -> list[list[Item]]:
    """Divide items with their sizes, in order, into groups of at most `limit` (a larger item is alone in its group)."""
    groups: list[list[Item]] = []
    filled = 0
    for item, size in sizes:
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return groups
