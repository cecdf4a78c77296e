"""The `compress` stage: from the source checkpoint to `checkpoint-0`, one MoE layer in memory at a time, resumable, by
any number of processes."""

from __future__ import annotations

import errno
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moe_compress.compression.allocate import allocate
from moe_compress.compression.calibrate import Calibration
from moe_compress.compression.card import inherited, model_card, read_metadata, write_card
from moe_compress.compression.job import Job, calibration_walk, copy_others, progress_bars
from moe_compress.compression.layer import LayerSettings
from moe_compress.compression.plan_table import print_plan
from moe_compress.compression.planning import Plan, check_disk, check_plan, make_plan
from moe_compress.compression.ranks import Choices, stored_dtype
from moe_compress.compression.source import SourceModel, open_model
from moe_compress.compression.workers import Team
from moe_compress.compression.writer import CheckpointWriter, LayerRecord
from moe_compress.config import Config
from moe_compress.errors import UserError, first_line
from moe_compress.factorization import FitSpec
from moe_compress.files import directory_in_progress, fingerprint, write_json
from moe_compress.run import Run

STAGE = "compress"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHARD_FORMAT = 5  # part of what a shard was made by: raise it when the same settings give other tensors


def compress(run: Run) -> None:
    """Compress the model of a run into `RUN/checkpoints/checkpoint-0` and write `RUN/compression.json`.

    Does nothing if it is done; continues after the last finished layer if it was interrupted, and then gives the same
    bytes as an uninterrupted run. Under torchrun the layers are divided among the processes; any number of them gives
    the same bytes.

    Raises:
        UserError: the model cannot be compressed, or not with these settings; nothing is written then.
    """
    console = Console()
    if run.finished(STAGE):
        console.print(f"compress: finished already, see {run.checkpoint(0)}", highlight=False, soft_wrap=True)
        return
    team = Team(f"{STAGE} {run.path}")
    with team.together():
        with run.stage(STAGE):
            try:
                _compress(run, team, console)
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise
                raise UserError(
                    f"the disk of {run.path} is full; free some and run the same command again, which continues"
                ) from error
        if team.leads:
            team.publish("finished")  # with all that the manifest says of it
        team.wait("finished")


def _compress(run: Run, team: Team, console: Console) -> None:
    """The part of one process."""
    target, calibration_dir = run.checkpoint(0), run.path / "calibration"
    if not team.leads:
        team.wait("planned")  # what is wrong with the model or the settings is told once, by the leader
    source = open_model(run.config.model)

    def checked(choices: Choices | None = None) -> Plan:
        plan = make_plan(source, run.config, choices)
        if team.leads:
            check_plan(plan)
            if not target.exists():
                check_disk(plan, target, [target.parent, calibration_dir])
        return plan

    plan = checked()  # before anything is measured, which takes long
    calibration = None
    if run.config.compression.calibration.enabled:
        calibration = Calibration(run.config, source.path, source.checkpoint.fingerprint, calibration_dir)
    if plan.provisional:
        plan = checked(_allocate(run, source, calibration, fit_device(run.config, team.local_rank), console))
    if team.leads:
        print_plan(plan, console)
        team.publish("planned")
    facts = compress_model(source, plan, run.config, target, calibration, console, team)
    if facts is not None:
        write_json(run.path / "compression.json", facts)
        run.record(STAGE, source=str(source.path), source_fingerprint=source.checkpoint.fingerprint, **facts["totals"])
        shutil.rmtree(calibration_dir, ignore_errors=True)


def _allocate(
    run: Run, source: SourceModel, calibration: Calibration | None, device: torch.device, console: Console
) -> Choices:
    """Measure how to divide the budget, or read what was measured before."""
    if calibration is not None and calibration.sequential:  # sees layers that are compressed already
        calibration = None
    with progress_bars(console) as progress:
        task = progress.add_task("measuring errors", total=None, error="")
        choices = allocate(
            source,
            run.config,
            run.path / "allocation.json",
            device,
            lambda done, total: progress.update(task, completed=done, total=total),
            calibration,
            lambda: None if calibration is None else calibration_walk(run.config, source, calibration, device, console),
        )
    for file in (run.path / "calibration").glob("trial-*"):  # what they told is kept in allocation.json
        file.unlink(missing_ok=True)
    return choices


