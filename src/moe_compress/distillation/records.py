"""What a cache holds of a sequence, and how records of different lengths lie in arrays without padding.

In memory a record is a dict of arrays that begin with the sequence's tokens: `input_ids`, `documents`, `labelled`, and
the fields of the encoder. In a file each field is one array in which the records follow each other, and `offsets` says
where each begins. What the teacher says of a token is stored only where it can be learned from: where the next token is
a label. So prompts cost no more than their ids, and padding nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

# Entries along the first dimension of a field in a file: one per token; one per target, a token whose prediction is
# learned; or one per entry of a target that has as many as its value in the field `entries`.
Axis = Literal["token", "target", "entry"]
AXES: tuple[Axis, ...] = ("token", "target", "entry")
OFFSETS = "offsets"
ENTRIES = "entries"

Record = dict[str, np.ndarray]


@dataclass(frozen=True)
class Field:
    """One array of a record: in memory `[tokens, *shape]` of `dtype`; along `entry` the last dimension is ragged."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axis: Axis = "target"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned integer type that holds every id of a vocabulary."""
    return np.min_scalar_type(max(vocab_size - 1, 0))


def text_fields(vocab_size: int, length: int) -> dict[str, Field]:
    """The fields that every record has, whatever the encoder."""
    return {
        "input_ids": Field((), token_dtype(vocab_size), "token"),
        "documents": Field((), token_dtype(length), "token"),
        "labelled": Field((), np.dtype(np.uint8), "token"),
    }


def targets_of(labelled: np.ndarray) -> np.ndarray:
    """Which tokens' predictions are stored, bool `[length]`: those whose next token is a label.

    The last one is stored too, so that the targets of a sequence without masks are as many as its tokens.
    """
    stored = np.ones(len(labelled), dtype=bool)
    stored[:-1] = labelled[1:]
    return stored


def flatten(name: str, field: Field, record: Mapping[str, np.ndarray]) -> np.ndarray:
    """A field as it is stored; the encoder's fields come for the targets alone: `[targets, *shape]`."""
    array = record[name]
    if field.axis == "entry":
        array = array[np.arange(field.shape[0]) < record[ENTRIES][:, None]]
    return array.astype(field.dtype, copy=False)


def spread(fields: Mapping[str, Field], read: Callable[[str, Axis], np.ndarray]) -> Record:
    """The record in memory, from what `read` gives of each stored field; zeros where nothing is stored.

    Args:
        fields: all of them, those along tokens and `entries` first.
        read: name and axis of a field to its stored part.
    """
    record: Record = {}
    stored = entries = np.empty(0)
    for name, field in fields.items():
        array = read(name, field.axis)
        if field.axis == "token":
            record[name] = array
            if name == "labelled":
                stored = targets_of(array)
            continue
        if name == ENTRIES:
            entries = array
        if field.axis == "entry":
            ragged = np.zeros((len(entries), *field.shape), field.dtype)
            ragged[np.arange(field.shape[0]) < entries[:, None]] = array
            array = ragged
        if not stored.all():
            whole = np.zeros((len(stored), *field.shape), field.dtype)
            whole[stored] = array
            array = whole
        record[name] = array
    return record
