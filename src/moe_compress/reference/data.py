"""Text that every machine has: the Python standard library, split by file into train, validation and test."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Test suites are repetitive, and installers (Debian, conda) leave them out; `encodings` is code tables
# without language; the rest are not part of the library proper.
_SKIPPED_DIRECTORIES = {
    "test",
    "tests",
    "idle_test",
    "encodings",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "config",
}


def split_of(relative_path: str) -> Split:
    """The split of a file, from a hash of its path alone: stable whatever files surround it (90 / 5 / 5 %)."""
    bucket = int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:4], "big") % 100
    if bucket < 90:
        return "train"
    return "validation" if bucket < 95 else "test"


def stdlib_root() -> Path:
    """The directory of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(split: Split, root: Path | None = None) -> list[Path]:
    """The `.py` files of one split, sorted by their path below `root` (default: the running interpreter's library)."""
    root = root or stdlib_root()
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED_DIRECTORIES.isdisjoint(relative.parts[:-1]) and split_of(relative.as_posix()) == split:
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def stdlib_documents(split: Split, root: Path | None = None) -> Iterator[str]:
    """The text of each file of one split, in a fixed order; files that are not UTF-8 are passed over."""
    for path in stdlib_files(split, root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield text
