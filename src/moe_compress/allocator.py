"""What becomes of large buffers that were freed: kept for the next of their kind, or given back to the system."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_LARGEST_KEPT, _MOST_KEPT = 2**28, 2**30  # room for activations; larger are the weights that a fit works on
_OF_THE_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let glibc keep freed buffers of up to 256 MiB for the rest of the process, and 1 GiB at the end of the heap.

    By default it gives those above 32 MB back at once, and every call of a layer with as large activations faults them
    in again, page by page: a fifth to a half of the time of a long prefill on a CPU (docs/SPEED.md). Settings in the
    environment (`MALLOC_TRIM_THRESHOLD_` and the like) are left as they are.

    Returns:
        Whether that could be done: not with another C library, nor with an old glibc, which refuses.
    """
    if any(name in os.environ for name in _OF_THE_USER):
        return False
    mallopt = _of_the_system("mallopt")
    return (
        mallopt is not None
        and bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT))
        and bool(mallopt(_TRIM_THRESHOLD, _MOST_KEPT))
    )


def give_back_freed_memory() -> None:
    """Give buffers that were freed back to the system, also those that lie between others; with glibc only."""
    malloc_trim = _of_the_system("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_the_system(name: str) -> Callable[..., int] | None:
    """A function of the C library."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # no such function; no way to look for it, as on Windows
        return None
    return found
