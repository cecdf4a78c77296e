"""The `compress` stage: from the source checkpoint to `checkpoint-0`, one MoE layer in memory at a time, resumable."""

from __future__ import annotations

import errno
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moe_compress.compression.allocate import Ranks, allocate_ranks
from moe_compress.compression.calibrate import Calibration
from moe_compress.compression.layer import LayerSettings, fit_layer, layer_input
from moe_compress.compression.plan_table import print_plan
from moe_compress.compression.planning import Plan, check_disk, check_plan, make_plan
from moe_compress.compression.ranks import stored_dtype
from moe_compress.compression.source import SourceModel, open_model
from moe_compress.compression.writer import CheckpointWriter, LayerRecord
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.factorization import FitSpec
from moe_compress.files import directory_in_progress, fingerprint, write_json
from moe_compress.run import Run, rank

STAGE = "compress"
_SHARD_FORMAT = 1  # part of what a shard was made by: raise it when the same settings give other tensors


def compress(run: Run) -> None:
    """Compress the model of a run into `RUN/checkpoints/checkpoint-0` and write `RUN/compression.json`.

    Does nothing if it is done; continues after the last finished layer if it was interrupted, and then gives the same
    bytes as an uninterrupted run.

    Raises:
        UserError: the model cannot be compressed, or not with these settings; nothing is written then.
    """
    if rank() != 0:  # one process does all; the others of torchrun would write the same files
        return
    console = Console()
    if run.finished(STAGE):
        console.print(f"compress: finished already, see {run.checkpoint(0)}", highlight=False, soft_wrap=True)
        return
    with run.stage(STAGE):
        source = open_model(run.config.model)
        ranks = None
        if run.config.compression.allocation == "greedy":
            ranks = _allocate(run, source, fit_device(run.config), console)
        plan = make_plan(source, run.config, ranks)
        check_plan(plan)
        target = run.checkpoint(0)
        if not target.exists():
            check_disk(plan, target, _size_below(target.parent) + _size_below(_calibration_dir(run)))
        print_plan(plan, console)
        try:
            facts = compress_model(source, plan, run.config, target, _calibration_dir(run), console)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"the disk of {run.path} is full; free some and run the same command again, which continues"
            ) from error
        write_json(run.path / "compression.json", facts)
        run.record(STAGE, source=str(source.path), source_fingerprint=source.checkpoint.fingerprint, **facts["totals"])
        shutil.rmtree(_calibration_dir(run), ignore_errors=True)


def _allocate(run: Run, source: SourceModel, device: torch.device, console: Console) -> Ranks:
    """Measure how to divide the budget, or read what was measured before."""
    with _progress(console) as progress:
        task = progress.add_task("measuring errors", total=None, error="")
        file = run.path / "allocation.json"
        return allocate_ranks(
            source, run.config, file, device, lambda done, total: progress.update(task, completed=done, total=total)
        )


def compress_model(
    source: SourceModel, plan: Plan, config: Config, target: Path, calibration_dir: Path, console: Console
) -> dict[str, Any]:
    """Write the compressed checkpoint `target`, keeping what an interrupted attempt with the same settings left.

    Args:
        calibration_dir: where the Gram matrices are cached.

    Returns:
        The content of `compression.json`, see `report_facts`.
    """
    device = fit_device(config)
    calibration = None
    if config.compression.calibration.enabled:
        calibration = Calibration(config, source.path, source.checkpoint.fingerprint, calibration_dir)
    with ExitStack() as stack:
        finished = target.exists()
        directory = target
        if not finished:
            target.parent.mkdir(parents=True, exist_ok=True)
            directory = stack.enter_context(directory_in_progress(target, keep=True))
        writer = CheckpointWriter(directory, source)
        settings = [layer_settings(source, plan, config, index, device) for index in range(len(plan.layers))]
        keys = [
            _made_by(source, plan.layers[index].name, settings[index], calibration) for index in range(len(settings))
        ]
        records = [writer.record(index, key) for index, key in enumerate(keys)]
        if finished:
            # Killed after the rename: all that is left to do is to report.
            complete = [record for record in records if record is not None]
            if len(complete) < len(records):
                raise UserError(f"{target} exists and was made by other settings; choose another run=PATH")
            return report_facts(source, plan, config, complete)
        writer.clean()
        progress = stack.enter_context(_progress(console))
        if calibration is not None:
            _calibrate(calibration, [index for index, record in enumerate(records) if record is None], device, progress)
        complete = _fit_layers(source, settings, keys, records, calibration, writer, progress)
        task = progress.add_task("copying the rest", total=len(writer.copied), error="")
        writer.copy_others(lambda _: progress.advance(task))
        written = writer.finish(plan)
        if written != plan.after.bytes:
            raise RuntimeError(f"{written} bytes were written where the plan says {plan.after.bytes}")
    return report_facts(source, plan, config, complete)


