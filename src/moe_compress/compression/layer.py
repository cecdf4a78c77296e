"""Compressing one MoE layer: align its neurons, choose its cores, fit each projection.

Pure functions, which any worker may call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe_compress.compression.collect import LayerGrams
from moe_compress.errors import UserError
from moe_compress.factorization import (
    Factors,
    FitResult,
    FitSpec,
    Form,
    align_neurons,
    error_curves,
    fit,
    group_experts,
    neuron_rows,
    permute_columns,
    permute_rows,
    shrink_grams,
)
from moe_compress.modeling import ExpertsModule, factor_tensors
from moe_compress.modeling.tensors import Layout, layout_of


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
    errors: dict[str, dict[str, Any]]
    load: list[int] | None

    @property
    def layouts(self) -> dict[str, Layout]:
        """The module's entry in `SharedCoreConfig.layers`."""
        return {projection: layout_of(factors) for projection, factors in self.factors.items()}

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

    The experts are first aligned all with each other. Where a projection gets several cores, its experts are grouped
    then, aligned again within the groups of both projections, and fitted in that order.

    Args:
        on_projection: called after each projection with its name and relative error.

    Raises:
        UserError: the factors cannot be held by the type that they are to be stored in.
    """
    work = LayerWork(layer, settings)
    align = settings.alignment == "weights" and any(spec.cores for spec in settings.specs.values())
    if align:
        work.align()
    groups = {projection: work.groups(projection, spec) for projection, spec in settings.specs.items()}
    if align and any(group is not None for group in groups.values()):
        up, down = layer.weights
        work.align((groups[up], groups[down]))
    factors: dict[str, Factors] = {}
    errors: dict[str, dict[str, Any]] = {}
    for projection, spec in settings.specs.items():
        result = work.fit(projection, spec, groups[projection])
        work.forget(projection)
        factors[projection] = _stored(layer.name, projection, result.factors, settings.dtypes[projection])
        errors[projection] = {"relative_error": result.relative_error, "data_error": result.data_error}
        on_projection(projection, result.relative_error)
    biases = {f"{name}_bias": bias.to("cpu", settings.dtypes[f"{name}_bias"]) for name, bias in work.biases.items()}
    load = None if layer.grams is None else layer.grams.tokens.tolist()
    return LayerResult(layer.name, factors, biases, errors, load)


class LayerWork:
    """A layer on the device, whose neurons can be put in another order."""

    def __init__(self, layer: LayerInput, settings: LayerSettings) -> None:
        self.layer, self.settings = layer, settings
        self.weights = {name: weight.to(settings.device) for name, weight in layer.weights.items()}
        self.biases = dict(layer.biases)
        self.grams: dict[str, Tensor] = {}
        self.out_grams: dict[str, Tensor] = {}
        if layer.grams is not None:
            self.grams = {name: gram.to(settings.device) for name, gram in layer.grams.grams.items()}
            self.out_grams = {name: gram.to(settings.device) for name, gram in layer.grams.out_grams.items()}

    def align(self, groups: tuple[Tensor | None, Tensor | None] = (None, None)) -> None:
        """Align the neurons of the experts that share a core, in each projection."""
        up, down = self.layer.weights  # in the order of the computation
        gates, interleaved = 1 if up == "up_proj" else 2, self.layer.interleaved
        order = align_neurons(
            self.weights[up],
            self.weights[down],
            interleaved=interleaved,
            gates=gates,
            groups=groups,
        )
        self.weights[up] = permute_rows(self.weights[up], order, interleaved=interleaved, gates=gates)
        self.weights[down] = permute_columns(self.weights[down], order)
        if up in self.biases:
            self.biases[up] = permute_rows(self.biases[up], order, interleaved=interleaved, gates=gates)
        if down in self.grams:
            self.grams[down] = _permuted_gram(self.grams[down], order)
        if up in self.out_grams:
            rows = neuron_rows(order, interleaved=interleaved, gates=gates)
            self.out_grams[up] = _permuted_gram(self.out_grams[up], rows)

    def curves(self, projection: str, forms: Iterable[Form]) -> dict[Form, Tensor]:
        """The error of a projection in some forms at every delta rank, see `error_curves`."""
        gram, out_gram = (self.shrunk(grams, projection) for grams in (self.grams, self.out_grams))
        return error_curves(self.weights[projection], forms, gram, out_gram)

    def groups(self, projection: str, spec: FitSpec) -> Tensor | None:
        """The core of each expert, where there are several."""
        if spec.cores < 2:
            return None
        return group_experts(self.weights[projection], spec.cores, self.shrunk(self.grams, projection))

    def fit(self, projection: str, spec: FitSpec, groups: Tensor | None) -> FitResult:
        """Fit a projection."""
        gram, out_gram = (self.shrunk(grams, projection) for grams in (self.grams, self.out_grams))
        return fit(self.weights[projection], spec, gram, groups, out_gram)

    def forget(self, projection: str) -> None:
        """Free what only the fit of this projection needed."""
        del self.weights[projection]
        self.grams.pop(projection, None)
        self.out_grams.pop(projection, None)

    def shrunk(self, grams: dict[str, Tensor], projection: str) -> Tensor | None:
        """The Gram matrices of a projection, `grams` or `out_grams`, ready to fit with; None where there are none."""
        if self.layer.grams is None or projection not in grams:
            return None
        return shrink_grams(grams[projection], self.settings.shrinkage, self.layer.grams.tokens)


def _permuted_gram(gram: Tensor, order: Tensor) -> Tensor:
    """Gram matrices [E, n, n] in a new order [E, n]."""
    return torch.stack([own[neurons][:, neurons] for own, neurons in zip(gram, order, strict=True)])


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
