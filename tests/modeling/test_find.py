"""Experts are found by attributes, in every layout, and their weights read and written as [E, out, in]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MuseSparkTextConfig, NemotronHConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from moe_compress.errors import UserError
from moe_compress.modeling import expert_weights, experts_per_token, find_experts, set_expert_weights
from moe_compress.modeling.find import describe_experts


def test_finds_every_moe_layer(tiny_model: Callable[..., Any], architecture: str) -> None:
    found = find_experts(tiny_model(architecture))
    block = "block_sparse_moe" if architecture == "granitemoe" else "mlp"
    layers = (1, 2) if architecture == "deepseek_v3" else (0, 1)  # DeepSeek's first layer is dense here
    assert [facts.name for facts in found] == [f"model.layers.{layer}.{block}.experts" for layer in layers]
    for facts in found:
        assert facts.projections == {"gate_up_proj": (4, 32, 32), "down_proj": (4, 32, 16)}
        assert (facts.num_experts, facts.hidden_size, facts.intermediate_size) == (4, 32, 16)
        gpt_oss = architecture == "gpt_oss"
        assert (facts.has_bias, facts.is_transposed, facts.is_concatenated) == (gpt_oss, gpt_oss, not gpt_oss)
        assert facts.has_gate


def test_finds_them_on_the_meta_device(tiny_model: Callable[..., Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model("gpt_oss").config)
    assert [facts.projections["down_proj"] for facts in find_experts(model)] == [(4, 32, 16)] * 2


def test_experts_without_a_gate() -> None:
    module = NemotronHExperts(NemotronHConfig(n_routed_experts=3, hidden_size=8, moe_intermediate_size=6))
    facts = describe_experts("experts", module)
    assert not facts.has_gate
    assert facts.projections == {"up_proj": (3, 6, 8), "down_proj": (3, 8, 6)}
    assert {name: tuple(weight.shape) for name, weight in expert_weights(module).items()} == facts.projections


def test_weights_are_out_by_in_and_round_trip(tiny_model: Callable[..., Any], architecture: str) -> None:
    facts = find_experts(tiny_model(architecture))[0]
    weights = {name: weight.clone() for name, weight in expert_weights(facts.module).items()}
    raw = facts.module.gate_up_proj[1].detach()
    assert torch.equal(weights["gate_up_proj"][1], raw.T if facts.is_transposed else raw)
    before = [parameter.detach().clone() for parameter in facts.module.parameters()]
    set_expert_weights(facts.module, {name: weight * 2 for name, weight in weights.items()})
    assert torch.equal(expert_weights(facts.module)["down_proj"], weights["down_proj"] * 2)
    set_expert_weights(facts.module, weights)
    assert all(torch.equal(old, new) for old, new in zip(before, facts.module.parameters(), strict=True))
    with pytest.raises(ValueError, match="expected"):
        set_expert_weights(facts.module, {"down_proj": weights["down_proj"][:2]})
    with pytest.raises(ValueError, match="no projection"):
        set_expert_weights(facts.module, {"up_proj": weights["down_proj"]})


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UserError, match="LlamaForCausalLM.* is a dense model"):
        find_experts(AutoModelForCausalLM.from_config(config))


def test_a_compressed_model_is_refused(tiny_model: Callable[..., Any], compressed: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="compressed already"):
        find_experts(compressed(tiny_model("olmoe"), "delta"))


def test_norms_after_the_experts_are_refused() -> None:
    with torch.device("meta"):
        module = MuseSparkExperts(MuseSparkTextConfig())
    with pytest.raises(UserError, match="model.layers.7.experts: MuseSparkExperts .*post_expert_norm"):
        describe_experts("model.layers.7.experts", module)


def test_unknown_parameters_and_quantized_weights_are_refused(tiny_model: Callable[..., Any]) -> None:
    module = find_experts(tiny_model("mixtral"))[0].module
    module.scales = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match="has the parameters .*'scales'"):
        describe_experts("experts", module)
    del module.scales
    module.down_proj = torch.nn.Parameter(module.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UserError, match="float8_e4m3fn .*dequantized"):
        describe_experts("experts", module)


def test_experts_per_token(tiny_model: Callable[..., Any], architecture: str) -> None:
    model = tiny_model(architecture, num_experts_per_tok=3 if architecture != "deepseek_v3" else 2)
    expected = 2 if architecture == "deepseek_v3" else 3
    assert [experts_per_token(model, facts.name) for facts in find_experts(model)] == [expected, expected]
