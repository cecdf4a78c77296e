"""Conversions that would rewrite a core are dropped, those that rename its module are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from moe_compress.errors import UserError
from moe_compress.modeling import SharedCoreConfig
from moe_compress.modeling.conversions import expert_parameter_names, without_experts
from moe_compress.modeling.quantizer import SharedCoreQuantizer, layers_by_module_name

DROPPED = {
    "merge and concatenate": lambda: WeightConverter(
        ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
        "mlp.experts.gate_up_proj",
        [MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    "merge": lambda: WeightConverter(r"\.experts.*.w2.weight", r"\.experts.down_proj", [MergeModulelist(dim=0)]),
    "transpose in place": lambda: WeightConverter(
        "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", [Transpose(dim0=1, dim1=2)]
    ),
    "another leaf": lambda: WeightRenaming(r"moe\.output_linear\.weight", "mlp.experts.down_proj"),
}
KEPT = {
    "another module": lambda: WeightRenaming(".block_sparse_moe.", ".mlp."),
    "group": lambda: WeightRenaming(r"\.block_sparse_moe\.(experts|gate)\.", r".mlp.\1."),
    "prefix": lambda: PrefixChange(prefix_to_add="model"),
    "shared experts": lambda: WeightRenaming(r"\.shared_mlp\.", ".mlp.shared_experts."),
    "shared merge": lambda: WeightConverter(
        ["shared_expert.w1.weight", "shared_expert.w3.weight"], "shared_expert.gate_up_proj", [Concatenate(dim=0)]
    ),
    "attention": lambda: WeightConverter(["q.weight", "k.weight"], "self_attn.qk.weight", [Concatenate(dim=0)]),
}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any], compressed: Callable[..., Any]) -> Any:
    """A compressed OLMoE."""
    return compressed(tiny_model("olmoe"), "delta")


@pytest.mark.parametrize("name", [*DROPPED, *KEPT])
def test_which_conversions_stay(model: Any, name: str) -> None:
    conversion = (DROPPED | KEPT)[name]()
    assert without_experts([conversion], model) == ([conversion] if name in KEPT else [])


def test_the_loader_uses_what_stays(model: Any) -> None:
    quantizer = SharedCoreQuantizer(model.config.quantization_config, pre_quantized=True)
    every = [make() for make in (DROPPED | KEPT).values()]
    assert quantizer.update_weight_conversions(every, model) == every[len(DROPPED) :]


def test_names_of_expert_parameters(model: Any) -> None:
    names = expert_parameter_names(model)
    assert len(names) == 2 * 6
    assert all(model.get_parameter(name) is not None for name in names)


def test_layers_under_the_base_model_s_names() -> None:
    layout = {"down_proj": {"delta_rank": 2, "cores": 1}}
    config = SharedCoreConfig(layers={"model.layers.0.mlp.experts": layout})
    for name in ("model.layers.0.mlp.experts", "layers.0.mlp.experts"):
        assert layers_by_module_name(config, [name], "model") == {name: layout}
    longer = SharedCoreConfig(layers={"layers.0.mlp.experts": layout})
    assert layers_by_module_name(longer, ["model.layers.0.mlp.experts"], "model") == {
        "model.layers.0.mlp.experts": layout
    }
    with pytest.raises(UserError, match="lacks other.experts and names model.layers.0.mlp.experts"):
        layers_by_module_name(config, ["other.experts"], "model")
