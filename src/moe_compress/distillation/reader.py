"""Random access to the sequences of a complete teacher cache, from any number of processes."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from torch.utils.data import Dataset

from moe_compress.distillation.encoders import make_encoder
from moe_compress.distillation.manifest import check_header, read_manifest
from moe_compress.distillation.records import AXES, OFFSETS, Record, spread, text_fields
from moe_compress.errors import UserError, first_line

# Files kept open by one process.
_OPEN_FILES = 32


class DamagedFile(UserError):
    """A file of a cache cannot be read.

    PyTorch makes the exception of a DataLoader's worker anew, with a whole traceback as its message: of that, the last
    line is kept, which holds the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[2])


class TeacherCache(Dataset[dict[str, np.ndarray]]):
    """The records of a cache by global sequence index.

    An item holds `input_ids`, `documents` and `labelled` `[length]` and the encoder's fields `[length, ...]`, which are
    zero where nothing is to be learned. Files are opened on first use in each process, so that the object may be handed
    to DataLoader workers.

    Args:
        directory: the cache.
        expected: header fields that must agree (see `manifest.check_header`).

    Raises:
        UserError: the cache is incomplete, a file is missing or cut, or a header field differs; and on access
            (`DamagedFile`) a file cannot be read.
    """

    def __init__(self, directory: Path, expected: Mapping[str, Any] | None = None) -> None:
        self.directory = directory
        self.header, self.files = read_manifest(directory)
        check_header(self.header, expected or {}, directory)
        self.encoder = make_encoder(self.header)
        self._fields = {**text_fields(self.vocab_size, self.header["sequence_length"]), **self.encoder.fields()}
        for file in self.files:
            path = directory / file.name
            size = path.stat().st_size if path.is_file() else None
            if size != file.bytes:
                state = "is missing" if size is None else f"has {size} bytes instead of {file.bytes}"
                raise UserError(f"teacher cache: {path} {state}; run `moe-compress teacher-logits` to make it again")
        self._starts = [file.start for file in self.files]
        self._open: OrderedDict[int, tuple[h5py.File, dict[str, h5py.Dataset]]] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return int(self.header["num_sequences"])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        try:
            return self._record(self._arrays(number), index - self._starts[number])
        except (OSError, RuntimeError, KeyError, ValueError, IndexError, TypeError) as error:
            path = self.directory / self.files[number].name
            raise DamagedFile(
                f"teacher cache: {path} is damaged ({first_line(error)}); delete it and run `moe-compress "
                "teacher-logits`"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def vocab_size(self) -> int:
        """Ids that the teacher's distributions cover."""
        return int(self.header["vocab_size"])

    def _record(self, arrays: dict[str, h5py.Dataset], row: int) -> Record:
        starts, ends = arrays[OFFSETS][row : row + 2]
        places = {axis: slice(int(start), int(end)) for axis, start, end in zip(AXES, starts, ends, strict=True)}
        return spread(self._fields, lambda name, axis: arrays[name][places[axis]])

    def _arrays(self, number: int) -> dict[str, h5py.Dataset]:
        if self._process != os.getpid():
            # A forked worker must not read through its parent's handles.
            self._open, self._process = OrderedDict(), os.getpid()
        if number not in self._open:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1][0].close()
            file = h5py.File(self.directory / self.files[number].name, "r")
            self._open[number] = (file, dict(file.items()))
        self._open.move_to_end(number)
        return self._open[number][1]
