"""The dense export has the original's files and the compressed model's logits, and needs no moe-compress."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_compress.errors import UserError
from moe_compress.modeling import export_dense, load_model, materialize_in_memory


def names(path: Path) -> set[str]:
    with safe_open(path / "model.safetensors", framework="pt") as tensors:
        return set(tensors.keys())


def test_has_the_names_and_config_of_the_original(
    saved: Path, tiny_model: Callable[..., Any], architecture: str, ids: Tensor, tmp_path: Path
) -> None:
    beside = ["tokenizer.json", "tekken.json", "spiece.model", "tokenization_own.py", "LICENSE"]
    beside.append("additional_chat_templates/tools.jinja")
    source = shutil.copytree(saved, tmp_path / "source")
    for name in [*beside, "training_args.bin"]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    output = export_dense(source, tmp_path / "dense")
    assert output == tmp_path / "dense"
    original = tiny_model(architecture)
    original.save_pretrained(tmp_path / "original")
    assert names(output) == names(tmp_path / "original")
    dense, plain = (json.loads((path / "config.json").read_text()) for path in (output, tmp_path / "original"))
    assert dense == plain
    assert "saves no memory" in (output / "README.md").read_text()
    assert all((output / name).read_text() == "{}" for name in beside) and not (output / "training_args.bin").exists()
    loaded = load_model(output)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in original.modules()]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, load_model(saved)(ids).logits, rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.glob(".*"))


_PLAIN = """
import sys
sys.modules["moe_compress"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    expected = load_file(path + "/expected.st")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(path)(expected["ids"]).logits
    torch.testing.assert_close(found, expected["logits"], rtol=1e-4, atol=1e-4)
    print("EQUAL")
"""


def test_loads_without_moe_compress(all_saved: dict[tuple[str, str], Path], ids: Tensor, tmp_path: Path) -> None:
    outputs = []
    for (architecture, variant), path in all_saved.items():
        if variant == "delta":
            outputs.append(export_dense(path, tmp_path / architecture))
            with torch.no_grad():
                save_file({"ids": ids, "logits": load_model(path)(ids).logits}, outputs[-1] / "expected.st")
    command = [sys.executable, "-c", _PLAIN, *map(str, outputs)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["EQUAL"] * 7, result.stderr[-2000:]


def test_materializes_in_memory_what_was_compressed_in_memory(
    tiny_model: Callable[..., Any], exact_factors: Callable[..., Any], architecture: str, tmp_path: Path
) -> None:
    from moe_compress.modeling import compress_in_memory

    model = tiny_model(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compress_in_memory(model, exact_factors(model))
    assert not any(name.endswith("gate_up_proj") and tensor.dim() == 3 for name, tensor in model.state_dict().items())
    materialize_in_memory(model)
    after = model.state_dict()
    assert set(after) == set(before)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "dense")
    tiny_model(architecture).save_pretrained(tmp_path / "original")
    assert names(tmp_path / "dense") == names(tmp_path / "original")


def test_bf16_rounds_once(all_saved: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    source = all_saved["olmoe", "delta"]
    output = export_dense(source, tmp_path / "dense", dtype="bfloat16")
    model = load_model(source, dtype="bfloat16")
    module = model.model.layers[0].mlp.experts
    exact = module.down_proj.float() + (module.down_proj_delta_in.float() @ module.down_proj_delta_out.float()).mT
    stored = load_file(output / "model.safetensors")["model.layers.0.mlp.experts.2.down_proj.weight"]
    assert torch.equal(stored, exact[2].to(torch.bfloat16))


def test_mistakes(all_saved: dict[tuple[str, str], Path], tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_dense(all_saved["olmoe", "delta"], tmp_path / "there")
    tiny_model("olmoe").save_pretrained(tmp_path / "original")
    with pytest.raises(UserError, match="not a compressed checkpoint"):
        export_dense(tmp_path / "original", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_an_export_can_be_compressed_again(
    all_saved: dict[tuple[str, str], Path], compressed: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    dense = load_model(export_dense(all_saved["mixtral", "wrapper"], tmp_path / "dense"), require_moe=True)
    compressed(dense, "delta").save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, dense(ids).logits)