def layer_settings(source: SourceModel, plan: Plan, config: Config, index: int, device: torch.device) -> LayerSettings:
    """How the layer `index` is compressed."""
    settings = config.compression
    layer = source.map.layers[index]
    specs = {
        projection.name: FitSpec(
            method=settings.method,  # type: ignore[arg-type]
            parameterization=settings.parameterization,  # type: ignore[arg-type]
            delta_rank=projection.delta_rank,
            cores=projection.cores,  # type: ignore[arg-type]
            iterations=settings.iterations,
            num_steps=settings.num_steps,
            lr=settings.lr,
            seed=config.seed,
        )
        for projection in plan.layers[index].projections
    }
    dtypes = {name: stored_dtype(layer, name, config) for name in layer.dtypes}
    return LayerSettings(specs, dtypes, settings.alignment, settings.calibration.shrinkage, device)


def fit_device(config: Config) -> torch.device:
    """The device to calibrate and fit on.

    Raises:
        UserError: compression.device names no device of this machine.
    """
    name = config.compression.device
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", config.gpu_ids[0] if config.gpu_ids else 0)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"compression.device={name} cannot be used: {reason}") from error
    return device


def report_facts(source: SourceModel, plan: Plan, config: Config, records: list[LayerRecord]) -> dict[str, Any]:
    """What `compression.json` holds.

    Returns:
        `layers`: by module name, `projections` (by name: `relative_error`, `data_error`, `delta_rank`, `cores`, `shape`
        [E, out, in], `bytes_before`, `bytes`) and `load` (tokens per expert in the calibration, or None);
        `totals`: `bytes_*`, `expert_bytes_*`, `parameters_*`, `expert_parameters_*`, `active_parameters_*` and
        `flops_per_token_*`, each `_before` and `_after`, and `ratio`; and the settings that tell fits apart.
    """
    layers = {
        layer.name: {
            "projections": {
                p.name: {
                    **record.errors[p.name],
                    "delta_rank": p.delta_rank,
                    "cores": p.cores,
                    "shape": [p.experts, p.rows, p.columns],
                    "bytes_before": p.bytes_before,
                    "bytes": p.bytes_after,
                }
                for p in layer.projections
            },
            "load": record.load,
        }
        for layer, record in zip(plan.layers, records, strict=True)
    }
    before, after = asdict(plan.before), asdict(plan.after)
    totals = {f"{key}_{when}": size[key] for key in before for when, size in (("before", before), ("after", after))}
    settings = config.compression
    return {
        "model": plan.model,
        "architecture": plan.architecture,
        "source_fingerprint": source.checkpoint.fingerprint,
        "method": settings.method,
        "parameterization": plan.parameterization,
        "alignment": settings.alignment,
        "calibrated": plan.calibrated,
        "layers": layers,
        "totals": {**totals, "ratio": plan.ratio},
    }


def _fit_layers(
    source: SourceModel,
    settings: list[LayerSettings],
    keys: list[str],
    records: list[LayerRecord | None],
    calibration: Calibration | None,
    writer: CheckpointWriter,
    progress: Progress,
) -> list[LayerRecord]:
    """Fit and write the layers that have no record yet; the records of all."""
    task = progress.add_task("fitting layers", total=len(records), error="")
    complete = []
    for layer in source.map.layers:
        record = records[layer.index]
        if record is None:

            def show(projection: str, error: float) -> None:
                progress.update(task, error=f"{projection} error {error:.3f}")

            grams = None if calibration is None else calibration.load(layer.index)
            tensors = source.map.load(source.checkpoint, layer)
            result = fit_layer(layer_input(layer.experts, tensors, grams), settings[layer.index], show)
            del tensors, grams
            record = writer.write_layer(layer.index, result, keys[layer.index])
        complete.append(record)
        progress.advance(task)
    return complete


def _calibrate(calibration: Calibration, layers: list[int], device: torch.device, progress: Progress) -> None:
    pending = [index for index in layers if not calibration.finished(index)]
    if pending:
        task = progress.add_task("calibrating", total=None, error=f"{calibration.rows.size:,} tokens")
        calibration.run(pending, device, lambda done, total: progress.update(task, completed=done, total=total))


def _made_by(source: SourceModel, name: str, settings: LayerSettings, calibration: Calibration | None) -> str:
    """A hash of everything that decides the tensors of a layer's shard."""
    return fingerprint(
        {
            "format": _SHARD_FORMAT,
            "source": source.checkpoint.fingerprint,
            "layer": name,
            "specs": {projection: asdict(spec) for projection, spec in settings.specs.items()},
            "dtypes": {name: str(dtype) for name, dtype in settings.dtypes.items()},
            "alignment": settings.alignment,
            "shrinkage": settings.shrinkage if calibration is not None else None,
            "calibration": calibration.fingerprint if calibration is not None else None,
        }
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[error]}"),
        console=console,
    )


def _calibration_dir(run: Run) -> Path:
    return run.path / "calibration"


def _size_below(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
