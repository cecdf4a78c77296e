"""The evidence of runs and models as pages and tables to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_compress.lazy import lazy_names

if TYPE_CHECKING:
    from moe_compress.report.comparison import compare_runs
    from moe_compress.report.models import compare_models
    from moe_compress.report.page import write_report

# Lazy, because measuring models needs torch, and reading what was measured does not.
_HOME = {"compare_models": "models", "compare_runs": "comparison", "write_report": "page"}

__all__ = ["compare_models", "compare_runs", "write_report"]

__getattr__ = lazy_names(__name__, _HOME)
