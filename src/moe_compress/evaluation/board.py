"""The state of a run's measurements, read from its files: a live table, or a line for each change."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from moe_compress.evaluation.claims import owner_of
from moe_compress.evaluation.evaluator import Target
from moe_compress.evaluation.results import (
    Key,
    Record,
    best_name,
    latest_results,
    lost_tasks,
    metrics_of,
    read_results,
    settings_fingerprint,
)

if TYPE_CHECKING:
    from moe_compress.run import Run

_STYLES = {"failed": "red", "evaluating": "yellow", "waiting": "dim"}
# More rows would not fit on a terminal; the newest matter most.
_MOST_ROWS = 20
_MOST_SCORES = 5


@dataclass(frozen=True)
class State:
    """One model of a run: measured, being measured or waiting.

    Attributes:
        key: label and step.
        state: `waiting`, `evaluating`, `done` or `failed`.
        detail: who evaluates it, or the error.
        record: the result, once there is one.
    """

    key: Key
    state: str
    detail: str = ""
    record: Record | None = None


def states(run: Run, targets: list[Target]) -> list[State]:
    """The state of the given targets, and of what was measured and is not there any more, by label and step."""
    settings = settings_fingerprint(run.config)
    latest = latest_results(read_results(run.evals_dir), settings)
    found: dict[Key, State] = {}
    for target in targets:
        owner = owner_of(run.evals_dir / "claims", target.claim(settings))
        if owner is not None:
            found[target.key] = State(target.key, "evaluating", _who(owner))
        elif target.key not in latest:
            found[target.key] = State(target.key, "waiting")
    for key, record in latest.items():
        if key not in found:
            error = record.get("error")
            found[key] = State(key, "failed" if error else "done", error or "", record)
    return [found[key] for key in sorted(found, key=lambda key: (key[0] != "teacher", key[0] == "svd", key))]


def line_of(state: State) -> str:
    """A state in one line of text, and one more for each task that could not be measured."""
    name = f"{state.key[0]} at step {state.key[1]}"
    if state.state == "evaluating":
        return f"evaluating {name} ({state.detail})"
    if state.state == "failed":
        return f"  {name} FAILED: {state.detail}"
    if state.record is None:
        return f"  {name} is waiting"
    metrics = ", ".join(f"{metric} {value:.4g}" for metric, value in metrics_of(state.record).items())
    seconds = f" ({state.record['seconds']:.0f} s)" if "seconds" in state.record else ""
    lost = [f"\n  task {task} not measured: {error}" for task, error in lost_tasks(state.record).items()]
    return f"  {name}: {metrics}{seconds}{''.join(lost)}"


def table_of(run: Run, found: list[State], note: str = "") -> Table:
    """The states as a table: the metric that chooses the best checkpoint first, then the others that fit."""
    measured = [metrics_of(state.record) for state in found if state.record is not None]
    chosen = run.config.evaluation.metric
    names = list(dict.fromkeys([chosen, *(name for metrics in measured for name in metrics if name != "loss")]))
    names = [name for name in names if any(name in metrics for metrics in measured)][:_MOST_SCORES]
    best = best_name(run.path)
    table = Table(
        title=escape(f"{run.path}"), title_justify="left", caption=escape(note) or None, caption_justify="left"
    )
    table.add_column("")
    table.add_column("state", overflow="fold")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right", overflow="fold")
    shown = found if len(found) <= _MOST_ROWS else [*found[:2], *found[2 - _MOST_ROWS :]]
    for state in shown:
        model, step = state.key
        name = model if model == "teacher" else f"{model}, step {step}"
        is_best = model == "student" and best == f"checkpoint-{step}"
        metrics = metrics_of(state.record) if state.record is not None else {}
        cells = [f"{metrics[name]:.4g}" if name in metrics else "" for name in names]
        words = " ".join(filter(None, [state.state, state.detail, "(best)" if is_best else ""]))
        table.add_row(name, escape(words), *cells, style="bold" if is_best else _STYLES.get(state.state))
    if not shown:
        table.add_row("no checkpoint yet", "", *[""] * len(names), style="dim")
    return table


class View:
    """Shows the states while work goes on: a table in place on a terminal, else a line for each change."""

    def __init__(self, run: Run, targets: Callable[[], list[Target]], console: Console | None = None) -> None:
        """`targets`: gives what is to be measured, at any moment."""
        self.run = run
        self.console = console or Console()
        self._targets = targets
        self._note = ""
        self._seen: list[State] = []
        self._told: dict[Key, State] = {}

    @contextmanager
    def shown(self) -> Iterator[View]:
        """Show the table for the length of the block; what other code writes to stderr goes to `RUN/logs`."""
        if not self.console.is_terminal:
            self._told = {state.key: state for state in self._states() if state.record is not None}
            try:
                yield self
            finally:
                self.update()
            return
        with ExitStack() as stack:
            self.run.logs_dir.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context((self.run.logs_dir / "evaluation.log").open("a", encoding="utf-8"))
            live = Live(console=self.console, get_renderable=self._table, refresh_per_second=1, redirect_stderr=False)
            stack.enter_context(live)
            stack.enter_context(contextlib.redirect_stderr(log))  # progress bars would break the table
            yield self
            self._note = ""

    def say(self, text: str) -> None:
        """Tell something that is no change of a state."""
        self._note = text
        if not self.console.is_terminal:
            print(text, flush=True)

    def update(self) -> None:
        """Print what has changed, where there is no table to show it."""
        if self.console.is_terminal:
            return
        for state in self._states():
            before = self._told.get(state.key)
            if before != state and state.state != "waiting":
                print(line_of(state), flush=True)
            self._told[state.key] = state

    def _states(self) -> list[State]:
        with contextlib.suppress(OSError):  # a file that went away while it was read; the next look shows it right
            self._seen = states(self.run, self._targets())
        return self._seen

    def _table(self) -> Any:
        return table_of(self.run, self._states(), self._note)


def _who(owner: dict[str, Any]) -> str:
    host = str(owner.get("host", "?"))
    where = "" if host == socket.gethostname() else f" on {host}"
    device = f"{owner['device']}, " if owner.get("device") else ""
    return f"{device}process {owner.get('pid')}{where}"
