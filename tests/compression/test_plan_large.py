"""The plan of a model of 235B parameters, from headers alone: sparse files of 470 GB that hold no weight."""

from __future__ import annotations

import io
import json
import math
import re
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from moe_compress.compression import footprint, trials
from moe_compress.compression.plan_table import print_plan
from moe_compress.compression.planning import Plan, check_plan, make_plan
from moe_compress.compression.source import SourceModel, open_model
from moe_compress.config import Config
from moe_compress.errors import UserError

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY = 94, 128, 4096, 1536, 151936  # Qwen3-235B-A22B
HEADS, KV_HEADS, HEAD = 64, 4, 128


def tensors() -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """The shapes of each shard, one matrix per expert as on the hub."""
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    yield "ends", {**ends, "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
            "self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            "self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
            "self_attn.q_norm.weight": (HEAD,),
            "self_attn.k_norm.weight": (HEAD,),
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
            "mlp.gate.weight": (EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj"):
                shapes[f"mlp.experts.{expert}.{name}.weight"] = (INTERMEDIATE, HIDDEN)
            shapes[f"mlp.experts.{expert}.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        yield f"layer-{layer}", {f"{prefix}.{name}": shape for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    path = tmp_path_factory.mktemp("large")
    settings = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": 12288,
        "moe_intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(settings))
    weight_map = {}
    for shard, shapes in tensors():
        file, end, header = f"{shard}.safetensors", 0, {}
        for name, shape in shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file
        raw = json.dumps(header).encode()
        with (path / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(raw)) + raw)
            stream.truncate(8 + len(raw) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = Config()
    config.model.name = str(path)
    return open_model(config.model)


def planned(source: SourceModel, **changes: Any) -> Plan:
    config = Config()
    config.model.name = str(source.path)
    config.compression.calibration.enabled = False
    config.compression.cores, config.compression.input_basis = 1, 0.0
    for key, value in changes.items():
        setattr(config.compression, key, value)
    plan = make_plan(source, config)
    check_plan(plan)
    return plan


def test_sizes(large: SourceModel) -> None:
    plan = planned(large, target_ratio=0.25)
    experts = LAYERS * EXPERTS * 3 * HIDDEN * INTERMEDIATE
    parameters = sum(math.prod(shape) for _, shapes in tensors() for shape in shapes.values())
    assert plan.before.parameters == parameters == 235_093_634_560
    assert plan.before.bytes == 2 * parameters
    assert plan.before.expert_parameters == experts
    assert plan.before.active_parameters == parameters - experts * (EXPERTS - 8) // EXPERTS
    assert 22.1e9 < plan.before.active_parameters < 22.3e9
    assert len(plan.layers) == LAYERS
    assert 0.24 < plan.ratio <= 0.25
    assert all(p.delta_rank % 8 == 0 for layer in plan.layers for p in layer.projections)
    assert plan.after.bytes == plan.before.bytes - plan.before.expert_bytes + plan.after.expert_bytes
    assert plan.after.flops_per_token < plan.before.flops_per_token
    shapes = [(2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
    ranks = [projection.delta_rank for projection in plan.layers[0].projections]
    before = sum(8 * rows * columns for rows, columns in shapes)
    after = sum(rows * columns + 8 * r * (rows + columns) for r, (rows, columns) in zip(ranks, shapes, strict=True))
    assert plan.layers[0].arithmetic == pytest.approx(after / before)
    layer = 3 * EXPERTS * HIDDEN * INTERMEDIATE
    assert 2 * 2 * layer < plan.peak_bytes < 2 * 4 * layer  # one layer of 94 at a time, read and permuted
    assert plan.disk_bytes == plan.after.bytes
    stream = io.StringIO()
    print_plan(plan, Console(file=stream, width=80))
    assert "470.19 GB" in stream.getvalue() or "470.2 GB" in stream.getvalue()
    assert "more multiply-adds" not in stream.getvalue()


def test_the_nearest_feasible_ratio_is_named_and_is_feasible(large: SourceModel) -> None:
    with pytest.raises(UserError, match=r"nearest feasible compression.target_ratio is (0\.\d+)") as refused:
        planned(large, target_ratio=0.005)
    nearest = re.search(r"target_ratio is (0\.\d+)", str(refused.value))
    assert nearest is not None
    assert 0.005 < float(nearest[1]) < 0.02
    assert planned(large, target_ratio=float(nearest[1])).ratio <= float(nearest[1])


def test_memory_and_disk_of_a_calibration(large: SourceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer and its matrices, whatever the number of layers; on disk, the matrices that wait for their fit."""
    config = Config()
    config.compression.target_ratio = 0.25
    config.compression.calibration.fisher = False
    plan = make_plan(large, config)
    grams = 4 * EXPERTS * (HIDDEN**2 + INTERMEDIATE**2)
    layer = 3 * EXPERTS * HIDDEN * INTERMEDIATE
    embedding = VOCABULARY * HIDDEN
    text = config.compression.calibration.dataset
    assert text.max_samples is not None
    states = 2 * 2 * text.max_samples * text.max_length * HIDDEN
    assert plan.disk_bytes == plan.after.bytes + grams + states
    assert plan.peak_stage == "fit"
    # Measured, shrunk, damped and their roots; the weights twice; the embedding.
    least = 2 * 2 * layer + grams + 3 * 4 * EXPERTS * HIDDEN**2 + 2 * embedding
    assert least < plan.peak_bytes < 1.5 * least
    config.compression.allocation = "greedy"
    assert make_plan(large, config).disk_bytes == plan.disk_bytes  # too many to be kept: collected twice
    config.compression.calibration.trials = LAYERS  # their factors in fp32 are more than the result
    tried = make_plan(large, config)
    ways = 2 * (LAYERS + 1) * trials.TOKENS * 2 * HIDDEN
    assert tried.disk_bytes == grams + 2 * tried.after.expert_bytes + ways > plan.disk_bytes
    config.compression.calibration.trials = 16
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert make_plan(large, config).disk_bytes == plan.after.bytes + 4 * grams + states
    monkeypatch.setattr(footprint, "layer_list", does_not_fit)
    whole = make_plan(large, config)
    assert whole.disk_bytes == plan.after.bytes + LAYERS * grams
    assert whole.peak_stage == "calibration" and whole.peak_bytes > plan.before.bytes


def does_not_fit(*_: Any) -> None:
    raise footprint.DoesNotFit("its layers hand on more")


def test_memory_and_disk_of_fisher_information(large: SourceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer and what its backward pass needs of one batch; on disk, the hidden states before every layer."""
    config = Config()
    config.compression.target_ratio = 0.25
    config.compression.calibration.fisher = True
    plan = make_plan(large, config)
    inner = HIDDEN**2 + INTERMEDIATE**2
    grams = 4 * EXPERTS * (inner + (2 * INTERMEDIATE) ** 2 + HIDDEN**2)
    layer = 2 * 3 * EXPERTS * HIDDEN * INTERMEDIATE
    text, batch_size = config.compression.calibration.dataset, config.compression.calibration.batch_size
    assert text.max_samples is not None
    states = 2 * text.max_samples * text.max_length * HIDDEN
    # Before each layer but the first, after the last one, and the gradients of what one layer takes and gives.
    assert plan.disk_bytes == plan.after.bytes + grams + (LAYERS + 1) * states
    calibration = footprint.peak_stages(large, config, plan.layers)["calibration"]
    routed = 8 * (3 * INTERMEDIATE + 2 * HIDDEN)
    least = layer + grams + 2 * VOCABULARY * HIDDEN + batch_size * text.max_length * 2 * routed
    assert least < calibration < 1.5 * least + (2 << 30)
    config.compression.calibration.batch_size *= 2
    more = footprint.peak_stages(large, config, plan.layers)["calibration"]
    assert more - calibration > batch_size * text.max_length * 2 * routed
    monkeypatch.setattr(footprint, "layer_list", does_not_fit)
    whole = make_plan(large, config)
    assert whole.disk_bytes == plan.after.bytes + LAYERS * grams
    logits = 4 * VOCABULARY
    tokens = 2 * batch_size * text.max_length
    assert whole.peak_bytes > plan.before.bytes + tokens * (LAYERS * 2 * routed + 4 * logits)


def test_the_tables_fit_a_terminal_of_80_columns(large: SourceModel) -> None:
    config = Config()
    config.compression.target_ratio = 0.25
    text = io.StringIO()
    print_plan(make_plan(large, config), Console(file=text, width=80))
    assert "gate_up_proj" in text.getvalue() and "…" not in text.getvalue()
