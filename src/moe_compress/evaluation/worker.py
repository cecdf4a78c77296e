"""One evaluating process: `work`, its loop, and how the watcher starts it (`python -m moe_compress.evaluation.worker`).

A worker reads its orders as one JSON line on stdin. It ends when stdin does: that is how the watcher stops it, and how
it learns that the watcher was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moe_compress import settings
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.evaluation.evaluator import Evaluator, is_whole, student_targets
from moe_compress.run import Run

COMPLETE = "training_complete.json"  # written by `distill` when its last stage has ended
_SECONDS_TO_STOP = 30.0


@dataclass
class Orders:
    """What a worker is told.

    Attributes:
        run: the run directory.
        values: the settings as a flat mapping.
        devices: the devices of this worker; empty leaves the choice to it.
        once: evaluate what there is and end.
        share: of how many workers on the same processor it is one.
    """

    run: str
    values: dict[str, object]
    devices: list[str] = field(default_factory=list)
    once: bool = False
    share: int = 1

    def config(self) -> Config:
        """The settings, with the devices of this worker."""
        return settings.from_values({**self.values, "evaluation.devices": self.devices})


def work(run: Run, once: bool = False, say: Callable[[str], None] = print, device: str = "") -> None:
    """Evaluate the checkpoints of a run as they appear, and keep `RUN/best` up to date.

    One at a time, then it looks again: with `evaluation.order=newest` the next is whatever is newest by then.

    Raises:
        UserError: an unknown metric, or a teacher that cannot be loaded. A checkpoint that cannot be measured is
            recorded with its error and stops nothing.
    """
    config = run.config.evaluation
    evaluator = Evaluator(run, say, device=device)
    only = {target.key for target in student_targets(run)} if once else None
    while True:
        # Asked before looking: a checkpoint that appears in between is seen by this look, or the next.
        complete = (run.path / COMPLETE).exists()
        targets = [target for target in student_targets(run) if only is None or target.key in only]
        pending = evaluator.pending(targets)
        if config.order == "newest":
            pending.reverse()
        # One that is still being copied can wait; when nothing more will come, it is recorded with what it lacks.
        ready = list(filter(is_whole, pending)) or (pending if complete else [])
        if any(evaluator.measure(target) for target in ready):
            continue
        if once or (complete and not pending):
            break
        time.sleep(config.poll_seconds)
    evaluator.close()


def serve(orders: Orders) -> int:
    """Carry out orders; returns the exit code: 0, 2 for a user's mistake (told as one line), 130 if stopped."""
    for number in (signal.SIGTERM, signal.SIGINT):  # also where whoever started the watcher ignores them
        signal.signal(number, signal.default_int_handler)
    threading.Thread(target=_stop_with_stdin, daemon=True).start()
    try:
        run = Run(Path(orders.run), orders.config())
        if orders.share > 1:
            import torch

            torch.set_num_threads(max(1, torch.get_num_threads() // orders.share))
        work(run, orders.once, say, "+".join(orders.devices))
    except UserError as error:
        say(f"error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        say("stopped")
        return 130
    return 0


def say(text: str) -> None:
    """A line of the worker's log."""
    print(text, flush=True)


def _stop_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    # To the main thread itself, so that it wakes if it sleeps.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    time.sleep(_SECONDS_TO_STOP)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(serve(Orders(**json.loads(sys.stdin.readline()))))
