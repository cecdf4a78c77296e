"""Who does which layer: calibrating, fitting and copying, divided among the processes of a team."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moe_compress.compression.backward import FisherWalk
from moe_compress.compression.calibrate import Calibration
from moe_compress.compression.layer import LayerSettings, fit_layer, layer_input
from moe_compress.compression.layerwise import DoesNotFit, LayerwiseModel
from moe_compress.compression.source import SourceModel
from moe_compress.compression.walk import CalibrationWalk
from moe_compress.compression.workers import Team
from moe_compress.compression.writer import CheckpointWriter
from moe_compress.config import Config
from moe_compress.errors import UserError


class Job:
    """The layers of one compression, of which each process of the team does some."""

    def __init__(
        self,
        source: SourceModel,
        settings: list[LayerSettings],
        keys: list[str],
        calibration: Calibration | None,
        writer: CheckpointWriter,
        progress: Progress,
        team: Team,
    ) -> None:
        self.source, self.settings, self.keys = source, settings, keys
        self.calibration, self.writer, self.progress, self.team = calibration, writer, progress, team
        self.order = list(range(len(keys))) if calibration is None else calibration.order(len(keys))
        self.task = progress.add_task("fitting layers", total=len(keys), error="")

    def written(self, index: int) -> bool:
        """Whether a layer has its shard."""
        return self.writer.record(index, self.keys[index]) is not None

    def fit_layers(self) -> None:
        """Fit and write layers, as long as there are any that nobody else has taken."""
        if self.calibration is not None and self.calibration.sequential and not self.team.leads:
            return  # each layer waits for the one before it: the leader does them all
        for number in self.team.take("layers", len(self.order)):
            self.fit(self.order[number])

    def fit(self, index: int) -> None:
        """Fit and write a layer that this process has taken, unless its shard is there already."""
        if not self.written(index):
            layer = self.source.map.layers[index]
            grams = None
            if self.calibration is not None:
                self.team.wait(f"grams of {index}")
                grams = self.calibration.load(index)
            tensors = self.source.map.load(self.source.checkpoint, layer)
            result = fit_layer(layer_input(layer.experts, tensors, grams), self.settings[index], self._show)
            del tensors, grams
            self.writer.write_layer(index, result, self.keys[index])
            if self.calibration is not None:
                self.calibration.file(index).unlink(missing_ok=True)
        self.progress.update(self.task, completed=self.team.add("layers written"))

    def calibrate_and_fit(self, make_walk: Callable[[], CalibrationWalk | None], device: torch.device) -> None:
        """Collect the Gram matrices of all layers that have no shard, for this process and the others.

        So that they do not fill the disk, this process fits a layer itself whenever as many wait to be fitted as there
        are processes; alone, it fits each layer at once.

        Args:
            make_walk: of what collects them layer by layer, called if any are missing; if it gives None, they are
                collected with the whole model in memory, all before the first fit.
        """
        assert self.calibration is not None
        pending = [index for index in self.order if not self.written(index)]
        if not pending:
            return
        walk = make_walk()
        text = f"{self.calibration.rows.size:,} tokens"
        task = self.progress.add_task("calibrating", total=None, error=text, visible=False)

        def on_progress(done: int, total: int) -> None:
            self.progress.update(task, completed=done, total=total, visible=True)

        if walk is None:
            missing = [index for index in pending if not self.calibration.finished(index)]
            if missing:
                self.calibration.run(missing, device, on_progress)
            for index in pending:
                self.team.publish(f"grams of {index}")
            return
        taken: list[int] = []  # places in `order`, by this process, their matrices yet to come
        for index in walk.run(self.written, self.writer.layer_parameters, on_progress):
            self.team.publish(f"grams of {index}")
            reached = self.order.index(index)
            while reached + 1 - self.team.add("layers", 0) >= (1 if self.calibration.sequential else self.team.size):
                number = self.team.take_one("layers", len(self.order))
                taken += [] if number is None else [number]
            for number in [number for number in taken if number <= reached]:
                taken.remove(number)
                self.fit(self.order[number])
        for number in taken:
            self.fit(self.order[number])

    def _show(self, projection: str, error: float) -> None:
        self.progress.update(self.task, error=f"{projection} error {error:.3f}")


def calibration_walk(
    config: Config, source: SourceModel, calibration: Calibration, device: torch.device, console: Console
) -> CalibrationWalk | None:
    """The calibration layer by layer, or None where the whole model runs at once.

    That is so, with a word about it, for an architecture that does not fit.

    Raises:
        UserError: it does not fit, and the settings or the source leave no other way.
    """
    try:
        model = LayerwiseModel(source, config.model, device)
        if calibration.fisher_seed is not None:
            model.check_head()
    except DoesNotFit as reason:
        name = type(source.map.model).__name__
        if config.compression.calibration.sequential:
            raise UserError(
                f"{name} cannot be calibrated layer by layer ({reason}); set compression.calibration.sequential=false"
            ) from reason
        if source.dequantized:
            raise UserError(
                f"{name} cannot be calibrated layer by layer ({reason}), and {source.path} is quantized; "
                "set compression.calibration.enabled=false"
            ) from reason
        console.print(
            f"calibrating with the whole model in memory: {name} cannot be run layer by layer ({reason})",
            highlight=False,
            soft_wrap=True,
        )
        return None
    walk = CalibrationWalk if calibration.fisher_seed is None else FisherWalk
    return walk(model, calibration, [layer.experts for layer in source.map.layers])


def copy_others(writer: CheckpointWriter, progress: Progress, team: Team) -> None:
    """Copy shards of what is not an expert, as long as there are any that nobody else has taken."""
    task = progress.add_task("copying the rest", total=len(writer.copied), error="")
    for number in team.take("copies", len(writer.copied)):
        writer.copy_others(number)
        progress.update(task, completed=team.add("copies written"))


def progress_bars(console: Console) -> Progress:
    """The progress bars of a compression."""
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[error]}"),
        console=console,
    )