def compress_model(
    source: SourceModel,
    plan: Plan,
    config: Config,
    target: Path,
    calibration: Calibration | None,
    console: Console,
    team: Team | None = None,
) -> dict[str, Any] | None:
    """Write the compressed checkpoint `target`, keeping what an interrupted attempt with the same settings left.

    Args:
        calibration: on whose text the errors count; None fits on the weights alone.
        team: the processes that divide the work; each calls this function.

    Returns:
        The content of `compression.json`, see `report_facts`; None for those that do not lead.
    """
    team = team or Team(f"{STAGE} {target}")
    device = fit_device(config, team.local_rank)
    if target.exists() and not team.leads:
        return None
    settings = [layer_settings(source, plan, config, index, device) for index in range(len(plan.layers))]
    keys = _keys(source, plan, settings, calibration)
    if target.exists():
        # Killed after the rename: all that is left to do is to report.
        return report_facts(source, plan, config, _records(CheckpointWriter(target, source), keys))
    with ExitStack() as stack:
        if team.leads:
            target.parent.mkdir(parents=True, exist_ok=True)
            directory = stack.enter_context(directory_in_progress(target, keep=True))
            writer = CheckpointWriter(directory, source)
            writer.clean()
            team.publish("directory", str(directory))
        else:
            writer = CheckpointWriter(Path(team.wait("directory")), source)
        progress = stack.enter_context(progress_bars(console))
        job = Job(source, settings, keys, calibration, writer, progress, team)
        if calibration is not None and team.leads:
            job.calibrate_and_fit(lambda: calibration_walk(config, source, calibration, device, console), device)
        job.fit_layers()
        copy_others(writer, progress, team)
        team.arrive("done")
        if not team.leads:
            return None
        records = _records(writer, keys)
        written = writer.finish(plan, records)
        if written != plan.after.bytes:
            raise RuntimeError(f"{written} bytes were written where the plan says {plan.after.bytes}")
        facts = report_facts(source, plan, config, records)
        metadata = inherited(read_metadata(source.path), plan.model)
        write_card(directory, model_card(facts, metadata, title=config.experiment_name))
    return facts


def layer_settings(source: SourceModel, plan: Plan, config: Config, index: int, device: torch.device) -> LayerSettings:
    """How the layer `index` is compressed."""
    settings = config.compression
    layer = source.map.layers[index]
    specs = {
        projection.name: FitSpec(
            method=settings.method,
            parameterization=settings.parameterization,
            delta_rank=projection.delta_rank,
            cores=projection.form.cores,
            basis=projection.form.basis,
            iterations=settings.iterations,
            num_steps=settings.num_steps,
            lr=settings.lr,
            seed=config.seed,
        )
        for projection in plan.layers[index].projections
    }
    dtypes = {name: stored_dtype(layer, name, config) for name in layer.dtypes}
    return LayerSettings(specs, dtypes, settings.alignment, settings.calibration.shrinkage, device)


def fit_device(config: Config, local_rank: int = 0) -> torch.device:
    """The device to calibrate and fit on: with `auto`, each process of a machine takes its own GPU.

    Raises:
        UserError: compression.device names no device of this machine.
    """
    name = config.compression.device
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # The command line has made the GPUs of gpu_ids the only ones there are, numbered from 0.
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"compression.device={name} cannot be used: {first_line(error)}") from error
    return device


def report_facts(source: SourceModel, plan: Plan, config: Config, records: list[LayerRecord]) -> dict[str, Any]:
    """What `compression.json` holds.

    Returns:
        `layers`: by module name, `projections` (by name: `relative_error`, `data_error`, `delta_rank`, `cores`,
        `basis`, `shape` [E, out, in], `bytes_before`, `bytes`) and `load` (tokens per expert in the calibration, or
        None);
        `totals`: `bytes_*`, `expert_bytes_*`, `parameters_*`, `expert_parameters_*`, `active_parameters_*` and
        `flops_per_token_*`, each `_before` and `_after`, and `ratio`; and the settings that tell fits apart.
    """
    layers = {
        layer.name: {
            "projections": {
                p.name: {
                    **record.errors[p.name],
                    "delta_rank": p.delta_rank,
                    "cores": p.form.cores,
                    "basis": p.form.basis,
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


def _records(writer: CheckpointWriter, keys: list[str]) -> list[LayerRecord]:
    """What is known of every layer, all of which must be written.

    Raises:
        UserError: a layer of a finished checkpoint was made by other settings.
    """
    records = [writer.record(index, key) for index, key in enumerate(keys)]
    complete = [record for record in records if record is not None]
    if len(complete) < len(records):
        raise UserError(f"{writer.directory} exists and was made by other settings; choose another run=PATH")
    return complete


def _keys(source: SourceModel, plan: Plan, settings: list[LayerSettings], calibration: Calibration | None) -> list[str]:
    """What identifies the tensors of each layer; in a sequential calibration, all layers before it belong to that."""
    keys: list[str] = []
    for index, layer in enumerate(plan.layers):
        if calibration is not None and calibration.sequential and keys:
            calibration.follow(index, keys[-1])
        grams = None if calibration is None else calibration.key(index)
        keys.append(_made_by(source, layer.name, settings[index], grams))
    return keys


def _made_by(source: SourceModel, name: str, settings: LayerSettings, grams: str | None) -> str:
    """A hash of everything that decides the tensors of a layer's shard."""
    return fingerprint(
        {
            "format": _SHARD_FORMAT,
            "source": source.checkpoint.fingerprint,
            "layer": name,
            "specs": {projection: asdict(spec) for projection, spec in settings.specs.items()},
            "dtypes": {name: str(dtype) for name, dtype in settings.dtypes.items()},
            "alignment": settings.alignment,
            "shrinkage": settings.shrinkage if grams is not None else None,
            "calibration": grams,
        }
    )
