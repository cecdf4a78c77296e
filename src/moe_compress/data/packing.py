"""Documents to rows, the sequences that models read: joined end to end, or one by one; never padded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from moe_compress.config import DatasetConfig
from moe_compress.data.chat import chat_documents
from moe_compress.data.documents import Document, text_documents
from moe_compress.data.sources import load_documents
from moe_compress.errors import UserError

_DOCUMENTS_PER_BATCH = 64

# What a model reads, all `[length]`: `input_ids` int32, `documents` int32 (number of the document within the row, from
# 0) and `labelled` bool (whether the token is to be learned).
Row = dict[str, np.ndarray]


def joined(documents: Iterable[Document], length: int, *, isolate: bool = False) -> Iterator[Row]:
    """Yield rows of exactly `length` tokens of documents laid end to end; the rest of the last is dropped.

    Args:
        documents: in order.
        length: tokens per row.
        isolate: the rows are for attention that stays within a document: its first token, which could then only be
            predicted from another document, is no label.
    """
    numbered = enumerate(documents)
    rest = [np.empty(0, np.int32), np.empty(0, bool), np.empty(0, np.int32)]
    while batch := list(islice(numbered, _DOCUMENTS_PER_BATCH)):
        numbers = [np.full(len(document.ids), number, np.int32) for number, document in batch]
        columns = [[document.ids for _, document in batch], [document.labelled for _, document in batch], numbers]
        ids, labelled, number = (np.concatenate([old, *new]) for old, new in zip(rest, columns, strict=True))
        full = len(ids) // length * length
        for start in range(0, full, length):
            part = slice(start, start + length)
            row = {"input_ids": ids[part], "documents": number[part] - number[start], "labelled": labelled[part]}
            if isolate:
                row["labelled"] = row["labelled"] & (np.diff(row["documents"], prepend=0) == 0)
            yield row
        rest = [ids[full:], labelled[full:], number[full:]]


def truncated(documents: Iterable[Document], length: int) -> Iterator[Row]:
    """Yield each document as a row of its own, cut at `length` tokens."""
    for ids, labelled in documents:
        ids, labelled = ids[:length], labelled[:length]
        yield {"input_ids": ids, "documents": np.zeros(len(ids), np.int32), "labelled": labelled}


def read_rows(dataset: DatasetConfig, tokenizer: Any, seed: int) -> Iterator[Row]:
    """Yield the rows of a data set, at most `dataset.max_samples`, in an order fixed by `seed`.

    Rows in which nothing is to be learned, such as the middle of a long prompt, are passed over.

    Raises:
        UserError: no such source or column, less text than one row, or no label at all.
    """
    source = load_documents(dataset, seed)
    if dataset.messages_column is None:
        documents = text_documents(source, tokenizer)
    else:
        documents = chat_documents(source, tokenizer, mask_prompts=dataset.mask_prompts)
    if dataset.packing == "truncate":
        rows = truncated(documents, dataset.max_length)
    else:
        rows = joined(documents, dataset.max_length, isolate=dataset.packing == "isolate")
    seen = 0
    yielded = 0
    for row in rows:
        seen += 1
        if row["labelled"][1:].any():
            yield row
            yielded += 1
            if yielded == dataset.max_samples:
                return
    where = f"dataset {dataset.name} (split '{dataset.split}')"
    if not seen:
        raise UserError(
            f"{where} holds fewer than max_length={dataset.max_length} tokens; use a shorter max_length or more text"
        )
    if not yielded:
        raise UserError(
            f"{where}: all labels are masked, for want of an answer within max_length={dataset.max_length} tokens; "
            "use a longer max_length, or mask_prompts=false"
        )


def rows_in_memory(dataset: DatasetConfig, tokenizer: Any, seed: int) -> list[Row]:
    """All rows of a data set.

    Raises:
        UserError: as `read_rows`; or it is a stream without an end.
    """
    if dataset.streaming and dataset.max_samples is None:
        raise UserError(f"dataset {dataset.name} is a stream: set max_samples, the number of rows to hold in memory")
    return list(read_rows(dataset, tokenizer, seed))


def packed_dataset(dataset: DatasetConfig, tokenizer: Any, seed: int) -> Any:
    """The token ids of a data set as a map-style `datasets.Dataset` of full rows, for calibration and evaluation.

    Returns:
        A `datasets.Dataset` with the one column `input_ids`, rows of `max_length` ids, at most `max_samples` rows.

    Raises:
        UserError: as `rows_in_memory`, or `packing` makes rows of other lengths.
    """
    from datasets import Dataset, Features, Sequence, Value

    if dataset.packing != "pack":
        raise UserError(
            f"dataset {dataset.name}: packing={dataset.packing} is for distillation; calibration and evaluation "
            "read packing=pack alone"
        )
    rows = [row["input_ids"] for row in rows_in_memory(dataset, tokenizer, seed)]
    return Dataset.from_dict({"input_ids": rows}, features=Features({"input_ids": Sequence(Value("int32"))}))
