"""Writing files so that a reader, or a run killed at any moment, never sees half of one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_compress.errors import UserError


def user_cache() -> Path:
    """Where what can be made again is kept for this user."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "moe-compress"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def file_in_progress(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; the file written there is synced and renamed to `path` when the block ends.

    A block that raises leaves `path` as it was, and no temporary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, sync it, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_in_progress(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def put_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a document, which stay, atomically.

    Raises:
        UserError: the document lacks the marks.
    """
    before, found_begin, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise UserError(f"{path} has no place for this: put {begin} and {end} where it belongs")
    write_atomically(path, f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line in a single write, so that lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(record) + "\n").encode())
    finally:
        os.close(descriptor)


@contextmanager
def directory_in_progress(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that is renamed to `path` when the block ends without an exception.

    Args:
        path: the directory to make; it must not exist yet.
        keep: keep what an interrupted earlier attempt left in the temporary directory, for stages that resume.

    Raises:
        FileExistsError: `path` exists already.
    """
    if path.exists():
        raise FileExistsError(path)
    temporary = path.with_name(f".{path.name}.partial")
    if temporary.exists() and not keep:
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True, exist_ok=True)
    yield temporary
    for file in temporary.rglob("*"):
        if file.is_file():
            _sync(file)
    os.replace(temporary, path)
    _sync(path.parent)


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's content, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """A short stable hash of any JSON-serializable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
