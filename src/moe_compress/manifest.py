"""The manifest of a run: which stage ran when, with which settings and versions, and the facts it recorded.

Several processes may write it at once (`watch` beside `distill`, the workers of `teacher-logits`), so every change is
read, made and written under a lock. A stage divided among workers keeps one record per part beside its own.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from moe_compress.errors import UserError
from moe_compress.files import write_json

MANIFEST_NAME = "manifest.json"
LOCKS_NAME = ".locks"
_LEFT_SOMETHING = ("running", "interrupted", "finished")


class Manifest:
    """`manifest.json` of a run directory.

    A record holds: status (running, finished, interrupted, or failed before it left anything), started, finished,
    seconds, error, settings (their fingerprint) and versions; a stage also facts and, by worker, parts.
    """

    def __init__(self, run_path: Path) -> None:
        self.path = run_path / MANIFEST_NAME
        self.locks = run_path / LOCKS_NAME

    def stage(self, name: str) -> dict[str, Any]:
        """The record of a stage, empty if there is none.

        Raises:
            UserError: the manifest is damaged.
        """
        return self._read()["stages"].get(name, {})

    def record(self, name: str, part: str | None = None) -> dict[str, Any]:
        """The record of a stage, or of one part of it."""
        entry = self.stage(name)
        return entry if part is None else entry.get("parts", {}).get(part, {})

    def update(self, name: str, part: str | None = None, **fields: Any) -> None:
        """Set fields of the record of a stage, or of one part of it."""
        with self._editing() as stages:
            entry = stages.setdefault(name, {})
            if part is not None:
                entry = entry.setdefault("parts", {}).setdefault(part, {})
            entry.update(fields)

    def add_facts(self, name: str, facts: dict[str, Any]) -> None:
        """Merge facts (anything JSON holds; other values as text) into the record of a stage."""
        plain = json.loads(json.dumps(facts, default=str))
        with self._editing() as stages:
            entry = stages.setdefault(name, {})
            entry["facts"] = {**entry.get("facts", {}), **plain}

    def has_run(self, name: str) -> bool:
        """Whether a stage has left something: it is running, was interrupted, or is finished, in whole or in part."""
        entry = self.stage(name)
        return any(record.get("status") in _LEFT_SOMETHING for record in (entry, *entry.get("parts", {}).values()))

    def finished(self, name: str, settings: str, part: str | None = None) -> bool:
        """Whether a stage, or the given part of it, is finished with settings of this fingerprint.

        Without `part`, a stage divided among workers is finished when all parts are.
        """
        entry = self.stage(name)
        parts = entry.get("parts", {})

        def done(record: dict[str, Any]) -> bool:
            return record.get("status") == "finished" and record.get("settings") == settings

        if done(entry) or part is not None:
            return done(entry) or done(parts.get(part, {}))
        totals = {int(key.partition("/")[2]) for key in parts}
        return any(all(done(parts.get(f"{worker}/{total}", {})) for worker in range(total)) for total in totals)

    def _read(self) -> dict[str, Any]:
        try:
            manifest = json.loads(self.path.read_text(encoding="utf-8"))
            manifest["stages"].items()
        except FileNotFoundError:
            return {"format": 1, "stages": {}}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path} is damaged ({error}); restore it, or start a new run directory") from error
        return manifest

    @contextmanager
    def _editing(self) -> Iterator[dict[str, Any]]:
        with locked(self.locks / "manifest", wait=True):
            manifest = self._read()
            yield manifest["stages"]
            write_json(self.path, manifest)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold an advisory lock on a file; the system lets it go when the process dies, however it dies.

    Raises:
        BlockingIOError: somebody else holds it and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:  # some network file systems have no locks; the run goes on without
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield


def timestamp() -> str:
    """The time now, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, without importing them."""
    found = {"python": platform.python_version()}
    for name in ("moe_compress", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
