"""From a checkpoint to a compressed checkpoint, one MoE layer at a time: plan, calibrate, fit, write, resume."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_compress.compression.pipeline import compress
    from moe_compress.compression.planning import Plan, plan

# Lazy, because reading a checkpoint's headers needs none of what fitting needs.
_HOME = {"compress": "pipeline", "Plan": "planning", "plan": "planning"}

__all__ = ["Plan", "compress", "plan"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
