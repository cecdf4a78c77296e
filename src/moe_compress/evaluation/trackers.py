"""Results sent to the trackers of `distillation.training.report_to`: wandb, tensorboard, trackio.

Each evaluating process is a run of its own in the tracker, beside that of the training. A tracker that is not there or
fails costs a line of text, never a measurement: `results.jsonl` has everything.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from moe_compress.errors import first_line
from moe_compress.evaluation.results import Record, metrics_of

if TYPE_CHECKING:
    from moe_compress.run import Run


class Tracker(Protocol):
    """One tracker, open."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send values of one checkpoint; steps may come in any order."""

    def close(self) -> None:
        """End the run in the tracker."""


class _Tensorboard:
    def __init__(self, run: Run, name: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.logs_dir / "tensorboard" / name))

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: Run, name: str) -> None:
        import wandb

        self._run = wandb.init(
            project=run.config.wandb_project,
            group=run.config.experiment_name,
            job_type="evaluation",
            name=name,
            dir=str(run.logs_dir),
            reinit="create_new",
        )
        # Its own step only grows, and the newest checkpoint may be measured first.
        self._run.define_metric("checkpoint_step")
        self._run.define_metric("*", step_metric="checkpoint_step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "checkpoint_step": step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run: Run, name: str) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=run.config.wandb_project, name=name, group=run.config.experiment_name)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._trackio.log({**values, "checkpoint_step": step}, step=step)

    def close(self) -> None:
        self._trackio.finish()


_TRACKERS: dict[str, Callable[[Run, str], Tracker]] = {
    "tensorboard": _Tensorboard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


class Trackers:
    """The trackers that the settings name, opened with the first result."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        """`say`: where to tell of a tracker that cannot be used."""
        self._run = run
        self._say = say
        self._open: dict[str, Tracker] | None = None

    def log(self, record: Record) -> None:
        """Send the metrics of a record as `eval/<metric>`, of others than the student as `eval/<model>/<metric>`."""
        if "error" in record:
            return
        if self._open is None:
            self._open = dict(self._opened())
        prefix = "eval" if record["model"] == "student" else f"eval/{record['model']}"
        values = {f"{prefix}/{name.replace('.', '/')}": value for name, value in metrics_of(record).items()}
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(int(record["step"]), values))  # type: ignore[misc]

    def close(self) -> None:
        """End all runs."""
        for name, tracker in (self._open or {}).items():
            self._try(name, tracker.close)
        self._open = None

    def _opened(self) -> Any:
        name = f"evaluation-{socket.gethostname()}-{os.getpid()}"
        names = self._run.config.distillation.training.report_to
        for tracker in (name for name in names if name != "none"):
            if tracker not in _TRACKERS:
                self._say(f"results are not sent to '{tracker}'; known are: {', '.join(_TRACKERS)}")
                continue
            try:
                yield tracker, _TRACKERS[tracker](self._run, name)
            except ImportError:
                self._say(f"results are not sent to {tracker}: not installed (pip install 'moe-compress[{tracker}]')")
            except Exception as error:  # a tracker raises whatever its network raises
                self._say(f"results are not sent to {tracker}: {first_line(error)}")

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._say(f"{name} did not take a result: {first_line(error)}")
