"""`moe-compress watch`: worker processes evaluate checkpoints while the distillation writes them.

This process shows what happens and looks after its workers; it loads no model. Any number of watchers, on one machine
or several, share a run through claims.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.evaluation.board import View
from moe_compress.evaluation.claims import presence
from moe_compress.evaluation.evaluator import no_checkpoint, require_measured, student_targets
from moe_compress.evaluation.harness import check_tasks
from moe_compress.evaluation.machine import choose_device
from moe_compress.evaluation.results import latest_results, read_results, settings_fingerprint
from moe_compress.evaluation.worker import Orders
from moe_compress.schema import flatten

if TYPE_CHECKING:
    from moe_compress.run import Run

STAGE = "watch"
_TICK_SECONDS = 0.5
_SECONDS_TO_STOP = 20.0
_MOST_RESTARTS = 3  # in a row, without a result in between


def watch_run(run: Run, once: bool = False) -> None:
    """Evaluate the checkpoints of a run as they appear, each exactly once, and keep `RUN/best` up to date.

    One worker process per device (or per `evaluation.gpus_per_model` of `evaluation.devices`). A worker that dies is
    started again. Ends when the training is complete and everything is evaluated. While anybody watches, the trainer
    keeps checkpoints that are not evaluated yet.

    Args:
        run: the run.
        once: evaluate what there is and end.

    Raises:
        UserError: an unknown task, metric or device, a teacher that cannot be loaded, workers that die again and again,
            or, with `once`, a run without checkpoints, or one of which something could not be measured.
    """
    groups = device_groups(run.config)
    check_tasks(run.config.evaluation)
    if once and not run.checkpoints():
        raise no_checkpoint(run)
    view = View(run, lambda: student_targets(run))
    with ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm())
        _record_stage(run, stack)
        stack.enter_context(presence(run.evals_dir / "watchers"))
        stack.enter_context(view.shown())
        view.say(f"watching {run.checkpoints_dir}")
        workers = [stack.enter_context(Worker(run, number, groups, once, view.say)) for number in range(len(groups))]
        try:
            while any([worker.look_after() for worker in workers]):
                view.update()
                time.sleep(_TICK_SECONDS)
        finally:
            for worker in workers:  # all at once; leaving the stack waits for each
                worker.stop()
    view.say("watch: " + ("one pass done" if once else "training is complete, everything is evaluated"))
    if once:
        latest = latest_results(read_results(run.evals_dir), settings_fingerprint(run.config))
        require_measured(run, [latest[target.key] for target in student_targets(run) if target.key in latest])


def device_groups(config: Config) -> list[list[str]]:
    """The devices of each worker; one empty list where the settings name none and the worker is to choose.

    Raises:
        UserError: a device that does not exist, or a number that `gpus_per_model` does not divide.
    """
    evaluation = config.evaluation
    for name in evaluation.devices:
        choose_device(replace(config, evaluation=replace(evaluation, devices=[name])))
    if not evaluation.devices:
        return [[]]
    size = evaluation.gpus_per_model if all(name.startswith("cuda") for name in evaluation.devices) else 1
    if len(evaluation.devices) % size:
        raise UserError(
            f"evaluation.devices names {len(evaluation.devices)} GPUs, which evaluation.gpus_per_model={size} does not "
            "divide"
        )
    return [evaluation.devices[start : start + size] for start in range(0, len(evaluation.devices), size)]


class Worker:
    """A worker process, started again when it dies; its output goes to `RUN/logs`."""

    def __init__(self, run: Run, number: int, groups: list[list[str]], once: bool, say: Callable[[str], None]) -> None:
        """`groups`: the devices of all workers, of which this is the `number`-th."""
        devices = groups[number]
        self.name = "+".join(devices) or "the default device"
        self._run = run
        self._say = say
        share = sum(group == ["cpu"] for group in groups) if devices == ["cpu"] else 1
        self._orders = Orders(str(run.path), flatten(run.config), devices, once, share)
        self.log = run.logs_dir / f"watch-{socket.gethostname()}-{os.getpid()}-{number}.log"
        self._restarts = 0
        self._results = 0
        self._process = self._started()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        try:
            self._process.wait(_SECONDS_TO_STOP)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """Tell the process to end."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def look_after(self) -> bool:
        """Start the process again if it died; returns whether it has something to do still.

        Raises:
            UserError: what the worker found wrong, or that it died again and again.
        """
        code = self._process.poll()
        if code is None:
            return True
        if code == 0:
            return False
        if code == 2:
            raise UserError(self._last_line().removeprefix("error: "))
        results = len(read_results(self._run.evals_dir))
        self._restarts = self._restarts + 1 if results == self._results else 1
        self._results = results
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if self._restarts > _MOST_RESTARTS:
            raise UserError(f"the evaluator on {self.name} {how} {self._restarts} times in a row; see {self.log}")
        self._say(f"the evaluator on {self.name} {how}; starting it again (see {self.log})")
        self._process = self._started()
        return True

    def _started(self) -> subprocess.Popen[str]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            # In a session of its own: Ctrl-C is for the watcher, which then stops its workers.
            process = subprocess.Popen(
                [sys.executable, "-m", "moe_compress.evaluation.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once, which is found out when it is looked after
            process.stdin.write(json.dumps(asdict(self._orders)) + "\n")
            process.stdin.flush()
        return process

    def _last_line(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.startswith("error: ")), f"error: see {self.log}")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM, by which a scheduler ends a job, ends the block like Ctrl-C; only the main thread can be told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _record_stage(run: Run, stack: ExitStack) -> None:
    """Note in the manifest that the run is watched, which freezes its evaluation settings; the first watcher does."""
    with contextlib.suppress(UserError):  # another watcher of this run has done so, and is alive
        stack.enter_context(run.stage(STAGE))
