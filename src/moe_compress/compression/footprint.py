"""Expected peak memory and disk of a compression: what is held at once, stage by stage, counted from headers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from moe_compress.compression.backward import LOGITS_BYTES
from moe_compress.compression.calibrate import GRAM_BYTES_AT_ONCE
from moe_compress.compression.layerwise import DoesNotFit, compute_dtype, layer_list, picks_positions
from moe_compress.compression.ranks import more_cores
from moe_compress.compression.source import SourceModel
from moe_compress.compression.trials import rows_on_trial
from moe_compress.config import CalibrationConfig, Config
from moe_compress.factorization.grams import CHUNK_BYTES
from moe_compress.torchrun import world_size

if TYPE_CHECKING:
    from moe_compress.compression.planning import LayerPlan, ProjectionPlan

_LIBRARY_BYTES = 600 << 20  # interpreter, PyTorch and Transformers
# oneDNN compiles a kernel for each number of tokens that an expert gets and keeps 1,024 of them: measured on a CPU, in
# bfloat16 and there and back.
_KERNELS_BYTES = 400 << 20
_TEMPORARIES = 8  # over a chunk of experts, in a step of a fit
_LOGITS_COPIES = 7  # of logits in fp32: logarithms, probabilities, cumulative sums, gradients of some of these


def peak_stages(source: SourceModel, config: Config, layers: list[LayerPlan]) -> dict[str, int]:
    """Expected peak of main memory in each stage, `fit` and `calibration`, of the process that leads."""
    settings = config.compression.calibration
    fit = max(max(_reading(layer), _fitting(layer, settings, config.compression.cores)) for layer in layers)
    if not settings.enabled:
        return {"fit": _LIBRARY_BYTES + fit}
    grams = [layer.gram_bytes for layer in layers]
    model, width = source.map.model, compute_dtype(source, config.model).itemsize
    tokens, length = settings.batch_size * settings.dataset.max_length, settings.dataset.max_length
    logits = 4 * model.config.get_text_config().vocab_size  # of one token, in fp32
    kernels = _KERNELS_BYTES if settings.fisher and width < 4 else 0
    try:
        parts = _parts(model, [layer.name for layer in layers])
    except DoesNotFit:  # then with the whole model in memory, which is gone when the fits begin
        whole = width * sum(parameter.numel() for parameter in model.parameters())
        whole += min(sum(grams), max(GRAM_BYTES_AT_ONCE, *grams))
        if settings.fisher:
            whole += tokens * (_kept(model, model, layers, width, length) + _LOGITS_COPIES * logits)
        return {"fit": _LIBRARY_BYTES + fit, "calibration": _LIBRARY_BYTES + kernels + whole}
    batch = 32 * tokens * _hidden_size(model)  # a few activations in fp32
    if settings.fisher:
        batch += tokens * max(_kept(block, model, layers, width, length) for block in parts.layers)
    # A layer's experts are there twice while they are joined; the sums are made after that.
    joining = max(max(projection.bytes_before for projection in layer.projections) for layer in layers)
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in parts.layers)
    walk = largest * width + max(2 * joining, max(grams) + batch)
    if settings.fisher:  # the head comes when no layer is there
        at_once = logits * length
        at_once = min(at_once, max(LOGITS_BYTES, logits)) if picks_positions(model) else at_once
        walk = max(walk, parts.head * width + _LOGITS_COPIES * at_once + batch)
    # The layers are fitted while the walk waits, which keeps what lies outside of them.
    outside = _LIBRARY_BYTES + parts.outside * width
    return {"fit": outside + fit, "calibration": outside + kernels + walk}


def disk_needed(source: SourceModel, config: Config, layers: list[LayerPlan], result: int) -> int:
    """Disk needed while a compression runs: what the calibration keeps, and its result or what trials keep before it.

    The calibration keeps the Gram matrices of as many layers as there are processes (more wait for nobody), and the
    hidden states before and after a layer, or with Fisher information before each layer and two files of gradients;
    these are counted where `max_samples` says how much text there is. Trials keep the factors of their layers in fp32,
    and the hidden states of the original and of each.

    Args:
        result: bytes of the compressed checkpoint.
    """
    settings = config.compression.calibration
    if not settings.enabled:
        return result
    grams = sorted((layer.gram_bytes for layer in layers), reverse=True)
    held = sum(grams[: world_size()])
    greedy = config.compression.allocation == "greedy" and not settings.sequential
    if greedy and sum(grams) <= GRAM_BYTES_AT_ONCE:
        held = sum(grams)  # kept from measuring to fitting
    factors = [sum(4 * projection.parameters_after for projection in layer.projections) for layer in layers]
    factors = sorted(factors, reverse=True)[: settings.trials * greedy]
    try:
        parts = _parts(source.map.model, [layer.name for layer in layers])
    except DoesNotFit:
        return sum(grams) + max(result, sum(factors))
    length, samples = settings.dataset.max_length, settings.dataset.max_samples
    state = length * _hidden_size(source.map.model) * compute_dtype(source, config.model).itemsize
    # The inputs of the first layer are the embeddings, which are not kept.
    files = len(parts.layers) - max(parts.first, 1) + 2 if settings.fisher else 2
    states = files * (samples or 0) * state
    rows = rows_on_trial(length)
    ways = 2 * (len(factors) + 1) * min(samples or rows, rows) * state  # before and after a layer
    trials = sum(factors) + max(states, ways) if factors else 0
    return held + max(result + states, trials)


def _reading(layer: LayerPlan) -> int:
    """While a layer is read: one projection as it is on disk, stacked and joined, beside those that are done."""
    done = peak = 0
    for projection in layer.projections:
        peak = max(peak, done + 3 * projection.bytes_before)
        done += projection.bytes_before
    return layer.bias_bytes_before + peak


def _fitting(layer: LayerPlan, settings: CalibrationConfig, cores: int | str) -> int:
    """While a layer is fitted: its weights as read and with their neurons permuted, factors in fp32, temporaries."""
    fisher = settings.enabled and settings.fisher
    weights = 2 * layer.bytes_before
    factors = sum(4 * projection.parameters_after for projection in layer.projections)
    working = []
    for projection in layer.projections:
        one = 4 * projection.rows * projection.columns
        chunk = min(max(CHUNK_BYTES, one), 4 * projection.parameters_before)
        gram = _gram(projection, projection.columns) * settings.enabled
        gram += _gram(projection, projection.rows) * fisher
        grouped = projection.bytes_before + 2 * gram if _may_group(projection, cores) else 0  # the experts of a group
        # Shrunk, then scaled and damped, and their roots.
        working.append(_TEMPORARIES * chunk + 3 * gram + grouped)
    up, down = layer.projections
    grams = (layer.gram_bytes + _gram(down, down.columns)) * settings.enabled  # that of the neurons is permuted
    grams += _gram(up, up.rows) * fisher
    return weights + factors + grams + max(working)


def _may_group(projection: ProjectionPlan, cores: int | str) -> bool:
    return projection.form.cores > 1 or bool(more_cores(projection.experts, cores))


def _gram(projection: ProjectionPlan, features: int) -> int:
    return 4 * projection.experts * features**2


@dataclass(frozen=True)
class _Parts:
    """A model as the layer by layer run takes it: its decoder layers, and the parameters outside of them."""

    layers: list[nn.Module]
    first: int  # the first layer with experts
    outside: int  # in the base model
    head: int  # beside the base model, tied ones not counted


def _parts(model: Any, experts: list[str]) -> _Parts:
    """Raises DoesNotFit if the experts are not in one list of layers."""
    path = layer_list(model, experts)
    layers = model.get_submodule(path)
    base = {id(parameter): parameter.numel() for parameter in model.base_model.parameters()}
    inside = {id(parameter) for parameter in layers.parameters()}
    return _Parts(
        list(layers),
        min(int(name.removeprefix(f"{path}.").split(".")[0]) for name in experts),
        sum(size for key, size in base.items() if key not in inside),
        sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in base),
    )


def _kept(block: nn.Module, model: Any, layers: list[LayerPlan], width: int, length: int) -> int:
    """Bytes that a backward pass through some layers (or the whole model) needs of the forward pass, for one token.

    That is, roughly, what goes into and comes out of each matrix, half as much again for what is done to it in between,
    and the steps of norms and residual sums in fp32; where attention keeps its weights, also these.
    """
    config = model.config.get_text_config()
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    modules = {model.get_submodule(layer.name): layer for layer in layers}
    apart = {id(parameter) for module in (*ends, *modules) if module is not None for parameter in module.parameters()}
    matrices = [p for p in block.parameters() if p.ndim > 1 and id(p) not in apart]
    values = sum(matrix.shape[0] + matrix.shape[1] for matrix in matrices)
    for module in block.modules():
        if module in modules:
            layer = modules[module]
            values += layer.top_k * sum(projection.rows + projection.columns for projection in layer.projections)
    depth = config.num_hidden_layers if block is model else 1
    steps = 14 * _hidden_size(model)
    if getattr(config, "_attn_implementation", None) == "eager":
        steps += 3 * config.num_attention_heads * length
    return 3 * values * width // 2 + 4 * depth * steps


def _hidden_size(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[1])
