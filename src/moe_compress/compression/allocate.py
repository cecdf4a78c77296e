"""Ranks chosen by measuring: one pass over the weights gives every projection's error at every rank.

The norm is that of the weights (after alignment), not of calibration data, whose errors have another unit in each
layer. With Fisher information (`compression.calibration.fisher`) all errors are errors of the predictions: then the
ranks are chosen by these, and the calibration runs before the ranks are known.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe_compress.compression.calibrate import Calibration
from moe_compress.compression.layer import LayerInput, LayerSettings, LayerWork, layer_input
from moe_compress.compression.ranks import Ranks, choose_ranks, fixed_cores, projections_budget, value_width
from moe_compress.compression.source import SourceModel
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.factorization import align_neurons, error_curve, greedy_ranks, permute_columns, permute_rows
from moe_compress.files import fingerprint, write_json


def allocate_ranks(
    source: SourceModel,
    config: Config,
    file: Path,
    device: torch.device,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
    calibration: Calibration | None = None,
) -> Ranks:
    """The delta rank of every projection by `compression.allocation=greedy`, under the budget of the uniform choice.

    Args:
        file: JSON file that keeps the choice and the errors it expects; read instead of measuring again if it belongs
            to the same model and settings.
        on_layer: called with layers (before, with batches of the calibration) done and in all.
        calibration: with Fisher information, to measure the errors of the predictions; None measures on the weights.

    Raises:
        UserError: the budget cannot be reached; NaN or infinity in the weights.
    """
    settings = config.compression
    uniform = choose_ranks(source.map.layers, config)  # refuses what cannot be reached
    budget = projections_budget(source.map.layers, config, uniform)
    key = fingerprint(
        {
            "source": source.checkpoint.fingerprint,
            "budget": budget,
            "dtype": settings.dtype,
            **({} if calibration is None else {"grams": [calibration.fingerprint, settings.calibration.shrinkage]}),
            "settings": [fixed_cores(config), settings.rank_multiple, settings.parameterization, settings.alignment],
        }
    )
    kept = _read(file, key)
    if kept is not None:
        return kept
    if calibration is not None:
        missing = [layer.index for layer in source.map.layers if not calibration.finished(layer.index)]
        if missing:
            calibration.run(missing, device, on_layer)
    names = {f"{module}.{projection}": (module, projection) for module, projection in uniform}
    shapes, curves = {}, {}
    for layer in source.map.layers:
        measured = layer_curves(
            layer_input(
                layer.experts,
                source.map.load(source.checkpoint, layer),
                None if calibration is None else calibration.load(layer.index),
            ),
            LayerSettings({}, {}, settings.alignment, settings.calibration.shrinkage, device),
            fixed_cores(config),
        )
        for projection, curve in measured.items():
            shapes[f"{layer.name}.{projection}"] = layer.experts.projections[projection]
            curves[f"{layer.name}.{projection}"] = curve.tolist()
        on_layer(layer.index + 1, len(source.map.layers))
    found = greedy_ranks(
        curves,
        shapes,
        budget=budget,
        cores=fixed_cores(config),
        bytes_per_value=value_width(source.map.layers, config),
        rank_multiple=settings.rank_multiple,
        parameterization=settings.parameterization,
    )
    write_json(
        file,
        {
            "made_by": key,
            "budget": budget,
            "projections": {
                name: {
                    "module": names[name][0],
                    "projection": names[name][1],
                    "delta_rank": rank,
                    "uniform_delta_rank": uniform[names[name]],
                    "expected_error": curves[name][rank],
                    "uniform_expected_error": curves[name][min(uniform[names[name]], len(curves[name]) - 1)],
                }
                for name, rank in found.items()
            },
        },
    )
    return {names[name]: rank for name, rank in found.items()}


def layer_curves(layer: LayerInput, settings: LayerSettings, cores: int) -> dict[str, Tensor]:
    """The error of each projection of a layer at every delta rank, see `error_curve`."""
    work = LayerWork(layer, settings)
    if settings.alignment == "weights":
        work.align()
    return {
        name: error_curve(
            weight, cores=cores, gram=work.shrunk(work.grams, name), out_gram=work.shrunk(work.out_grams, name)
        )
        for name, weight in work.weights.items()
    }


def aligned(weights: dict[str, Tensor], *, interleaved: bool) -> dict[str, Tensor]:
    """Both projections [E, out, in] of a layer with their neurons aligned over the experts."""
    up, down = weights  # in the order of the computation
    gates = 1 if up == "up_proj" else 2
    order = align_neurons(weights[up], weights[down], interleaved=interleaved, gates=gates)
    return {
        up: permute_rows(weights[up], order, interleaved=interleaved, gates=gates),
        down: permute_columns(weights[down], order),
    }


def _read(file: Path, key: str) -> Ranks | None:
    if not file.is_file():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts["made_by"] != key:
            return None
        return {(entry["module"], entry["projection"]): entry["delta_rank"] for entry in facts["projections"].values()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged; delete it and run the same command again") from error
