"""Timing of several functions side by side: interleaved, so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# One sample is long enough for the clock, and the call overhead of Python, not to matter.
_SHORTEST_SAMPLE = 2e-3
_MOST_CALLS = 50


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the quartiles as its spread."""

    median: float
    low: float
    high: float
    samples: int


def time_interleaved(
    calls: Mapping[str, Callable[[int], object]],
    device: torch.device,
    *,
    seconds: float = 1.0,
    least_rounds: int = 7,
    most_rounds: int = 200,
) -> dict[str, Timing]:
    """Time functions in rounds; each round calls all of them once, beginning with another one each time.

    Args:
        calls: name to a function of the round's number, so that inputs can vary from round to round, the same for all.
        device: waited for before and after each sample.
        seconds: time to spend, roughly, on all functions together after the warm-up.
        least_rounds, most_rounds: bounds of the number of rounds.

    Returns:
        Name to `Timing`.
    """
    names = list(calls)
    repeats = {}
    for name in names:  # the second call is warm
        _sample(calls[name], 0, 1, device)
        once = _sample(calls[name], 1, 1, device)
        repeats[name] = max(1, min(_MOST_CALLS, round(_SHORTEST_SAMPLE / max(once, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for number in range(most_rounds):
        if number >= least_rounds and time.perf_counter() > end:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(_sample(calls[name], number, repeats[name], device))
    return {name: _timing(values) for name, values in samples.items()}


def _sample(call: Callable[[int], object], number: int, repeats: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call(number)
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _timing(values: list[float]) -> Timing:
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return Timing(float(median), float(low), float(high), len(values))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
