"""From names on disk to experts: every layout gives what `from_pretrained` gives, and nothing is skipped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_compress.compression.source import SourceModel, open_model
from moe_compress.config import ModelConfig
from moe_compress.errors import UserError


def opened(path: Path) -> SourceModel:
    return open_model(ModelConfig(name=str(path)))


def load_all(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a model as a single file with its tensors changed."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = load_all(source)
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def edit_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


def assert_experts_equal(path: Path, model: Any) -> None:
    source = opened(path)
    assert len(source.map.layers) == 2
    for layer in source.map.layers:
        loaded = source.map.load(source.checkpoint, layer)
        module = model.get_submodule(layer.name)
        assert set(loaded) == set(dict(module.named_parameters()))
        for name, tensor in loaded.items():
            assert torch.equal(tensor, getattr(module, name)), name
            assert layer.dtypes[name] == tensor.dtype
    used = {name for layer in source.map.layers for name in layer.disk_names}
    assert used.isdisjoint(source.map.passthrough)
    assert used | set(source.map.passthrough) == set(source.checkpoint)


def test_layers_are_as_transformers_loads_them(family: str, model_dir: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    path = model_dir(family)
    assert_experts_equal(path, AutoModelForCausalLM.from_pretrained(path))
    assert opened(path).map.unused == []


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_fused_layout(family: str, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """The same model with its experts stored as 3-D tensors under the names of the Transformers modules."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir(family))

    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                tensors[name] = parameter.detach().clone()

    path = rewrite(model_dir(family), tmp_path / "fused", fuse)
    assert any(name.endswith("experts.gate_up_proj") for name in load_all(path))
    assert_experts_equal(path, model)


@pytest.mark.parametrize(
    ("family", "pattern", "message"),
    [
        ("olmoe", r"layers\.1\.mlp\.experts\.5\.up_proj", r"layers.1.mlp.experts.5.up_proj.weight is missing \(7 of 8"),
        ("olmoe", r"layers\.1\.mlp\.experts\..*\.up_proj", r"no tensor matches .*up_proj"),
        ("olmoe", r"layers\.1\.mlp\.experts\.", "no tensor for model.layers.1.mlp.experts.gate_up_proj"),
        ("mixtral", r"layers\.0\..*experts\.7\.w2", r"experts.7.w2.weight is missing"),
        ("gpt_oss", r"layers\.0\.mlp\.experts\.down_proj_bias", "layers.0.mlp.experts.down_proj_bias"),
        ("granitemoe", r"layers\.1\.block_sparse_moe\.input_linear", "layers.1.block_sparse_moe.experts.gate_up_proj"),
        ("qwen3_moe", r"layers\.1\.self_attn\.q_proj", r"no tensor for model.layers.1.self_attn.q_proj.weight"),
    ],
)
def test_what_is_missing_is_named(
    family: str, pattern: str, message: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if re.search(pattern, name)]
        assert names
        for name in names:
            del tensors[name]

    with pytest.raises(UserError, match=message):
        opened(rewrite(model_dir(family), tmp_path / "cut", drop))


def test_wrong_shapes_are_named(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.experts.2.down_proj.weight"
        tensors[name] = torch.zeros(32, 17)

    with pytest.raises(UserError, match="model.layers.0.mlp.experts.down_proj .* do not fit together"):
        opened(rewrite(model_dir("olmoe"), tmp_path / "odd", widen))
    path = rewrite(model_dir("olmoe"), tmp_path / "other", lambda tensors: None)
    edit_config(path, intermediate_size=8)
    with pytest.raises(UserError, match=r"down_proj .* make \[8, 32, 16\], but .* asks for \[8, 32, 8\]"):
        opened(path)


def test_more_experts_than_the_config_says(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    path = rewrite(model_dir("olmoe"), tmp_path / "few", lambda tensors: None)
    edit_config(path, num_experts=6)
    with pytest.raises(UserError, match="8 tensors match .* for 6 experts"):
        opened(path)


def test_nan_in_an_expert_is_named(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.gate_proj.weight"

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][2, 2] = float("nan")

    source = opened(rewrite(model_dir("olmoe"), tmp_path / "nan", poison))
    source.map.load(source.checkpoint, source.map.layers[0])
    with pytest.raises(UserError, match=f"{name} .* holds NaN"):
        source.map.load(source.checkpoint, source.map.layers[1])


def test_extra_tensors_are_passed_through(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    extra = "model.layers.2.mlp.experts.0.gate_proj.weight"  # like a layer for multi-token prediction

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[extra] = torch.ones(16, 32)

    source = opened(rewrite(model_dir("olmoe"), tmp_path / "extra", add))
    assert source.map.unused == [extra]
    assert extra in source.map.passthrough


def test_refused_models(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    dense = AutoConfig.for_model(
        "llama", vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    AutoModelForCausalLM.from_config(dense).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="dense"):
        opened(tmp_path / "dense")
    path = rewrite(model_dir("olmoe"), tmp_path / "fp8", lambda tensors: None)
    edit_config(path, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match=r"quantized \(gptq\)"):
        opened(path)
    edit_config(path, quantization_config={"quant_method": "shared_core"})
    with pytest.raises(UserError, match="compressed already"):
        opened(path)
    edit_config(path, quantization_config=None, model_type="no_such_model")
    with pytest.raises(UserError, match="not a configuration that Transformers knows"):
        opened(path)
    edit_config(path, model_type="vit")
    with pytest.raises(UserError, match="'vit' cannot be built as a causal language model"):
        opened(path)
