"""The methods of the benchmark by name: one file a family, each `compress(task) -> model`."""

from __future__ import annotations

from benchmarks.quality.methods import d2moe, fisher, merging, mobe, pruning, svd  # noqa: F401  (they register)
from benchmarks.quality.methods.base import METHODS, Method, Task

__all__ = ["METHODS", "Method", "Task"]
