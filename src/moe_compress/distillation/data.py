"""The order in which sequences are trained on, and how they become batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

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


def collate(items: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Stack records to a batch: int64 `input_ids` and `labels` `[batch, length]`, and the rest, as it is, in `teacher`.

    Sequences are packed without padding, so every token is a label.
    """
    arrays = {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in items[0]}
    input_ids = arrays.pop("input_ids").long()
    batch: dict[str, Any] = {"input_ids": input_ids, "labels": input_ids.clone()}
    if arrays:
        batch["teacher"] = arrays
    return batch
