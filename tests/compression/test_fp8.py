"""Block-quantized fp8 checkpoints are read as what they stand for, inside and outside the experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_compress.compression import compress
from moe_compress.compression.fp8 import Fp8Checkpoint
from moe_compress.compression.source import open_model
from moe_compress.config import Config, ModelConfig
from moe_compress.errors import UserError
from moe_compress.run import Run

BLOCK = (12, 20)  # neither divides the 32 or 16 of the tiny models: blocks at the edges are cut


def quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp8 values, the factor of each block, and, value by value, what they stand for."""
    rows, columns = weight.shape
    blocks = (-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    values, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(blocks)
    meant = torch.empty_like(weight, dtype=torch.float32)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            here = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            scales[i, j] = weight[here].abs().max() / 448
            values[here] = (weight[here] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[here] = values[here].float() * scales[i, j]
    return values, scales, meant.to(torch.bfloat16)


@pytest.fixture
def both(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> tuple[Path, Path]:
    """The same model quantized (all its projections, as DeepSeek-V3's) and in the bfloat16 that this stands for."""
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    make_model("olmoe", dtype=torch.bfloat16).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    shutil.copytree(plain, quantized)
    tensors = load_file(plain / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            stored[name], stored[f"{name}_scale_inv"], tensors[name] = quantize(tensor.float())
        else:
            stored[name] = tensor
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)
    }  # fmt: skip
    (quantized / "config.json").write_text(json.dumps(config))
    return plain, quantized


def test_every_tensor_is_what_it_stands_for(both: tuple[Path, Path]) -> None:
    plain, quantized = (open_model(ModelConfig(name=str(path))).checkpoint for path in both)
    assert isinstance(quantized, Fp8Checkpoint)
    assert set(quantized) == set(plain)
    for name in plain:
        assert quantized[name].dtype == "BF16" and quantized[name].nbytes == plain[name].nbytes
        assert torch.equal(quantized.tensor(name), plain.tensor(name)), name
        assert b"".join(quantized.chunks(name)) == b"".join(plain.chunks(name))


@pytest.mark.parametrize("fisher", [False, True])
def test_compressed_it_is_the_plain_model_compressed(
    fisher: bool, both: tuple[Path, Path], settings: Callable[..., Config], tmp_path: Path
) -> None:
    runs = []
    for path in both:
        config = settings(path, calibrate=True)
        config.compression.calibration.fisher = fisher
        run = Run.create(tmp_path / f"run-{path.name}", config)
        compress(run)
        runs.append(run)
    left, right = (
        {name: tensor for file in run.checkpoint(0).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for run in runs
    )
    assert set(left) == set(right) and not any(name.endswith("_scale_inv") for name in right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    assert (runs[0].checkpoint(0) / "config.json").read_text() == (runs[1].checkpoint(0) / "config.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scale: None, "q_proj.weight without model.layers.0.self_attn.q_proj.weight_scale_inv"),
        (
            lambda scale: scale[:1].clone(),
            r"q_proj.weight_scale_inv .* \[1, 2\] where blocks of \[12, 20\] .* \[3, 2\]",
        ),
        (lambda scale: scale * float("nan"), "q_proj.weight .* holds NaN"),
    ],
)
def test_wrong_scales_are_named(
    both: tuple[Path, Path], change: Callable[[Tensor], Tensor | None], message: str
) -> None:
    file = both[1] / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    scale = change(tensors.pop(f"{name}_scale_inv"))
    if scale is not None:
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=message):
        open_model(ModelConfig(name=str(both[1]))).checkpoint.finite_tensor(name)


def test_one_scale_for_a_whole_tensor(both: tuple[Path, Path]) -> None:
    path = both[1]
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = None
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has 3 values, but the quantization_config .* no weight_block_size"):
        open_model(ModelConfig(name=str(path)))
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        tensors[name] = torch.tensor(0.5)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    checkpoint = open_model(ModelConfig(name=str(path))).checkpoint
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(checkpoint.tensor(name), (tensors[name].float() * 0.5).to(torch.bfloat16))
