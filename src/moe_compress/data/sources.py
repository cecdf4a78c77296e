"""Documents from the Python standard library, local files, or any data set of the hub, as an iterator of texts."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from moe_compress.config import DatasetConfig
from moe_compress.errors import UserError, first_line
from moe_compress.reference.data import SPLITS, Split, stdlib_documents

_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_documents(dataset: DatasetConfig, seed: int) -> Iterator[str]:
    """Yield the documents of a data set in an order fixed by `seed`.

    Args:
        dataset: `name` is `stdlib`, a local file or directory, or a hub id.
        seed: seed of the shuffle; streams are shuffled in a buffer of `dataset.shuffle_buffer` documents.

    Raises:
        UserError: no such source, split or column.
    """
    if dataset.name == "stdlib":
        yield from _stdlib(dataset, seed)
        return
    source = _open(dataset)
    if source.column_names is not None:
        _check_column(dataset, source.column_names)
    if dataset.streaming:
        source = source.shuffle(seed=seed, buffer_size=dataset.shuffle_buffer)
    else:
        source = source.shuffle(seed=seed)
    for row in source:
        _check_column(dataset, row)
        text = row[dataset.text_column]
        if isinstance(text, str) and text.strip():
            yield text


def _check_column(dataset: DatasetConfig, columns: Iterable[str]) -> None:
    if dataset.text_column not in columns:
        raise UserError(
            f"dataset {dataset.name} has no column '{dataset.text_column}'; set text_column to one of: "
            + ", ".join(columns)
        )


def _stdlib(dataset: DatasetConfig, seed: int) -> Iterator[str]:
    if dataset.split not in SPLITS:
        raise UserError(f"dataset stdlib has no split '{dataset.split}'; choose one of: {', '.join(SPLITS)}")
    documents = list(stdlib_documents(cast(Split, dataset.split)))
    random.Random(seed).shuffle(documents)
    yield from documents


def _open(dataset: DatasetConfig) -> Any:
    import datasets

    path = Path(dataset.name)
    try:
        if path.is_file():
            if path.suffix not in _BUILDERS:
                raise UserError(f"dataset file {path} has an unknown type; use one of: {', '.join(_BUILDERS)}")
            # A plain text file is one document, not one per line: sequences are packed from whole documents.
            options = {"sample_by": "document"} if path.suffix == ".txt" else {}
            return datasets.load_dataset(
                _BUILDERS[path.suffix],
                data_files={dataset.split: str(path)},
                split=dataset.split,
                streaming=dataset.streaming,
                **options,
            )
        return datasets.load_dataset(
            dataset.name, dataset.config_name, split=dataset.split, streaming=dataset.streaming
        )
    except UserError:
        raise
    except Exception as error:  # `datasets` raises whatever its builders and the network raise
        raise UserError(
            f"dataset {dataset.name} (split '{dataset.split}') could not be opened: {first_line(error)}"
        ) from error
