"""Memory that tensors take while a function runs, on a GPU and on a CPU alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its lines on stderr say nothing to a user


@dataclass(frozen=True)
class Allocated:
    """Bytes beyond those that were allocated before: the most at any time, and what the result keeps alive."""

    peak: int
    kept: int


def allocated_by(call: Callable[[], object], device: torch.device) -> Allocated:
    """Run a function once and watch PyTorch's allocator; scratch space of other libraries is not seen.

    Args:
        call: its result is held until `kept` has been read.
        device: where it allocates.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        peak, kept = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        del result
        return Allocated(peak - before, kept - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    # The public tables give sums per operation; a peak needs the single allocations in the order of time.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    del result
    return Allocated(peak, total)
