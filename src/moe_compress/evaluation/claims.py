"""Claims: how several processes, on one host or many, share work through a directory without doing any of it twice.

A claim is a file made exclusively (`O_EXCL`) that names its process. A claim is stale when that process is gone:
at once on the same host, and after `STALE_SECONDS` without a heartbeat where the process cannot be looked up.
A stale claim is never deleted but outnumbered: claim n + 1 is made exclusively too, so that of two processes that
see the same stale claim one wins. Whoever holds a claim must look again whether the work is done already, and leaves
its block without an exception only when it is. The number of a claim says how many owners died at the same work.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 300.0


def process_identity() -> dict[str, Any]:
    """Who this process is, so that another can tell whether it still lives."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "namespace": _pid_namespace(),
        "started": _start_of(os.getpid()),
        "time": time.time(),
    }


def is_alive(path: Path) -> bool:
    """Whether the process that a claim (or a watcher's file) names still lives; a missing file is nobody's."""
    try:
        age = time.time() - path.stat().st_mtime
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    try:
        owner = json.loads(text)
        here = owner["host"] == socket.gethostname() and owner["namespace"] == _pid_namespace()
        pid = int(owner["pid"])
    except (ValueError, KeyError, TypeError):
        return age < STALE_SECONDS  # being written this instant, or the remains of a full disk
    if not here:
        return age < STALE_SECONDS
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # The same number may meanwhile belong to another process.
    return owner.get("started") == _start_of(pid)


@contextmanager
def claimed(directory: Path, name: str, **facts: Any) -> Iterator[int]:
    """Claim one piece of work for the length of the block.

    Args:
        directory: where the claims of this kind of work are kept; made if missing.
        name: the piece of work, a plain file name.
        facts: what else the claim tells of its owner (JSON).

    Yields:
        0 if another live process has it, else which attempt this is: 2 after one owner that died at it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    numbers = _numbers(directory, name)
    newest = max(numbers, default=-1)
    if numbers and is_alive(_claim(directory, name, newest)):
        yield 0
        return
    path = _claim(directory, name, newest + 1)
    try:
        _create(path, facts)
    except FileExistsError:
        yield 0
        return
    with heartbeat(path):
        yield newest + 2
        for number in numbers:  # the dead are forgotten once their work is done
            _claim(directory, name, number).unlink(missing_ok=True)


def owner_of(directory: Path, name: str) -> dict[str, Any] | None:
    """Who works at a piece of work at this moment: its `process_identity` and facts, or None if nobody does."""
    if not directory.is_dir() or not (numbers := _numbers(directory, name)):
        return None
    path = _claim(directory, name, max(numbers))
    if not is_alive(path):
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # it ended, or is being written, at this very moment
        return None


@contextmanager
def presence(directory: Path) -> Iterator[Path]:
    """Leave `<host>-<pid>.json` in a directory for the length of the block, as a sign that this process watches.

    The directory is there exactly as long as somebody watches: what dead processes left is removed on entering.
    """
    path = directory / f"{socket.gethostname()}-{os.getpid()}.json"
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            for other in directory.iterdir():
                if other == path or not is_alive(other):
                    other.unlink(missing_ok=True)
            _create(path)
            break
        except FileNotFoundError:  # the last watcher left, and took the directory along, between these lines
            continue
    try:
        with heartbeat(path):
            yield path
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()


@contextmanager
def heartbeat(path: Path) -> Iterator[None]:
    """Touch a file regularly while the block runs, and remove it at the end."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name=f"heartbeat {path.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        path.unlink(missing_ok=True)


def _create(path: Path, facts: dict[str, Any] | None = None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(descriptor, json.dumps(process_identity() | (facts or {})).encode())
    finally:
        os.close(descriptor)


def _claim(directory: Path, name: str, number: int) -> Path:
    return directory / f"{name}.{number}.json"


def _numbers(directory: Path, name: str) -> list[int]:
    """The numbers of the claims to a piece of work."""
    pattern = re.compile(re.escape(name) + r"\.(\d+)\.json")
    return [int(match[1]) for path in directory.iterdir() if (match := pattern.fullmatch(path.name))]


def _pid_namespace() -> str | None:
    """Process numbers mean something only within one of these (each container has its own)."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """The kernel's start time of a process, where there is a /proc."""
    try:
        # The command name in parentheses may hold spaces; the start time is the 20th field after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
