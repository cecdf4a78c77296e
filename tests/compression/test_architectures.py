"""Every MoE family of the installed Transformers: compressed by streaming, it loads and equals compression in memory.

A family is any model type whose module uses `use_experts_implementation`. Its configuration is the default one with
the fields that decide sizes, known by their names, made small; so a family of a newer Transformers is tested, or fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_compress.compression import compress
from moe_compress.compression.layer import fit_layer, layer_input
from moe_compress.compression.mapping import meta_model
from moe_compress.compression.pipeline import layer_settings
from moe_compress.compression.planning import make_plan
from moe_compress.compression.source import open_model
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.modeling import compress_in_memory, find_experts
from moe_compress.run import Run
from tests.compression.runs import load, logits

Settings = Callable[..., Config]

LAYERS = 3
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "router_hidden_size"), 32),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "max_position_embeddings"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_topk"),
        2,
    ),
    **dict.fromkeys(("num_attention_heads", "linear_num_value_heads", "linear_num_heads", "num_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "index_n_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("index_head_dim", "swa_head_dim", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "hc_lowrank"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("sliding_window", "block_size", "chunk_size", "mamba_chunk_size", "index_topk"), 8),
    **dict.fromkeys(("n_group", "num_expert_group", "n_groups", "mamba_n_groups", "o_groups", "mamba_d_conv"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "pad_token_id"), 0),
    "num_hidden_layers": LAYERS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What no rule on names can know.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{key: {"head_dim": 4} for key in ("axk1", "deepseek_v3")},  # there it is the rotary part alone
    "dots3_note_text": {"per_layer_config": {}},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def moe_model_types() -> list[str]:
    """Every model type of a causal language model whose module has experts of Transformers' experts interface."""
    root = Path(transformers.__file__).parent / "models"
    found = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        module = model_type_to_module_name(model_type)
        file = root / module / f"modeling_{module}.py"
        if file.exists() and "@use_experts_implementation" in file.read_text(encoding="utf-8"):
            found.append(model_type)
    return found


def is_composite(model_type: str) -> bool:
    """Whether the model type wraps a text model (which is a type of its own) for images or sound."""
    return bool(CONFIG_MAPPING[model_type].sub_configs)


def tiny_config(model_type: str) -> Any:
    """The default configuration of a family with all sizes made small."""
    default = AutoConfig.for_model(model_type)
    values = default.to_dict()
    names = set(values) | set(default.attribute_map)
    changes: dict[str, Any] = {key: size for key, size in SIZES.items() if key in names}
    for key, value in values.items():
        if key.endswith("intermediate_size") and value is not None:
            changes[key] = 16
        elif isinstance(value, list) and len(value) == values.get("num_hidden_layers") and len(value) > LAYERS:
            changes[key] = _kinds(value)
    # Groups divide the experts only where there were some; the KV heads differ from the heads only where they did.
    changes.update({key: 1 for key in ("n_group", "n_groups") if values.get(key) == 1})
    if "num_key_value_heads" in values:
        heads, shared = values["num_attention_heads"], values["num_key_value_heads"]
        changes["num_key_value_heads"] = 4 if shared in (None, heads) else min(shared, 2)
    return AutoConfig.for_model(model_type, **{**changes, **EXCEPTIONS.get(model_type, {})})


def _kinds(per_layer: list[Any]) -> list[Any]:
    """`LAYERS` entries with as many different kinds of the original list as fit, the last kind repeated."""
    kinds = [kind for position, kind in enumerate(per_layer) if kind not in per_layer[:position]][:LAYERS]
    return kinds + [per_layer[-1] if per_layer[-1] in kinds else kinds[-1]] * (LAYERS - len(kinds))


TEXT_MODELS = [model_type for model_type in moe_model_types() if not is_composite(model_type)]
SUPPORTED = TEXT_MODELS  # all; what the installed version adds must work too, or be named below
REFUSED = {
    "llama4_text": r"Llama4ForCausalLM.*Llama4TextExperts at model.layers.0.feed_forward.experts.*cannot be compressed",
    "jetmoe": r"JetMoeForCausalLM.*JetMoeParallelExperts.*cannot be compressed",
    "muse_spark": r"model type 'muse_spark' cannot be built as a causal language model",
    "llama": r"LlamaForCausalLM.*dense",
}
# One with each kind of experts or attention: transposed with biases, without a gate, linear attention, Mamba, MLA.
CALIBRATED = ["gpt_oss", "nemotron_h", "qwen3_next", "jamba", "deepseek_v2", "aria_text", "qwen2_moe"]


def tiny(model_type: str) -> Any:
    """A random model whose experts are strong enough that any change of them shows in the logits."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    with torch.no_grad():
        for parameter in (p for found in find_experts(model) for p in found.module.parameters()):
            parameter.normal_(0.0, 0.3)
    return model


def in_memory(model: Any, config: Config) -> Any:
    """The same compression of the model as `from_pretrained` loads it."""
    source = open_model(config.model)
    plan = make_plan(source, config)
    factors, biases = {}, {}
    for index, found in enumerate(find_experts(model)):
        settings = layer_settings(source, plan, config, index, torch.device("cpu"))
        with torch.no_grad():
            result = fit_layer(layer_input(found, dict(found.module.named_parameters())), settings)
        factors[found.name], biases[found.name] = result.factors, result.biases
    return compress_in_memory(model, factors, biases)


def test_the_library_has_many_families() -> None:
    assert len(SUPPORTED) >= 40
    assert {"qwen3_next", "glm4_moe", "ernie4_5_moe", "phimoe", "minimax", "jamba", "deepseek_v2"} < set(SUPPORTED)
    assert {"hunyuan_v1_moe", "dots1", "lfm2_moe", "flex_olmo", "olmoe", "mixtral", "granitemoe"} < set(SUPPORTED)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_streamed_equals_in_memory(model_type: str, settings: Settings, tmp_path: Path, tokens: Tensor) -> None:
    source = tmp_path / "source"
    tiny(model_type).save_pretrained(source)
    config = settings(source, iterations=1)
    run = Run.create(tmp_path / "run", config)
    compress(run)
    original = load(source)
    before = logits(original, tokens)
    streamed = logits(load(run.checkpoint(0)), tokens)
    assert streamed.isfinite().all()
    assert (streamed - before).abs().max() > 1e-4  # it was compressed
    assert torch.equal(streamed, logits(in_memory(original, config), tokens))


@pytest.mark.parametrize("model_type", CALIBRATED)
def test_calibrated(model_type: str, settings: Settings, tokenizer: Any, tmp_path: Path, tokens: Tensor) -> None:
    source = tmp_path / "source"
    model = tiny(model_type)
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    run = Run.create(tmp_path / "run", settings(source, calibrate=True, iterations=1))
    compress(run)
    assert logits(load(run.checkpoint(0)), tokens).isfinite().all()
    facts = json.loads((run.path / "compression.json").read_text())["layers"]
    assert list(facts) == [found.name for found in find_experts(model)]
    for layer in facts.values():
        assert sum(layer["load"]) == 10 * 32 * 2  # every token went to two experts
        assert all(0 < projection["data_error"] < 1 for projection in layer["projections"].values())


@pytest.mark.parametrize(("model_type", "reason"), REFUSED.items())
def test_refused_by_name(model_type: str, reason: str) -> None:
    config = AutoConfig.for_model(model_type)
    (getattr(config, "text_config", None) or config).num_hidden_layers = 2
    with pytest.raises(UserError, match=reason):
        find_experts(meta_model(config))
