"""Compressing a model that is in memory: swapping its experts for given factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from moe_compress.errors import UserError
from moe_compress.factorization.factors import Factors
from moe_compress.modeling.config import SharedCoreConfig
from moe_compress.modeling.conversions import set_conversions
from moe_compress.modeling.experts import SharedCoreExperts, find_shared_cores, set_empty_cores_aside
from moe_compress.modeling.find import find_experts, require_weights
from moe_compress.modeling.tensors import layout_of, parameterization_of


def compress_in_memory(
    model: Any,
    results: Mapping[str, Mapping[str, Factors]],
    biases: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Any:
    """Replace the experts of every MoE layer of a model by shared cores, in place.

    Args:
        model: a Transformers model with its original experts.
        results: the factors of each projection (`gate_up_proj` or `up_proj`, `down_proj`) of each experts module, by
            the module's name; they are cast to the dtype of the experts.
        biases: `<projection>_bias` [E, out] of each experts module, where they changed (neurons that were permuted
            take their biases with them); otherwise the model's own are kept.

    Returns:
        The model: `save_pretrained` writes a checkpoint that `from_pretrained` reads after `import moe_compress`.

    Raises:
        UserError: a layer or projection without factors, factors of unknown layers, or of other shapes than the model;
            experts that are offloaded.
    """
    experts = {facts.name: facts for facts in find_experts(model)}
    if set(results) != set(experts):
        missing, unknown = sorted(set(experts) - set(results)), sorted(set(results) - set(experts))
        raise UserError(
            f"factors do not fit the model: missing for {missing or 'none'}, unknown layers {unknown or 'none'}"
        )
    require_weights({name: facts.module for name, facts in experts.items()})
    parameterization = parameterization_of([factors for layer in results.values() for factors in layer.values()])
    layers = {
        name: {projection: layout_of(factors) for projection, factors in layer.items()}
        for name, layer in results.items()
    }
    config = SharedCoreConfig(layers=layers, parameterization=parameterization)
    replacements = {}
    for name, facts in experts.items():
        replacement = SharedCoreExperts(facts.module, layers[name], parameterization)
        for projection in facts.projections:
            bias = (biases or {}).get(name, {}).get(f"{projection}_bias")
            if bias is None and facts.has_bias:
                bias = getattr(facts.module, f"{projection}_bias")
            replacement.load_factors(projection, results[name][projection], bias)
        replacements[name] = replacement.train(facts.module.training)
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # a model that was never loaded: what save_pretrained would have used
        known = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in known if not isinstance(conversion, PrefixChange)]
    for name, replacement in replacements.items():
        model.set_submodule(name, replacement)
    set_conversions(model, conversions)
    set_empty_cores_aside(model)
    model.config.quantization_config = config
    return model


@torch.no_grad()
def fold_in_memory(model: Any) -> Any:
    """Fold every wrapper of a compressed model into core and delta, in place, and say so in its config.

    Raises:
        UserError: the model is not compressed, or its experts are offloaded.
    """
    cores = find_shared_cores(model)
    if not cores:
        raise UserError(f"{type(model).__name__} has no shared cores to fold; compress it first")
    require_weights(cores)
    for module in cores.values():
        module.fold_()
    old = model.config.quantization_config
    layers = old["layers"] if isinstance(old, dict) else old.layers
    model.config.quantization_config = SharedCoreConfig(layers=layers, parameterization="delta")
    return model
