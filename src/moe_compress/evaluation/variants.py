"""The names under which what is compared stands in results, tables and plots."""

from __future__ import annotations

from typing import Final

OURS: Final = "moe-compress"  # what the settings make of a layer, or a checkpoint has
SVD: Final = "per-expert SVD"
CORE: Final = "shared core"
