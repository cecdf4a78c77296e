"""Documents to rows of exactly `max_length` token ids, joined by end-of-text, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from moe_compress.config import DatasetConfig
from moe_compress.data.sources import load_documents
from moe_compress.errors import UserError

_DOCUMENTS_PER_BATCH = 64


def packed_rows(dataset: DatasetConfig, tokenizer: Any, seed: int) -> Iterator[list[int]]:
    """Yield the rows of a data set, `dataset.max_length` token ids each, in an order fixed by `seed`."""
    return pack(load_documents(dataset, seed), tokenizer, dataset.max_length)


def pack(documents: Iterable[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Yield rows of exactly `length` token ids of documents joined by end-of-text; the rest of the last is dropped.

    Raises:
        UserError: the tokenizer has no end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no end-of-sequence token to join documents with; set its eos_token")
    documents = iter(documents)
    ids: list[int] = []
    while batch := list(islice(documents, _DOCUMENTS_PER_BATCH)):
        for encoding in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            ids.extend(encoding)
            ids.append(end)
        full = len(ids) // length
        for row in range(full):
            yield ids[row * length : (row + 1) * length]
        ids = ids[full * length :]


def packed_dataset(dataset: DatasetConfig, tokenizer: Any, seed: int) -> Any:
    """The packed rows of a data set as a map-style `datasets.Dataset`.

    Returns:
        A `datasets.Dataset` with the one column `input_ids`, rows of `max_length` ids, at most `max_samples` rows.

    Raises:
        UserError: the source holds less text than one row.
    """
    from datasets import Dataset, Features, Sequence, Value

    rows = list(islice(packed_rows(dataset, tokenizer, seed), dataset.max_samples))
    if not rows:
        raise UserError(
            f"dataset {dataset.name} (split '{dataset.split}') holds fewer than max_length={dataset.max_length} "
            "tokens; use a shorter max_length or more text"
        )
    return Dataset.from_dict({"input_ids": rows}, features=Features({"input_ids": Sequence(Value("int32"))}))
