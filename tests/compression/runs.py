"""What tests of the compress stage do with runs and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_compress.compression import compress
from moe_compress.config import Config
from moe_compress.run import Run


def compressed(config: Config, path: Path) -> Run:
    run = Run.create(path, config)
    compress(run)
    return run


def saved(model: Any, tokenizer: Any, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
