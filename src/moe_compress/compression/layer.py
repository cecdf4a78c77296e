"""Compressing one MoE layer: align its neurons, fit each projection. Pure functions, which any worker may call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moe_compress.compression.calibrate import LayerGrams
from moe_compress.errors import UserError
from moe_compress.factorization import (
    Factors,
    FitSpec,
    align_neurons,
    fit,
    permute_columns,
    permute_rows,
    shrink_grams,
)
from moe_compress.modeling import ExpertsModule, factor_tensors


@dataclass(frozen=True)
class LayerSettings:
    """How one layer is compressed; the same everywhere but for the ranks."""

    specs: dict[str, FitSpec]  # by projection
    dtypes: dict[str, torch.dtype]  # of what is stored, by projection and, for biases, `<projection>_bias`
    alignment: str = "weights"
    shrinkage: float = 0.1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class LayerInput:
    """One experts module to compress.

    Attributes:
        weights: projection (`gate_up_proj` or `up_proj`, then `down_proj`) to [E, out, in], any floating type.
        biases: projection to [E, out]; empty where the experts have none.
        interleaved: rows of gate_up are gate 0, up 0, gate 1 ... (GPT-OSS).
        grams: what the layer saw, or None to fit on the weights alone.
    """

    name: str
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    interleaved: bool
    grams: LayerGrams | None = None


@dataclass(frozen=True)
class LayerResult:
    """One compressed experts module: factors and biases in the stored types, in main memory.

    Attributes:
        factors: by projection.
        biases: `<projection>_bias` [E, out], in the new order of the neurons.
        errors: projection to `relative_error` and `data_error` (None without calibration), measured in fp32.
        load: tokens per expert in the calibration, or None.
    """

    name: str
    factors: dict[str, Factors]
    biases: dict[str, Tensor]
    errors: dict[str, dict[str, float | None]]
    load: list[int] | None

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored, under the full names of the compressed model's parameters."""
        named = dict(self.biases)
        for projection, factors in self.factors.items():
            named.update(factor_tensors(projection, factors))
        return {f"{self.name}.{name}": tensor for name, tensor in named.items()}


def layer_input(experts: ExpertsModule, tensors: dict[str, Tensor], grams: LayerGrams | None = None) -> LayerInput:
    """The parameters of an experts module, as the module holds them, in the convention of the factorization.

    Args:
        tensors: parameter name within the module to tensor; [E, in, out] where the module is transposed.
    """
    weights = {
        projection: tensors[projection].mT if experts.is_transposed else tensors[projection]
        for projection in experts.projections
    }
    biases = {
        projection: tensors[f"{projection}_bias"]
        for projection in experts.projections
        if f"{projection}_bias" in tensors
    }
    return LayerInput(experts.name, weights, biases, not experts.is_concatenated, grams)


def fit_layer(
    layer: LayerInput, settings: LayerSettings, on_projection: Callable[[str, float], None] = lambda *_: None
) -> LayerResult:
    """Align the neurons of one layer's experts and fit each of its projections.

    Args:
        on_projection: called after each projection with its name and relative error.

    Raises:
        UserError: the factors cannot be held by the type that they are to be stored in.
    """
    up, down = layer.weights  # in the order of the computation
    gates = 1 if up == "up_proj" else 2
    weights = {name: weight.to(settings.device) for name, weight in layer.weights.items()}
    biases = dict(layer.biases)
    grams = {}
    if layer.grams is not None:
        grams = {name: gram.to(settings.device) for name, gram in layer.grams.grams.items()}
    if settings.alignment == "weights":
        order = align_neurons(weights[up], weights[down], interleaved=layer.interleaved, gates=gates)
        weights[up] = permute_rows(weights[up], order, interleaved=layer.interleaved, gates=gates)
        weights[down] = permute_columns(weights[down], order)
        if up in biases:
            biases[up] = permute_rows(biases[up], order, interleaved=layer.interleaved, gates=gates)
        if down in grams:
            grams[down] = _permute_gram(grams[down], order)
    factors: dict[str, Factors] = {}
    errors: dict[str, dict[str, float | None]] = {}
    for projection in (up, down):
        gram = grams.pop(projection, None)
        if gram is not None and layer.grams is not None:
            gram = shrink_grams(gram, settings.shrinkage, layer.grams.tokens)
        result = fit(weights.pop(projection), settings.specs[projection], gram)
        factors[projection] = _stored(layer.name, projection, result.factors, settings.dtypes[projection])
        errors[projection] = {"relative_error": result.relative_error, "data_error": result.data_error}
        on_projection(projection, result.relative_error)
    stored_biases = {f"{name}_bias": bias.to("cpu", settings.dtypes[f"{name}_bias"]) for name, bias in biases.items()}
    load = None if layer.grams is None else layer.grams.tokens.tolist()
    return LayerResult(layer.name, factors, stored_biases, errors, load)


def _permute_gram(gram: Tensor, order: Tensor) -> Tensor:
    """Gram matrices [E, I, I] of neurons in a new order [E, I]."""
    expert = torch.arange(gram.shape[0], device=gram.device)[:, None, None]
    return gram[expert, order[:, :, None], order[:, None, :]]


def _stored(module: str, projection: str, factors: Factors, dtype: torch.dtype) -> Factors:
    tensors = {name: value for name, value in vars(factors).items() if value is not None}
    for name, tensor in tensors.items():
        tensors[name] = tensor = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        if not tensor.isfinite().all():
            raise UserError(
                f"the factors of {module}.{projection} overflow or hold NaN in {str(dtype).removeprefix('torch.')}; "
                "try compression.dtype=bfloat16, compression.method=closed_form or a lower compression.lr"
            )
    return replace(factors, **tensors)
