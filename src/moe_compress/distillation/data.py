"""The order in which sequences are trained on, and how they become batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from moe_compress.distillation.losses import IGNORED

_CACHED_EPOCHS = 2


class TrainingOrder(Dataset[dict[str, np.ndarray]]):
    """A stretch of an endless, seeded order of sequences: epoch after epoch, each in a permutation of its own.

    Position p of the whole training is sequence `permutation(seed, p // n)[p % n]`, whatever the stage, the number of
    ranks, or where a run was interrupted. A stage is the stretch of positions that its steps consume.

    Args:
        source: sequences by index; items have `input_ids` `[length]`, and what a cache holds beside it.
        seed: of the permutations.
        first: position of the first item.
        count: items.
    """

    def __init__(self, source: Any, *, seed: int, first: int, count: int) -> None:
        self.source = source
        self.seed = seed
        self.first = first
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        record = self.source[self.index(item)]
        return {name: np.asarray(value) for name, value in record.items()}

    def index(self, item: int) -> int:
        """The sequence at place `item` of this stretch."""
        if not 0 <= item < self.count:
            raise IndexError(item)
        epoch, place = divmod(self.first + item, len(self.source))
        return int(_permutation(self.seed, epoch, len(self.source))[place])


@lru_cache(maxsize=_CACHED_EPOCHS)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def collate(items: Sequence[Mapping[str, np.ndarray]], *, isolate: bool = False) -> dict[str, Any]:
    """Make a batch of records, shorter ones padded on the right, where causal attention does not see it.

    Args:
        items: records: `input_ids`, `labelled` and `documents` `[length]` (the latter two may be absent: every token is
            a label, all are one document), and what a cache holds beside them.
        isolate: give positions that start anew at each document, which also keeps attention within it.

    Returns:
        int64 `[batch, length]`: `input_ids`, `labels` (-100 where masked), with `isolate` also `position_ids`; and the
        rest, as it is, in `teacher`.
    """
    arrays = {name: torch.from_numpy(_stack([item[name] for item in items])) for name in items[0]}
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    input_ids = arrays.pop("input_ids").long()
    padding = torch.arange(input_ids.shape[1]) >= lengths[:, None]
    labelled = arrays.pop("labelled", torch.ones_like(input_ids)).bool()
    batch: dict[str, Any] = {"input_ids": input_ids, "labels": input_ids.masked_fill(~labelled | padding, IGNORED)}
    documents = arrays.pop("documents", None)
    if isolate and documents is not None:
        batch["position_ids"] = torch.stack([_positions(row) for row in documents.long()])
    if arrays:
        batch["teacher"] = arrays
    return batch


def _stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays `[length, ...]` as one `[batch, longest, ...]`, filled up with zeros."""
    longest = max(map(len, arrays))
    stacked = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return stacked


def _positions(documents: torch.Tensor) -> torch.Tensor:
    """Place of each token within its document, from the documents' numbers `[length]`."""
    places = torch.arange(len(documents))
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[1:] = documents[1:] != documents[:-1]
    return places - torch.where(starts, places, 0).cummax(0).values
