"""What a model's experts have to share, measured before any compression: `moe-compress inspect`.

Per layer and projection: the share of the energy (squared norm) in the mean of the experts before and after their
neurons are aligned, the spectrum of what the mean leaves, and the error at equal bytes with and without a shared core.
With calibration, also how the router divides tokens among the experts. One layer is in memory at a time.
"""

from __future__ import annotations

import math
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from moe_compress.compression.allocate import never_compressed
from moe_compress.compression.calibrate import Calibration
from moe_compress.compression.inspect_views import print_inspection, write_plots
from moe_compress.compression.job import calibration_walk, progress_bars
from moe_compress.compression.layer import LayerInput, LayerSettings, LayerWork, layer_input
from moe_compress.compression.pipeline import fit_device
from moe_compress.compression.ranks import more_cores
from moe_compress.compression.source import SourceModel, open_model
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.factorization import Form, error_curve, rank_within
from moe_compress.factorization.budget import Shape
from moe_compress.files import directory_in_progress, write_json

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)


def inspect(config: Config, output: Path) -> dict[str, Any]:
    """Measure a model, print a table, and write `inspection.json` and plots into the new directory `output`.

    Returns:
        What `inspection.json` holds, see `measure`.

    Raises:
        UserError: the output exists; the model cannot be compressed.
    """
    if output.exists():
        raise UserError(f"{output} exists already; choose another directory with --output")
    console = Console()
    source = open_model(config.model)
    with directory_in_progress(output) as directory:
        facts = measure(source, config, console, directory / "calibration")
        write_json(directory / "inspection.json", facts)
        write_plots(facts, directory)
    print_inspection(facts, console)
    console.print(f"Plots and inspection.json are in {output}", highlight=False, soft_wrap=True)
    return facts


def measure(source: SourceModel, config: Config, console: Console, scratch: Path) -> dict[str, Any]:
    """All measures of a model.

    Args:
        scratch: a directory for files, which is removed.

    Returns:
        `model`, `architecture` and `layers`: by module name, `projections` (by name, see `measure_layer`) and `load`
        (tokens per expert, None without calibration).
    """
    device = fit_device(config)
    loads: dict[int, list[int]] = {}
    if config.compression.calibration.enabled:
        loads = routing_load(source, config, device, console, scratch)
        shutil.rmtree(scratch)
    layers = {}
    for layer in track(source.map.layers, "inspecting layers", console=console):
        given = layer_input(layer.experts, source.map.load(source.checkpoint, layer))
        weights = {name: weight.to(device) for name, weight in given.weights.items()}
        layers[layer.name] = {
            "projections": measure_layer(weights, interleaved=given.interleaved),
            "load": loads.get(layer.index),
        }
    return {"model": config.model.name, "architecture": type(source.map.model).__name__, "layers": layers}


def measure_layer(weights: dict[str, Tensor], *, interleaved: bool) -> dict[str, dict[str, Any]]:
    """What the experts of one layer share.

    Args:
        weights: `gate_up_proj` (or `up_proj`), then `down_proj`, each [E, out, in].
        interleaved: layout of the rows of gate_up, see `align_neurons`.

    Returns:
        By projection: `shape`; `core_energy_before` and `core_energy_after`, the share of the squared norm in the mean
        of the experts, before and after alignment (1 / E for experts that have nothing in common); `residual_energy`,
        delta rank to the share of the norm of what the (aligned) mean leaves that deltas of this rank hold; and
        `error_with_core`, `error_without_core`, for many experts `error_with_2_cores`, `error_with_4_cores`, and for
        the projection that reads the hidden states `error_with_basis` (half of their size, no core): share of the bytes
        kept to the relative squared error that is left, or None where it cannot be reached.
    """
    device = next(iter(weights.values())).device
    work = LayerWork(LayerInput("", weights, {}, interleaved), LayerSettings({}, {}, device=device))
    work.align()
    after = work.weights
    found = {}
    for name, weight in weights.items():
        experts, rows, columns = weight.shape
        shape = (experts, rows, columns)
        with_core = error_curve(after[name], Form(1))
        without_core = error_curve(weight, Form(0))  # the order of the neurons changes nothing here
        ranks = _powers_of_two(min(rows, columns))
        rest = max(float(with_core[0]), torch.finfo(torch.float32).tiny)
        found[name] = {
            "shape": list(shape),
            "core_energy_before": 1 - float(error_curve(weight, Form(1))[0]),
            "core_energy_after": 1 - float(with_core[0]),
            "residual_energy": {str(rank): 1 - float(with_core[rank]) / rest for rank in ranks},
            "error_with_core": errors_at(with_core, shape, Form(1)),
            "error_without_core": errors_at(without_core, shape, Form(0)),
        }
        for cores in more_cores(experts, "groups"):
            curve = error_curve(after[name], Form(cores))
            found[name][f"error_with_{cores}_cores"] = errors_at(curve, shape, Form(cores))
        if name != "down_proj":
            form = Form(0, max(1, columns // 2))
            found[name]["error_with_basis"] = errors_at(error_curve(weight, form), shape, form)
    return found


def errors_at(curve: Tensor, shape: Shape, form: Form) -> dict[str, float | None]:
    """The error of a curve at each of `RATIOS`."""
    return {str(ratio): error_at(curve, shape, ratio, form) for ratio in RATIOS}


def error_at(curve: Tensor, shape: Shape, ratio: float, form: Form) -> float | None:
    """The error of a curve (see `error_curve`) at the largest rank that keeps at most a share of the bytes."""
    rank = rank_within(shape, math.floor(ratio * math.prod(shape) + 1e-9), form=form, bytes_per_value=1)
    return float(curve[rank]) if rank else None


def routing_load(
    source: SourceModel, config: Config, device: torch.device, console: Console, scratch: Path
) -> dict[int, list[int]]:
    """Run the calibration text through the model, layer by layer, and count the tokens of each expert.

    Returns:
        Index of the MoE layer to tokens per expert [E].
    """
    config = deepcopy(config)
    config.compression.calibration.sequential = False  # nothing is compressed here
    config.compression.calibration.fisher = False
    calibration = Calibration(config, source.path, source.checkpoint.fingerprint, scratch, counts_only=True)
    walk = calibration_walk(config, source, calibration, device, console)
    layers = [layer.index for layer in source.map.layers]
    with progress_bars(console) as progress:
        task = progress.add_task("counting tokens", total=None, error="")

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        if walk is None:
            calibration.run(layers, device, show)
        else:
            for _ in walk.run(lambda index: False, never_compressed, show):
                pass
    return {index: calibration.load(index).tokens.tolist() for index in layers}


def _powers_of_two(limit: int) -> list[int]:
    return [*(2**power for power in range(limit.bit_length()) if 2**power < limit), limit]
