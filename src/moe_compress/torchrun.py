"""Where this process stands among those that torchrun started; outside of torchrun it is the only one."""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process, of all on all machines."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process on its machine, by which it takes a GPU."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def local_world_size() -> int:
    """How many processes there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
