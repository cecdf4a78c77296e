"""Forms and ranks chosen by measuring: one pass over the model gives every projection's error in each form and rank.

With a calibration the error is that of the outputs on its text, relative to their squares, or with Fisher information
(`compression.calibration.fisher`) that of the predictions, whose unit is the same for all layers; without one it is
that of the weights. A sequential calibration does not help here: what its layers see depends on how the earlier ones
were compressed, and so on the ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moe_compress.compression.calibrate import GRAM_BYTES_AT_ONCE, Calibration
from moe_compress.compression.collect import gram_bytes
from moe_compress.compression.layer import LayerSettings, LayerWork, layer_input
from moe_compress.compression.ranks import Choices, budget_of, choose, forms_of, full_name
from moe_compress.compression.source import SourceModel
from moe_compress.compression.trials import Trials
from moe_compress.compression.walk import CalibrationWalk, Parameters
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.factorization import Choice, Form, greedy_choices, uniform_choices
from moe_compress.files import fingerprint, write_json

Progress = Callable[[int, int], None]
Curves = dict[str, dict[Form, list[float]]]  # projection to its error in each form at every delta rank


def allocate(
    source: SourceModel,
    config: Config,
    file: Path,
    device: torch.device,
    on_layer: Progress = lambda done, total: None,
    calibration: Calibration | None = None,
    make_walk: Callable[[], CalibrationWalk | None] = lambda: None,
) -> Choices:
    """What every projection becomes, under the budget of the uniform choice, by the errors measured.

    Of several forms (`compression.cores=auto`, `compression.input_basis=auto`) each projection takes what leaves the
    least error. Its bytes are the same share as those of the others, or with `compression.allocation=greedy` such that
    the sum of all errors is small.

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
    plain = choose(source.map.layers, config)  # refuses what cannot be reached
    budget = budget_of(source.map.layers, config, plain)
    forms = {key: forms_of(key[1], budget.shapes[full_name(key)], settings) for key in plain}
    measured_by = {
        "source": source.checkpoint.fingerprint,
        "settings": [[[asdict(form) for form in each] for each in forms.values()], settings.alignment],
        "calibration": None if calibration is None else [calibration.fingerprint, settings.calibration.shrinkage],
    }
    trials = None
    if calibration is not None and settings.allocation == "greedy" and settings.calibration.trials:
        names = [layer.name for layer in source.map.layers]
        trials = Trials(calibration, names, budget, fingerprint(measured_by), settings.calibration.trials)
    key = fingerprint([measured_by, settings.allocation, trials and trials.indices, asdict(budget)])
    kept = _read(file, key)
    if kept is not None:
        return kept
    if calibration is None:
        measured = _curves_of_weights(source, config, device)
    else:
        make_walk = cache(make_walk)
        measured = _curves_of_outputs(source, config, device, calibration, make_walk, fingerprint(measured_by), trials)
    curves: Curves = {}
    for done, (index, by_projection) in enumerate(measured, 1):
        layer = source.map.layers[index]
        curves |= {full_name((layer.name, projection)): by_form for projection, by_form in by_projection.items()}
        on_layer(done, len(source.map.layers))
    curves = {name: curves[name] for name in budget.shapes}
    effects = [1.0] * len(source.map.layers)
    if trials is not None:
        effects = trials.effects(make_walk(), device, on_layer)
    by_module = dict(zip((layer.name for layer in source.map.layers), effects, strict=True))
    weighed = {
        name: {form: [by_module[key[0]] * error for error in curve] for form, curve in curves[name].items()}
        for key in plain
        for name in [full_name(key)]
    }
    found = (greedy_choices if settings.allocation == "greedy" else uniform_choices)(weighed, budget)

    def error(name: str, choice: Choice) -> float:
        curve = curves[name][choice.form]
        return curve[min(choice.delta_rank, len(curve) - 1)]

    write_json(
        file,
        {
            "made_by": key,
            "error_of": _error_of(calibration),
            "budget": budget.total,
            "effects": effects,
            "projections": {
                name: {
                    "module": module,
                    "projection": projection,
                    **_facts(found[name]),
                    "expected_error": error(name, found[name]),
                    "uniform": {
                        **_facts(plain[module, projection]),
                        "expected_error": error(name, plain[module, projection]),
                    },
                }
                for module, projection in plain
                for name in [full_name((module, projection))]
            },
        },
    )
    return {key: found[full_name(key)] for key in plain}


def _facts(choice: Choice) -> dict[str, int]:
    return {**asdict(choice.form), "delta_rank": choice.delta_rank}


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
    trials: Trials | None,
) -> Iterator[tuple[int, Curves]]:
    """Index and curves of each layer; a killed run finds those it had measured beside the calibration's files.

    The Gram matrices stay for the fit where those of all layers take little, and are else collected once more then.
    """
    layers = source.map.layers

    def file(index: int) -> Path:
        return calibration.directory / f"curves-{index:05d}.json"

    def kept(index: int) -> Curves | None:
        if not file(index).is_file() or not (trials is None or trials.made(index)):
            return None
        facts = json.loads(file(index).read_text(encoding="utf-8"))
        if facts["made_by"] != key:
            return None
        return {
            projection: {Form(each["cores"], each["basis"]): each["errors"] for each in by_form}
            for projection, by_form in facts["curves"].items()
        }

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
    fisher = calibration.fisher_seed is not None
    keep = walk is None or sum(gram_bytes(layer.experts, fisher=fisher) for layer in layers) <= GRAM_BYTES_AT_ONCE
    for index in missing if walk is None else walk.run(lambda index: index in finished, never_compressed):
        curves = _layer_curves(source, config, device, index, calibration, trials)
        facts = {
            projection: [{**asdict(form), "errors": errors} for form, errors in by_form.items()]
            for projection, by_form in curves.items()
        }
        write_json(file(index), {"made_by": key, "curves": facts})
        if not keep:
            calibration.file(index).unlink()
        yield index, curves


def _layer_curves(
    source: SourceModel,
    config: Config,
    device: torch.device,
    index: int,
    calibration: Calibration | None = None,
    trials: Trials | None = None,
) -> Curves:
    """The error of each projection of a layer in each form that it may take, at every delta rank; and its trial."""
    settings, layer = config.compression, source.map.layers[index]
    grams = None if calibration is None else calibration.load(index)
    given = layer_input(layer.experts, source.map.load(source.checkpoint, layer), grams)
    work = LayerWork(given, LayerSettings({}, {}, shrinkage=settings.calibration.shrinkage, device=device))
    forms = {name: forms_of(name, layer.experts.projections[name], settings) for name in given.weights}
    if settings.alignment == "weights" and any(form.cores for tried in forms.values() for form in tried):
        work.align()
    curves = {
        name: {form: curve.tolist() for form, curve in work.curves(name, tried).items()}
        for name, tried in forms.items()
    }
    if trials is not None:
        trials.make(index, work, curves)
    return curves


def never_compressed(index: int) -> Parameters:
    """For walks that compress nothing on their way."""
    raise AssertionError(f"MoE layer {index} is not compressed")


def _read(file: Path, key: str) -> Choices | None:
    if not file.is_file():
        return None
    try:
        facts: Any = json.loads(file.read_text(encoding="utf-8"))
        if facts["made_by"] != key:
            return None
        return {
            (entry["module"], entry["projection"]): Choice(Form(entry["cores"], entry["basis"]), entry["delta_rank"])
            for entry in facts["projections"].values()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged; delete it and run the same command again") from error
