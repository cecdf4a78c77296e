"""Back to the original architecture: a dense checkpoint that loads anywhere, and saves no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_compress.errors import UserError
from moe_compress.files import directory_in_progress
from moe_compress.modeling.conversions import DENSE_CONVERSIONS
from moe_compress.modeling.experts import SharedCoreExperts, copy_attributes, find_shared_cores
from moe_compress.modeling.find import require_weights, to_native
from moe_compress.modeling.load import load_model, resolve_model_path
from moe_compress.modeling.side_files import copy_side_files

_README = """# Dense export of a compressed model

The experts of this checkpoint were written out in full from low-rank factors and what these share
(moe-compress, from `{source}`). It has the original architecture and loads in anything that loads the original,
without moe-compress.

**It saves no memory and no time**: it is as large and as slow as the original model, and as good as the compressed
one. Use the compressed checkpoint wherever moe-compress can be installed.
"""


def export_dense(
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a compressed checkpoint as one of its original architecture, tokenizer, license and a README included.

    The whole dense model is held in memory.

    Args:
        model_dir: a compressed checkpoint.
        output_dir: the directory to make; it appears only when it is complete.
        dtype: of the written weights; `auto` keeps the compressed checkpoint's.
        max_shard_size: of the safetensors files.

    Returns:
        `output_dir`.

    Raises:
        UserError: the output exists already, or the input is not a compressed checkpoint.
    """
    output = Path(output_dir)
    if output.exists():
        raise UserError(f"{output} exists already; give a directory that does not")
    source = resolve_model_path(model_dir)
    model = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code)
    if not find_shared_cores(model):
        raise UserError(f"{source} is not a compressed checkpoint; there is nothing to export")
    materialize_in_memory(model)
    with directory_in_progress(output) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        copy_side_files(source, partial)
        (partial / "README.md").write_text(_README.format(source=source.name), encoding="utf-8")
    return output


@torch.no_grad()
def materialize_in_memory(model: Any) -> Any:
    """Replace the shared cores of a model by experts of the original class, written out in full, in place.

    Layer by layer, so that one layer at a time is in memory twice. Returns the model, which `save_pretrained` then
    writes under the original architecture's own names.

    Raises:
        UserError: experts that are offloaded.
    """
    cores = find_shared_cores(model)
    require_weights(cores)
    for name, module in cores.items():
        model.set_submodule(name, _materialized(module))
    conversions = model.__dict__.pop(DENSE_CONVERSIONS, None)
    if conversions is not None:
        model._weight_conversions = conversions
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _materialized(module: SharedCoreExperts) -> nn.Module:
    # Not through the class's constructor, whose arguments differ between architectures.
    dense = module.original_class.__new__(module.original_class)
    nn.Module.__init__(dense)
    copy_attributes(module, dense)
    for own in ("original_class", "parameterization", "layout", "_group_indices"):
        delattr(dense, own)
    for projection in module.projections:
        weight = to_native(module.materialize(projection), module.is_transposed).contiguous()
        dense.register_parameter(projection, nn.Parameter(weight))
        bias = module.bias(projection)
        if bias is not None:
            dense.register_parameter(f"{projection}_bias", nn.Parameter(bias.detach().clone()))
    return dense.train(module.training)
