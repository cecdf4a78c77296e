"""The plan: exact bytes, counts that match the models themselves, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from moe_compress.compression import checkpoint, compress, plan
from moe_compress.compression.plan_table import print_plan
from moe_compress.compression.planning import Plan, check_plan, make_plan
from moe_compress.compression.source import open_model
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.modeling import find_experts
from moe_compress.run import Run
from tests.compression.runs import tensors_of

Settings = Callable[..., Config]


def planned(config: Config) -> Plan:
    return make_plan(open_model(config.model), config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parameterization": "wrapper"},
        {"cores": 0},
        {"dtype": "bfloat16"},
        {"target_ratio": 0.6, "rank_multiple": 2},
        {"target_bytes": 90_000, "rank_multiple": 1},
    ],
)
def test_bytes_are_exact(
    changes: dict[str, Any], model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path
) -> None:
    for family in ("olmoe", "gpt_oss"):
        config = settings(model_dir(family), **changes)
        expected = planned(config)
        run = Run.create(tmp_path / family, config)
        compress(run)
        tensors = {
            name: tensor for file in run.checkpoint(0).glob("*.safetensors") for name, tensor in load_file(file).items()
        }
        assert expected.after.bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert expected.after.expert_bytes == sum(
            tensor.nbytes for name, tensor in tensors.items() if ".mlp.experts." in name
        )
        assert expected.before.bytes == open_model(config.model).checkpoint.nbytes
        facts = json.loads((run.path / "compression.json").read_text())
        assert facts["totals"]["expert_bytes_after"] == expected.after.expert_bytes
        assert facts["totals"]["ratio"] == expected.ratio
        if "target_ratio" in changes:
            assert 0.5 < expected.ratio <= changes["target_ratio"]
        if "target_bytes" in changes:
            assert 0.9 * changes["target_bytes"] < expected.after.expert_bytes <= changes["target_bytes"]


def test_parameters_are_those_of_the_models(
    family: str, model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = settings(model_dir(family))
    expected = planned(config)
    run = Run.create(tmp_path / "run", config)
    compress(run)
    original = AutoModelForCausalLM.from_pretrained(model_dir(family))
    student = AutoModelForCausalLM.from_pretrained(run.checkpoint(0))
    assert expected.before.parameters == sum(parameter.numel() for parameter in original.parameters())
    assert expected.after.parameters == sum(parameter.numel() for parameter in student.parameters())
    experts = [parameter for found in find_experts(original) for parameter in found.module.parameters()]
    assert expected.before.expert_parameters == sum(parameter.numel() for parameter in experts)
    assert all(layer.top_k == 2 for layer in expected.layers)
    idle = sum(parameter.numel() for parameter in experts) * 6 // 8
    assert expected.before.active_parameters == expected.before.parameters - idle
    assert expected.after.active_parameters < expected.after.parameters


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_flops_are_those_of_the_matrices(family: str, model_dir: Callable[[str], Path], settings: Settings) -> None:
    """Against the multiply-adds that PyTorch counts for one token without context."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir(family), experts_implementation="eager")
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.tensor([[5]]), use_cache=False)
    found = counter.get_flop_counts()["Global"]
    matrices = sum(
        count for operation, count in found.items() if operation.__name__ in ("mm", "addmm", "bmm", "baddbmm")
    )
    attention = 2 * 2 * 2 * 4 * 8  # two products of one query with one key, in 2 layers of 4 heads of 8, if counted
    planned_flops = planned(settings(model_dir(family))).before.flops_per_token - 2 * vectors
    assert planned_flops <= matrices <= planned_flops + attention + 1024
    assert planned_flops > 0.95 * matrices


def test_active_parameters_after(model_dir: Callable[[str], Path], settings: Settings) -> None:
    result = planned(settings(model_dir("olmoe"), rank=2))
    others = result.before.parameters - result.before.expert_parameters
    core = 32 * 32 + 32 * 16
    deltas = 2 * 4 * (32 + 32 + 32 + 16)  # top-2, rank 4, of gate_up (32 x 32) and down (32 x 16)
    assert result.after.active_parameters == others + 2 * (core + deltas)


def test_only_headers_are_read(
    model_dir: Callable[[str], Path], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(checkpoint, "read_tensor", never)
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *rest, **more: tensor)
    result = plan(settings(model_dir("olmoe")))
    assert len(result.layers) == 2
    source = open_model(settings(model_dir("olmoe")).model)
    assert all(parameter.is_meta for parameter in nn.Module.parameters(source.map.model))


