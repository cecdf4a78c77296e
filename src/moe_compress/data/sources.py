"""Documents (texts or conversations) from the Python standard library, local files, or any data set of the hub."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from moe_compress.config import DatasetConfig
from moe_compress.errors import UserError, first_line
from moe_compress.reference.data import SPLITS, Split, stdlib_documents

_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_documents(dataset: DatasetConfig, seed: int) -> Iterator[Any]:
    """Yield the documents of a data set in an order fixed by `seed`: texts, or lists of messages.

    Args:
        dataset: `name` is `stdlib`, a local file or directory, or a hub id; with `messages_column` the documents are
            conversations. A file is one split, whatever its name; `split=train[:90%]` reads a part of it.
        seed: seed of the shuffle; streams are shuffled in a buffer of `dataset.shuffle_buffer` documents.

    Raises:
        UserError: no such source, split or column, or the source breaks off.
    """
    if dataset.name == "stdlib":
        if dataset.messages_column is not None:
            raise UserError(
                f"dataset stdlib has texts, no conversations: unset messages_column={dataset.messages_column}"
            )
        yield from _stdlib(dataset, seed)
        return
    setting = "text_column" if dataset.messages_column is None else "messages_column"
    column = getattr(dataset, setting)
    source = _open(dataset)
    if source.column_names is not None:
        _check_column(dataset, setting, source.column_names)
    if dataset.streaming:
        source = source.shuffle(seed=seed, buffer_size=dataset.shuffle_buffer)
    else:
        source = source.shuffle(seed=seed)
    for row in _read(source, dataset):
        _check_column(dataset, setting, row)
        document = row[column]
        if document is None:
            continue
        if not isinstance(document, str if dataset.messages_column is None else list):
            expected = "text" if dataset.messages_column is None else "lists of messages"
            raise UserError(
                f"dataset {dataset.name}: column '{column}' holds {type(document).__name__}, not {expected}; "
                f"set {setting} to another of: {', '.join(row)}"
            )
        if document if isinstance(document, list) else document.strip():
            yield document


def _read(source: Iterable[Any], dataset: DatasetConfig) -> Iterator[Any]:
    try:
        yield from source
    except Exception as error:  # `datasets` raises whatever its builders and the network raise
        raise UserError(
            f"dataset {dataset.name} (split '{dataset.split}') could not be read to its end: {first_line(error)}; "
            "run the same command again"
        ) from error


def _check_column(dataset: DatasetConfig, setting: str, columns: Iterable[str]) -> None:
    if getattr(dataset, setting) not in columns:
        raise UserError(
            f"dataset {dataset.name} has no column '{getattr(dataset, setting)}'; set {setting} to one of: "
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
    kinds = {file.suffix for file in (path, *path.rglob("*")) if file.is_file()} - {"", ".md"}
    # A plain text file is one document, not one per line: sequences are packed from whole documents.
    options: dict[str, Any] = {"sample_by": "document"} if kinds == {".txt"} else {}
    try:
        if path.is_file():
            if path.suffix not in _BUILDERS:
                raise UserError(f"dataset file {path} has an unknown type; use one of: {', '.join(_BUILDERS)}")
            return datasets.load_dataset(
                _BUILDERS[path.suffix],
                data_files={dataset.split.partition("[")[0]: str(path)},
                split=dataset.split,
                streaming=dataset.streaming,
                **options,
            )
        return datasets.load_dataset(
            dataset.name, dataset.config_name, split=dataset.split, streaming=dataset.streaming, **options
        )
    except UserError:
        raise
    except Exception as error:  # `datasets` raises whatever its builders and the network raise
        raise UserError(
            f"dataset {dataset.name} (split '{dataset.split}') could not be opened: {first_line(error)}"
        ) from error
