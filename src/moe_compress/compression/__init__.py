"""From a checkpoint to a compressed checkpoint, one MoE layer at a time: plan, calibrate, fit, write, resume."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_compress.lazy import lazy_names

if TYPE_CHECKING:
    from moe_compress.compression.pipeline import compress
    from moe_compress.compression.planning import Plan, plan

# Lazy, because reading a checkpoint's headers needs none of what fitting needs.
_HOME = {"compress": "pipeline", "Plan": "planning", "plan": "planning"}

__all__ = ["Plan", "compress", "plan"]

__getattr__ = lazy_names(__name__, _HOME)