def test_of_a_hub_model_headers_are_enough(
    model_dir: Callable[[str], Path], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_dir("olmoe")

    def download_headers(name: str, revision: str | None, directory: Path) -> Path:
        assert name == "someone/model"
        return Path(shutil.copytree(source, directory, dirs_exist_ok=True))

    monkeypatch.setattr("moe_compress.modeling.hub.download_headers", download_headers)
    found, expected = plan(settings("someone/model")), plan(settings(source))
    assert found == replace(expected, model="someone/model", path="someone/model")


def test_printed(model_dir: Callable[[str], Path], settings: Settings) -> None:
    result = planned(settings(model_dir("olmoe"), calibrate=True))
    stream = io.StringIO()
    print_plan(replace(result, unused=["extra.weight"]), Console(file=stream, width=80))
    text = stream.getvalue()
    for part in ("OlmoeForCausalLM", "2/8", "32 x 16", "gate_up_proj", "FLOPs", "peak memory", "extra.weight"):
        assert part in text
    json.dumps(result.as_dict())


def test_slower_layers_are_named(model_dir: Callable[[str], Path], settings: Settings) -> None:
    """A core and two deltas of rank 8 cost 32 x 32 + 2 x 8 x 64 for gate_up where it was 2 x 32 x 32; so for down."""

    def printed(rank: int) -> str:
        stream = io.StringIO()
        result = planned(settings(model_dir("olmoe"), rank=rank))
        assert result.layers[0].arithmetic == (32 * 48 + 2 * 2 * rank * (64 + 48)) / (2 * 32 * 48)
        print_plan(result, Console(file=stream, width=300))
        return stream.getvalue()

    assert "2 of 2 MoE layers need more multiply-adds per token than before (1.08 times in model.layers.0" in printed(4)
    assert "turns faster at delta rank gate_up_proj 6, down_proj 6 or lower;" in printed(4)
    assert "multiply-adds" not in printed(3)


def stored_in(path: Path, source: Path, dtypes: dict[str, torch.dtype]) -> Path:
    """A copy of a model whose tensors are stored in the first type whose key is in their name."""
    ignored = shutil.ignore_patterns("*.safetensors*", "*.bin")
    shutil.copytree(source, path, ignore=ignored)
    tensors = tensors_of(source)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(next((dtype for part, dtype in dtypes.items() if part in name), tensor.dtype))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_experts_of_different_width_are_compressed_by_rank(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path
) -> None:
    source = stored_in(tmp_path / "model", model_dir("olmoe"), {"layers.0.mlp.experts": torch.bfloat16})
    run = Run.create(tmp_path / "run", settings(source))
    compress(run)
    stored = {name: tensor.dtype for name, tensor in tensors_of(run.checkpoint(0)).items() if ".mlp.experts." in name}
    assert {name: torch.bfloat16 if ".0." in name else torch.float32 for name in stored} == stored
    for changes in ({"target_ratio": 0.5}, {"allocation": "greedy"}, {"cores": "auto"}):
        with pytest.raises(UserError, match="different width.*compression.rank, with target_ratio=null.*uniform"):
            planned(settings(source, **changes))


def test_biases_of_a_type_of_their_own_count_within_the_target(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path
) -> None:
    source = stored_in(tmp_path / "model", model_dir("gpt_oss"), {"_bias": torch.float32, "experts": torch.bfloat16})
    result = planned(settings(source, target_bytes=45_000, rank_multiple=1))
    assert (
        result.layers[0].bias_bytes_after == 4 * 8 * (32 + 32) and result.layers[0].projections[0].dtype == "bfloat16"
    )
    assert 0.9 * 45_000 < result.after.expert_bytes <= 45_000


def test_refused_sizes(model_dir: Callable[[str], Path], settings: Settings) -> None:
    model = model_dir("olmoe")
    with pytest.raises(UserError, match="delta rank 64 is above the dimensions of 32 x 32"):
        check_plan(planned(settings(model, rank=32)))
    with pytest.raises(UserError, match="down_proj: delta rank 10 costs as much.*rank of at most 4"):
        check_plan(planned(settings(model, rank=5)))
    check_plan(planned(settings(model, rank=4)))
    with pytest.raises(UserError, match="ratio"):
        planned(settings(model, target_ratio=0.01))
    with pytest.raises(UserError):
        planned(settings(model, target_bytes=100))
