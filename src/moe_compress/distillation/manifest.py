"""The manifest of a teacher cache: what it was made from, which files it has, and whether it fits what is expected.

Each worker lists its finished files in a part manifest of its own (`part-<worker>-of-<workers>.json`); when all files
are listed, whoever finishes last writes `manifest.json`, and the cache is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_compress.config import DatasetConfig
from moe_compress.errors import UserError
from moe_compress.files import write_json

FORMAT_VERSION = 2
MANIFEST = "manifest.json"

Header = dict[str, Any]

# Said of the cache for people and for `cache verify`, but not compared: the fingerprint is.
_INFORMATIVE = {"teacher_name", "teacher_revision", "teacher_dtype"}


@dataclass(frozen=True)
class CacheFile:
    """One HDF5 file of the cache: sequences `start` to `start + rows` of the whole; `content` hashes their ids."""

    name: str
    start: int
    rows: int
    tokens: int
    bytes: int
    content: str
    sha256: str


def dataset_settings(dataset: DatasetConfig, seed: int) -> dict[str, Any]:
    """The settings that decide which token ids a packed data set has (`max_length` is the header's sequence_length)."""
    settings = {key: value for key, value in asdict(dataset).items() if key != "max_length"}
    if not dataset.streaming:
        settings.pop("shuffle_buffer")
    return {**settings, "seed": seed}


def dataset_words(settings: Mapping[str, Any]) -> str:
    """`dataset_settings` in words, without what is not set."""
    shown = [f"{key}={value}" for key, value in settings.items() if value not in (None, False) and key != "name"]
    return ", ".join([settings["name"], *shown])


def _flat(header: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in header.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_header(header: Mapping[str, Any], expected: Mapping[str, Any], directory: Path) -> None:
    """Compare a cache's header with what is expected of it; fields that `expected` does not name are not compared.

    Raises:
        UserError: they differ; names the first differing field and both values.
    """
    have, want = _flat(header), _flat(expected)
    for field, value in want.items():
        if field not in _INFORMATIVE and have.get(field) != value:
            raise UserError(
                f"teacher cache {directory}: {field} is {have.get(field)!r} in the cache but {value!r} is expected "
                "here; use another distillation.teacher.cache_dir, or make it again with "
                "distillation.teacher.generation.force_regenerate=true"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["header"]["format_version"]
        if version == FORMAT_VERSION:
            content["files"] = [CacheFile(**entry) for entry in content["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"teacher cache: {path} cannot be read ({error}); delete it and make the cache again"
        ) from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"teacher cache {path.parent}: format_version is {version} in the cache but {FORMAT_VERSION} is expected "
            "here; make the cache again"
        )
    return content


def part_name(worker: int, workers: int) -> str:
    """The name of a worker's own manifest."""
    return f"part-{worker:05d}-of-{workers:05d}.json"


def write_part(path: Path, header: Header, files: Iterable[CacheFile]) -> None:
    """Write a worker's list of finished files, atomically."""
    write_json(path, {"header": header, "files": [asdict(file) for file in files]})


def read_part(path: Path) -> tuple[Header, list[CacheFile]]:
    """Header and files of one part manifest.

    Raises:
        UserError: it is damaged or of another format version.
    """
    content = _read(path)
    return content["header"], content["files"]


def listed_files(directory: Path, header: Header, *, forget: bool = False) -> dict[str, CacheFile]:
    """All finished files that any part manifest lists and that are there with the size it says, by name.

    Args:
        directory: the cache.
        header: what every part must have been made with.
        forget: drop the others from the part manifests, so that nothing old is said of a file that is made again.

    Raises:
        UserError: a part was made with another header.
    """
    found: dict[str, CacheFile] = {}
    for part in sorted(directory.glob("part-*.json")):
        have, files = read_part(part)
        check_header(have, header, directory)
        there = [file for file in files if _is_there(directory / file.name, file)]
        if forget and len(there) < len(files):
            write_part(part, have, there)
        found |= {file.name: file for file in there}
    return found


def _is_there(path: Path, file: CacheFile) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes


def summary(files: Iterable[CacheFile]) -> dict[str, Any]:
    """Sequences, tokens, bytes and bytes per token of some files."""
    files = list(files)
    size, tokens = sum(file.bytes for file in files), sum(file.tokens for file in files)
    return {
        "sequences": sum(file.rows for file in files),
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": round(size / max(tokens, 1), 2),
    }


def write_manifest(directory: Path, header: Header, files: Iterable[CacheFile]) -> None:
    """Declare the cache complete."""
    files = sorted(files, key=lambda file: file.start)
    listed = [asdict(file) for file in files]
    write_json(directory / MANIFEST, {"header": header, **summary(files), "files": listed})


def read_manifest(directory: Path) -> tuple[Header, list[CacheFile]]:
    """Header and files of a complete cache, in the order of their sequences.

    Raises:
        UserError: there is no complete cache in `directory`, or its manifest is damaged.
    """
    if not (directory / MANIFEST).exists():
        state = "is not complete" if any(directory.glob("part-*.json")) else "does not exist"
        raise UserError(f"teacher cache {directory} {state}; run `moe-compress teacher-logits` (all workers) first")
    content = _read(directory / MANIFEST)
    files: list[CacheFile] = content["files"]
    start = 0
    for file in files:
        if file.start != start:
            raise UserError(f"teacher cache {directory}: sequences from {start} on are missing in {MANIFEST}")
        start += file.rows
    if start != content["header"]["num_sequences"]:
        raise UserError(
            f"teacher cache {directory}: {MANIFEST} lists {start} of {content['header']['num_sequences']} sequences"
        )
    return content["header"], files
