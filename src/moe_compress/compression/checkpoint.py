"""Reading a local safetensors checkpoint lazily: headers first, tensors on demand, bytes streamed.

Files are read with plain reads, never mapped into memory, so that what a tensor costs is what it holds: the peak of a
streaming job stays visible and bounded, and a shard cut short is an error instead of a bus error.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch

from moe_compress.errors import UserError
from moe_compress.modeling.checkpoint import INDEX_FILE, find_shards

COPY_BYTES = 16 << 20
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_FINGERPRINT_SAMPLES = 16
_PIECE_VALUES = 1 << 22

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in a safetensors file, and what it is."""

    name: str
    file: Path
    dtype: str  # as safetensors names it: BF16, F32, F8_E4M3 ...
    shape: tuple[int, ...]
    start: int  # offset of its first byte in the file
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype not in DTYPES:
            raise UserError(
                f"tensor {self.name} in {self.file} has the type {self.dtype}, which PyTorch has no tensors of; "
                "convert the checkpoint to bfloat16 first"
            )
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    digest: str  # SHA-256 of the header's bytes


def read_header(file: Path) -> Header:
    """Read and check the header of a safetensors file, without its tensors.

    Raises:
        UserError: the file is missing, cut short, or not a safetensors file; the message names it.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if length < 0 or length > size - 8 or length > _MAX_HEADER_BYTES:
                raise UserError(f"shard {file} is cut short or not a safetensors file; download or copy it again")
            raw = stream.read(length)
    except FileNotFoundError:
        raise UserError(f"shard {file} is missing; download or copy it again") from None
    except OSError as error:
        raise UserError(f"shard {file} cannot be read: {error.strerror or error}") from error
    try:
        header: dict[str, Any] = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        entries = {
            name: TensorEntry(
                name=name,
                file=file,
                dtype=str(fields["dtype"]),
                shape=tuple(int(n) for n in fields["shape"]),
                start=8 + length + int(fields["data_offsets"][0]),
                nbytes=int(fields["data_offsets"][1]) - int(fields["data_offsets"][0]),
            )
            for name, fields in header.items()
        }
        consistent = all(
            entry.nbytes >= 0
            and (entry.dtype not in DTYPES or entry.nbytes == entry.numel * DTYPES[entry.dtype].itemsize)
            for entry in entries.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        consistent = False
    if not consistent:
        raise UserError(f"shard {file} has a damaged header; download or copy it again")
    end = max((entry.start + entry.nbytes for entry in entries.values()), default=8 + length)
    if size < end:
        raise UserError(f"shard {file} is cut short: {size} bytes of {end}; download or copy it again")
    if size > end:
        raise UserError(f"shard {file} has {size - end} bytes too many; download or copy it again")
    return Header(entries, metadata, hashlib.sha256(raw).hexdigest())


def made_by(file: Path, key: str) -> bool:
    """Whether a file of ours exists, whole, and says that `key` decided its content."""
    try:
        return file.exists() and read_header(file).metadata.get("fingerprint") == key
    except UserError:  # cut short by a full disk, say: it has to be made again
        return False


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Read one tensor from disk to main memory."""
    dtype = entry.torch_dtype
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    view = buffer.numpy().data
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        done = 0
        while done < entry.nbytes:  # one read returns at most 2 GiB
            count = stream.readinto(view[done:])
            if not count:
                raise UserError(f"shard {entry.file} was cut short while tensor {entry.name} was read")
            done += count
    return buffer.view(dtype).reshape(entry.shape)


class Checkpoint:
    """The tensors of a local checkpoint directory (one `model.safetensors`, or shards and their index).

    Opening reads headers only.

    Raises:
        UserError: no such directory, no safetensors weights in it, or a shard that is missing, cut short or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.entries: dict[str, TensorEntry] = {}
        self.headers: dict[Path, Header] = {}
        shards, weight_map = find_shards(self.path)
        for shard in shards:
            self.headers[shard] = read_header(shard)
            for name, entry in self.headers[shard].entries.items():
                if weight_map.get(name, shard.name) == shard.name:
                    self.entries[name] = entry
        for name, file in weight_map.items():
            if name not in self.entries:
                raise UserError(f"shard {self.path / file} lacks the tensor {name} that {INDEX_FILE} says it holds")

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> TensorEntry:
        return self.entries[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(entry.nbytes for entry in self.entries.values())

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor from disk to main memory."""
        return read_tensor(self.entries[name])

    def finite_tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, refusing NaN and infinity.

        Raises:
            UserError: the tensor holds NaN or infinity; the message names it and its file.
        """
        tensor = self.tensor(name)
        # Piece by piece, because isfinite makes temporaries as large as what it looks at.
        for piece in tensor.reshape(-1).split(_PIECE_VALUES):
            self._refuse_not_finite(name, piece)
        return tensor

    def chunks(self, name: str) -> Iterator[bytearray | memoryview]:
        """Yield the bytes of one tensor in pieces of at most `COPY_BYTES`, as they lie on disk."""
        entry = self.entries[name]
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            yield from _pieces(stream, entry)

    def finite_chunks(self, name: str) -> Iterator[bytearray | memoryview]:
        """Yield the bytes of one tensor like `chunks`, refusing NaN and infinity.

        Raises:
            UserError: the tensor holds NaN or infinity; the message names it and its file.
        """
        dtype = DTYPES.get(self.entries[name].dtype)
        for piece in self.chunks(name):
            if dtype is not None and dtype.is_floating_point:
                self._refuse_not_finite(name, torch.frombuffer(piece, dtype=dtype))
            yield piece

    def _refuse_not_finite(self, name: str, values: torch.Tensor) -> None:
        values = values.float() if values.itemsize == 1 else values  # fp8 knows no isfinite
        if not values.isfinite().all():
            kind = "NaN" if values.isnan().any() else "infinity"
            raise UserError(f"tensor {name} in {self.entries[name].file} holds {kind}; the checkpoint is damaged")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all headers and of bytes sampled over every shard: tells one model's weights from another's.

        It depends on content only, so that a copy in another place has the same one.
        """
        digest = hashlib.sha256()
        for file, header in sorted(self.headers.items()):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} {header.digest}\n".encode())
            with file.open("rb") as stream:
                for sample in range(_FINGERPRINT_SAMPLES):
                    stream.seek(size * sample // _FINGERPRINT_SAMPLES)
                    digest.update(stream.read(4096))
        return digest.hexdigest()[:16]


def _pieces(stream: BinaryIO, entry: TensorEntry) -> Iterator[bytearray]:
    left = entry.nbytes
    while left:
        piece = bytearray(min(left, COPY_BYTES))
        if stream.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise UserError(f"shard {entry.file} was cut short while tensor {entry.name} was copied")
        left -= len(piece)
        yield piece
