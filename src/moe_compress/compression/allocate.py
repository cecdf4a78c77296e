"""Ranks chosen by measuring: one pass over the model gives every projection's error at every rank.

With a calibration the error is that of the outputs on its text, relative to their squares, or with Fisher information
(`compression.calibration.fisher`) that of the predictions, whose unit is the same for all layers; without one it is
that of the weights. A sequential calibration does not help here: what its layers see depends on how the earlier ones
were compressed, and so on the ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from moe_compress.compression.calibrate import GRAM_BYTES_AT_ONCE, Calibration, gram_bytes
from moe_compress.compression.layer import LayerSettings, LayerWork, layer_input
from moe_compress.compression.ranks import Ranks, choose_ranks, fixed_cores, projections_budget, value_width
from moe_compress.compression.source import SourceModel
from moe_compress.compression.walk import CalibrationWalk, Parameters
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.factorization import greedy_ranks
from moe_compress.files import fingerprint, write_json

Progress = Callable[[int, int], None]
Curves = dict[str, list[float]]  # projection to its error at every delta rank


def allocate_ranks(
    source: SourceModel,
    config: Config,
    file: Path,
    device: torch.device,
    on_layer: Progress = lambda done, total: None,
    calibration: Calibration | None = None,
    make_walk: Callable[[], CalibrationWalk | None] = lambda: None,
) -> Ranks:
    """The delta rank of every projection by `compression.allocation=greedy`, under the budget of the uniform choice.

    Args:
        file: JSON file that keeps the choice and the errors it expects; read instead of measuring again if it belongs
            to the same model and settings.
        on_layer: called with layers done and layers in all.
        calibration: on which outputs or predictions the errors are measured; None measures those of the weights.
        make_walk: takes the calibration through the model, see `calibration_walk`; None if it cannot.

    Raises:
        UserError: the budget cannot be reached; NaN or infinity in the weights.
    """
    settings = config.compression
    uniform = choose_ranks(source.map.layers, config)  # refuses what cannot be reached
    budget = projections_budget(source.map.layers, config, uniform)
    measured_by = {
        "source": source.checkpoint.fingerprint,
        "settings": [fixed_cores(config), settings.alignment],
        "calibration": None if calibration is None else [calibration.fingerprint, settings.calibration.shrinkage],
    }
    key = fingerprint(
        [measured_by, budget, settings.dtype, settings.rank_multiple, settings.parameterization],
    )
    kept = _read(file, key)
    if kept is not None:
        return kept
    if calibration is None:
        measured = _curves_of_weights(source, config, device)
    else:
        measured = _curves_of_outputs(source, config, device, calibration, make_walk, fingerprint(measured_by))
    names = {f"{module}.{projection}": (module, projection) for module, projection in uniform}
    shapes, curves = {}, {}
    for done, (index, by_projection) in enumerate(measured, 1):
        layer = source.map.layers[index]
        for projection, curve in by_projection.items():
            shapes[f"{layer.name}.{projection}"] = layer.experts.projections[projection]
            curves[f"{layer.name}.{projection}"] = curve
        on_layer(done, len(source.map.layers))
    found = greedy_ranks(
        curves,
        {name: shapes[name] for name in names},
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
            "error_of": _error_of(calibration),
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


def _error_of(calibration: Calibration | None) -> str:
    if calibration is None:
        return "weights"
    return "outputs" if calibration.fisher_seed is None else "predictions"


def _curves_of_weights(source: SourceModel, config: Config, device: torch.device) -> Iterator[tuple[int, Curves]]:
    for layer in source.map.layers:
        yield layer.index, _layer_curves(source, config, device, layer.index)


def _curves_of_outputs(
    source: SourceModel,
    config: Config,
    device: torch.device,
    calibration: Calibration,
    make_walk: Callable[[], CalibrationWalk | None],
    key: str,
) -> Iterator[tuple[int, Curves]]:
    """Index and curves of each layer; a killed run finds those it had measured beside the calibration's files.

    The Gram matrices stay for the fit where those of all layers take little, and are else collected once more then.
    """
    layers = source.map.layers

    def file(index: int) -> Path:
        return calibration.directory / f"curves-{index:05d}.json"

    def kept(index: int) -> Curves | None:
        if not file(index).is_file():
            return None
        facts = json.loads(file(index).read_text(encoding="utf-8"))
        return facts["curves"] if facts["made_by"] == key else None

    finished = {layer.index: curves for layer in layers if (curves := kept(layer.index)) is not None}
    yield from finished.items()
    missing = [layer.index for layer in layers if layer.index not in finished]
    if not missing:
        return
    walk = make_walk()
    if walk is None:
        unseen = [index for index in missing if not calibration.finished(index)]
        if unseen:
            calibration.run(unseen, device, lambda done, total: None)
    keep = walk is None or sum(gram_bytes(layer.experts) for layer in layers) <= GRAM_BYTES_AT_ONCE
    for index in missing if walk is None else walk.run(lambda index: index in finished, never_compressed):
        curves = _layer_curves(source, config, device, index, calibration)
        write_json(file(index), {"made_by": key, "curves": curves})
        if not keep:
            calibration.file(index).unlink()
        yield index, curves


def _layer_curves(
    source: SourceModel, config: Config, device: torch.device, index: int, calibration: Calibration | None = None
) -> Curves:
    """The error of each projection of a layer at every delta rank."""
    settings, layer = config.compression, source.map.layers[index]
    grams = None if calibration is None else calibration.load(index)
    given = layer_input(layer.experts, source.map.load(source.checkpoint, layer), grams)
    work = LayerWork(given, LayerSettings({}, {}, shrinkage=settings.calibration.shrinkage, device=device))
    if settings.alignment == "weights":
        work.align()
    return {projection: curve.tolist() for projection, curve in work.curves(fixed_cores(config)).items()}


def never_compressed(index: int) -> Parameters:
    """For walks that compress nothing on their way."""
    raise AssertionError(f"MoE layer {index} is not compressed")


def _read(file: Path, key: str) -> Ranks | None:
    if not file.is_file():
        return None
    try:
        facts: Any = json.loads(file.read_text(encoding="utf-8"))
        if facts["made_by"] != key:
            return None
        return {(entry["module"], entry["projection"]): entry["delta_rank"] for entry in facts["projections"].values()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged; delete it and run the same command again") from error
