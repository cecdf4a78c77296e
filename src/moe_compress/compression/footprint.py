"""Expected peak memory and disk of a compression: what is held at once, stage by stage, counted from headers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from moe_compress.compression.calibrate import GRAM_BYTES_AT_ONCE
from moe_compress.compression.layerwise import DoesNotFit, compute_dtype, layer_list
from moe_compress.compression.ranks import more_cores
from moe_compress.compression.source import SourceModel
from moe_compress.config import CalibrationConfig, Config
from moe_compress.factorization.grams import CHUNK_BYTES

if TYPE_CHECKING:
    from moe_compress.compression.planning import LayerPlan, ProjectionPlan

_LIBRARY_BYTES = 600 << 20  # interpreter, PyTorch and Transformers
_TEMPORARIES = 8  # over a chunk of experts, in a step of a fit


def peak_stages(source: SourceModel, config: Config, layers: list[LayerPlan]) -> dict[str, int]:
    """Expected peak of main memory in each stage, `fit` and `calibration`, of the process that leads."""
    settings = config.compression.calibration
    fit = max(max(_reading(layer), _fitting(layer, settings, config.compression.cores)) for layer in layers)
    if not settings.enabled:
        return {"fit": _LIBRARY_BYTES + fit}
    grams = [layer.gram_bytes for layer in layers]
    width = compute_dtype(source, config.model).itemsize
    try:
        outside, largest = _parameters(source.map.model, [layer.name for layer in layers], settings)
    except DoesNotFit:  # then with the whole model in memory, which is gone when the fits begin
        everything = width * sum(parameter.numel() for parameter in source.map.model.parameters())
        at_once = min(sum(grams), max(GRAM_BYTES_AT_ONCE, *grams))
        return {"fit": _LIBRARY_BYTES + fit, "calibration": _LIBRARY_BYTES + everything + at_once}
    batch = 32 * settings.batch_size * settings.dataset.max_length * _hidden_size(source)  # a few activations in fp32
    # A layer's experts are there twice while they are joined; the sums are made after that.
    joining = max(max(projection.bytes_before for projection in layer.projections) for layer in layers)
    walk = outside * width + largest * width + max(2 * joining, max(grams) + batch)
    # The layers are fitted while the walk waits, which keeps what lies outside of them.
    return {"fit": _LIBRARY_BYTES + outside * width + fit, "calibration": _LIBRARY_BYTES + walk}


def disk_needed(source: SourceModel, config: Config, layers: list[LayerPlan], result: int) -> int:
    """Disk needed while a compression runs: its result, and what the calibration keeps.

    That is the Gram matrices of as many layers as there are processes (more wait for nobody), and the hidden states
    before and after a layer, counted where `max_samples` says how much text there is.

    Args:
        result: bytes of the compressed checkpoint.
    """
    settings = config.compression.calibration
    if not settings.enabled:
        return result
    grams = sorted((layer.gram_bytes for layer in layers), reverse=True)
    held = sum(grams[: int(os.environ.get("WORLD_SIZE", "1"))])
    greedy = config.compression.allocation == "greedy" and not settings.sequential
    if greedy and sum(grams) <= GRAM_BYTES_AT_ONCE:
        held = sum(grams)  # kept from measuring to fitting
    try:
        _parameters(source.map.model, [layer.name for layer in layers], settings)
    except DoesNotFit:
        return result + sum(grams)
    tokens = (settings.dataset.max_samples or 0) * settings.dataset.max_length
    states = 2 * tokens * _hidden_size(source) * compute_dtype(source, config.model).itemsize
    return result + held + states


def _reading(layer: LayerPlan) -> int:
    """While a layer is read: one projection as it is on disk, stacked and joined, beside those that are done."""
    done = peak = 0
    for projection in layer.projections:
        peak = max(peak, done + 3 * projection.bytes_before)
        done += projection.bytes_before
    return layer.bias_bytes_before + peak


def _fitting(layer: LayerPlan, settings: CalibrationConfig, cores: int | str) -> int:
    """While a layer is fitted: its weights as read and with their neurons permuted, factors in fp32, temporaries."""
    weights = 2 * layer.bytes_before
    factors = sum(4 * projection.parameters_after for projection in layer.projections)
    working = []
    for projection in layer.projections:
        one = 4 * projection.rows * projection.columns
        chunk = min(max(CHUNK_BYTES, one), 4 * projection.parameters_before)
        gram = _gram(projection, projection.columns) * settings.enabled
        gram += _gram(projection, projection.rows) * settings.fisher
        grouped = projection.bytes_before + 2 * gram if _may_group(projection, cores) else 0  # the experts of a group
        # Shrunk, then scaled and damped, and their roots.
        working.append(_TEMPORARIES * chunk + 3 * gram + grouped)
    up, down = layer.projections
    grams = (layer.gram_bytes + _gram(down, down.columns)) * settings.enabled  # that of the neurons is permuted
    grams += _gram(up, up.rows) * settings.fisher
    return weights + factors + grams + max(working)


def _may_group(projection: ProjectionPlan, cores: int | str) -> bool:
    return projection.form.cores > 1 or (cores == "auto" and bool(more_cores(projection.experts)))


def _gram(projection: ProjectionPlan, features: int) -> int:
    return 4 * projection.experts * features**2


def _parameters(model: Any, experts: list[str], settings: CalibrationConfig) -> tuple[int, int]:
    """The number of parameters of the base model outside its decoder layers, and of the largest of these.

    Raises:
        DoesNotFit: the experts are not in one list of layers, or the calibration also runs backward.
    """
    if settings.fisher:
        raise DoesNotFit("gradients go through all layers at once")
    layers = model.get_submodule(layer_list(model, experts))
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    inside = {id(parameter) for parameter in layers.parameters()}
    outside = sum(parameter.numel() for parameter in model.base_model.parameters() if id(parameter) not in inside)
    return outside, max(sizes)


def _hidden_size(source: SourceModel) -> int:
    embedding: Any = source.map.model.get_input_embeddings()
    return int(embedding.weight.shape[1])
