"""The model to compress: its directory, its configuration, its tensors and what they are for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from moe_compress.compression.checkpoint import Checkpoint
from moe_compress.compression.fp8 import Fp8Checkpoint, is_fp8
from moe_compress.compression.mapping import ModelMap, map_checkpoint, meta_model
from moe_compress.config import ModelConfig
from moe_compress.errors import UserError, first_line
from moe_compress.modeling import resolve_model_path
from moe_compress.modeling.checkpoint import read_config


@dataclass(frozen=True)
class SourceModel:
    """A model on disk, opened by its headers only.

    Attributes:
        dequantized: whether it is quantized on disk, so that only `checkpoint` reads it as what it stands for.
    """

    path: Path
    raw_config: dict[str, Any]  # config.json as it is
    checkpoint: Checkpoint
    map: ModelMap
    dequantized: bool = False


def open_model(settings: ModelConfig, headers: Path | None = None) -> SourceModel:
    """Open the model to compress; no weight is read.

    Args:
        headers: where no more than headers are needed, a directory to put those of a hub model.

    Raises:
        UserError: no such model, not safetensors, already compressed or quantized, dense, of an architecture that
            cannot be compressed, or incomplete.
    """
    path = resolve_model_path(settings.name, settings.revision, headers=headers)
    raw_config = read_config(path)
    quantization = raw_config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "an unknown method")
        if method == "shared_core":
            raise UserError(f"{path} is compressed already; give the original model instead")
        if not is_fp8(quantization):
            raise UserError(f"{path} is quantized ({method}); give an unquantized checkpoint of the same model instead")
    checkpoint = Fp8Checkpoint(path, quantization) if quantization else Checkpoint(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path / 'config.json'} is not a configuration that Transformers knows: {first_line(error)}"
        ) from error
    if quantization:  # what is read is not quantized any more, and the model is built for that
        del config.quantization_config
    model = meta_model(config, trust_remote_code=settings.trust_remote_code)
    return SourceModel(path, raw_config, checkpoint, map_checkpoint(checkpoint, model), bool(quantization))
