"""lm_eval tasks that ship with the package and need no network: their YAML files, and the questions behind them.

`lm_eval --include_path <this directory> --tasks stdlib_next_line` works as well.
"""

from pathlib import Path

TASKS_DIR = Path(__file__).parent

__all__ = ["TASKS_DIR"]
