"""The processes of one compression under torchrun: who does what next, who waits for whom, and what if one fails.

They share nothing but a key-value store (the one torchrun itself runs, over TCP) and the run's directory, so that it
makes no difference whether torchrun was told gloo or NCCL, and a process that has no GPU may work beside one that has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

from torch.distributed import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moe_compress.torchrun import local_rank, rank, world_size

_POLL_SECONDS = 0.1
_JOIN_TIMEOUT = timedelta(minutes=10)


class PeerFailed(Exception):
    """Another process of the team has failed, and has said so: this one is to end without a word."""


class Team:
    """The processes of one job; alone, outside torchrun, everything is done at once by this one.

    Attributes:
        rank: number of this process; 0 leads.
        local_rank: number of this process on its machine, by which it takes a GPU.
        size: number of processes.
    """

    def __init__(self, job: str) -> None:
        """Join the team that works on `job`, a name that all its processes give."""
        self.rank = rank()
        self.local_rank = local_rank()
        self.size = world_size()
        self._store = PrefixStore(job, _torchrun_store() if self.size > 1 else HashStore())

    @property
    def leads(self) -> bool:
        """Whether this process is the one that begins and ends the job."""
        return self.rank == 0

    def take(self, queue: str, length: int) -> Iterator[int]:
        """Numbers from 0 to `length` - 1, each given to one process only, to whichever asks first.

        Raises:
            PeerFailed: another process has failed.
        """
        while (number := self.take_one(queue, length)) is not None:
            yield number

    def take_one(self, queue: str, length: int) -> int | None:
        """The next number of a queue, or None when it is empty."""
        self.check()
        number = self.add(queue) - 1
        return number if number < length else None

    def add(self, counter: str, amount: int = 1) -> int:
        """Raise a counter that all processes share; its new value."""
        return int(self._store.add(f"counter/{counter}", amount))

    def publish(self, key: str, value: str = "") -> None:
        """Tell the others `value`, for which they may `wait`."""
        self._store.set(f"value/{key}", value)

    def wait(self, key: str) -> str:
        """What another process publishes under `key`, once it does.

        Raises:
            PeerFailed: another process has failed; it will not come.
        """
        while not self._store.check([f"value/{key}"]):
            self.check()
            time.sleep(_POLL_SECONDS)
        return self._store.get(f"value/{key}").decode()

    def arrive(self, point: str) -> None:
        """Say that this process has come to a point; the leader goes on only when all have.

        Raises:
            PeerFailed: another process has failed; it will not come.
        """
        self.add(point)
        while self.leads and self.add(point, 0) < self.size:
            self.check()
            time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Raises PeerFailed if another process has failed."""
        if self._store.check(["value/failed"]):
            raise PeerFailed(self._store.get("value/failed").decode())

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on all processes if it fails on one, which tells why; the others end with exit code 2."""
        try:
            yield
        except PeerFailed as failure:
            raise SystemExit(2) from failure
        except BaseException as error:
            self.publish("failed", f"rank {self.rank}: {error or type(error).__name__}")
            raise


@cache
def _torchrun_store() -> Store:
    return next(rendezvous("env://", timeout=_JOIN_TIMEOUT))[0]
