"""Transformers' weight conversions (names and layouts on disk) of a model whose experts are shared cores.

`core_model_loading` merges one matrix per expert into one tensor on load and splits it again on save. A core has the
merged tensor's name but nothing to split, so the conversions that rewrite it must go; those that only rename the
module around it (Mixtral's `block_sparse_moe`) stay.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, WeightTransform

from moe_compress.modeling.experts import find_shared_cores

# Where a compressed model keeps the conversions that its dense export needs.
DENSE_CONVERSIONS = "_dense_weight_conversions"


def rewrites_experts(conversion: WeightTransform, names: list[str]) -> bool:
    """Whether a conversion produces, on load, one of the parameters `names` by more than renaming its module."""
    if isinstance(conversion, PrefixChange):
        return False
    # Read backwards, as a mere renaming: the operations of a converter need not be invertible for this.
    probe = WeightRenaming(list(conversion._original_target_patterns), list(conversion._original_source_patterns))
    probe.scope_prefix, probe.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    for name in names:
        renamed, pattern = probe.rename_source_key(name)
        if pattern is None:
            continue
        if isinstance(conversion, WeightConverter) or renamed.rpartition(".")[2] != name.rpartition(".")[2]:
            return True
    return False


def expert_parameter_names(model: nn.Module) -> list[str]:
    """The names of all parameters of a model's shared cores."""
    return [f"{name}.{leaf}" for name, module in find_shared_cores(model).items() for leaf in module._parameters]


def without_experts(conversions: list[WeightTransform], model: nn.Module) -> list[WeightTransform]:
    """The conversions that leave the parameters of the model's shared cores alone."""
    names = expert_parameter_names(model)
    return [conversion for conversion in conversions if not rewrites_experts(conversion, names)]


def set_conversions(model: Any, all_conversions: list[WeightTransform]) -> None:
    """Let `save_pretrained` write shared cores as they are, and remember what a dense export needs instead."""
    setattr(model, DENSE_CONVERSIONS, all_conversions)
    model._weight_conversions = without_experts(all_conversions, model)
