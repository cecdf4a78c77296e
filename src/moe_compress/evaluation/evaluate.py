"""The stage `evaluate`: every checkpoint of a run measured once, the best one linked, samples written, speed timed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console

from moe_compress.evaluation.board import View
from moe_compress.evaluation.evaluator import Evaluator, error_text, free_memory, require_measured, run_targets
from moe_compress.evaluation.extras import measure_speed, write_sample_file
from moe_compress.evaluation.harness import check_tasks
from moe_compress.evaluation.machine import choose_device

if TYPE_CHECKING:
    from moe_compress.run import Run

STAGE = "evaluate"
_WAIT_SECONDS = 5.0


def evaluate_run(run: Run) -> None:
    """Measure teacher, zero-shot student, every checkpoint, and the SVD baseline where there is one, each once.

    Leaves `RUN/evals/results.jsonl`, `samples.json` and `speed.json`, and links `RUN/best`. What was measured with
    the same settings, here or by a watcher, is not measured again; what failed then is tried again. Samples or speed
    that fail cost one line.

    Raises:
        UserError: no checkpoint, an unknown task, metric or device, or a model or task that could not be measured
            (after the rest was).
    """
    console = Console()
    check_tasks(run.config.evaluation)
    choose_device(run.config)
    targets = run_targets(run)
    view = View(run, lambda: targets, console)
    evaluator = Evaluator(run, view.say, retry_errors=True)
    if run.finished(STAGE) and not run.facts(STAGE).get("lost") and not evaluator.pending(targets):
        console.print(f"evaluate: finished already, see {run.evals_dir}", highlight=False, markup=False, soft_wrap=True)
        return
    with run.stage(STAGE), view.shown():
        while pending := evaluator.pending(targets):
            worked = False
            for target in pending:
                worked |= evaluator.measure(target)
                view.update()
            if not worked:
                time.sleep(_WAIT_SECONDS)  # all of it is in the hands of watchers
        evaluator.close()
        latest = evaluator.latest()
        measured = {target.key: target.path for target in targets if "error" not in latest[target.key]}
        lost = []
        if ("teacher", 0) in measured and any(model == "student" for model, _ in measured):
            for doing, make in (("writing samples", write_sample_file), ("measuring speed", measure_speed)):
                view.say(doing)
                try:
                    make(run, measured)
                except Exception as error:  # the report can do without either
                    lost.append(f"{doing} failed: {error_text(error)}")
                free_memory()
        run.record(STAGE, lost=lost)
    for line in lost:
        console.print(f"evaluate: {line}", highlight=False, markup=False, soft_wrap=True)
    require_measured(run, [latest[target.key] for target in targets])
