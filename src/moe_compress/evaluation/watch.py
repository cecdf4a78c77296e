"""Evaluating checkpoints while the distillation writes them: `moe-compress watch`, on one machine or several."""

from __future__ import annotations

import contextlib
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rich.console import Console

from moe_compress.errors import UserError
from moe_compress.evaluation.claims import presence
from moe_compress.evaluation.evaluate import Evaluator, student_targets, update_best
from moe_compress.evaluation.harness import check_tasks

if TYPE_CHECKING:
    from moe_compress.run import Run

STAGE = "watch"
COMPLETE = "training_complete.json"  # written by `distill` when its last stage has ended


def watch(run: Run, once: bool = False) -> None:
    """Evaluate the checkpoints of a run as they appear, each exactly once, and keep `RUN/best` up to date.

    Ends when the training is complete and everything is evaluated. Any number of watchers may share a run: a
    checkpoint belongs to the one that claims it, until that is done or its process is gone. While anybody watches,
    the trainer keeps checkpoints that are not evaluated yet.

    Args:
        run: the run.
        once: evaluate what there is and end.

    Raises:
        UserError: an unknown task or metric, or a teacher that cannot be loaded. A checkpoint that cannot be measured
            is recorded with its error and stops nothing.
    """
    console = Console()
    config = run.config.evaluation
    check_tasks(config)
    with ExitStack() as stack:
        _record_stage(run, stack)
        stack.enter_context(presence(run.evals_dir / "watchers"))
        evaluator = Evaluator(run, console)
        console.print(f"watching {run.checkpoints_dir}", highlight=False, soft_wrap=True)
        while True:
            # Asked before looking: a checkpoint that appears in between is seen by this look, or the next.
            complete = (run.path / COMPLETE).exists()
            pending = evaluator.pending(student_targets(run))
            measured = [evaluator.measure(target) for target in pending]
            if any(measured):
                update_best(run)
            if once or (complete and not pending):
                break
            if not all(measured) or not pending:
                time.sleep(config.poll_seconds)
        console.print("watch: " + ("one pass done" if once else "training is complete, everything is evaluated"))


def _record_stage(run: Run, stack: ExitStack) -> None:
    """Note in the manifest that the run is watched, which freezes its evaluation settings; the first watcher does."""
    with contextlib.suppress(UserError):  # another watcher of this run has done so, and is alive
        stack.enter_context(run.stage(STAGE))
