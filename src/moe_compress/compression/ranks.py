"""The delta rank of every projection, and the type in which it is stored, from the settings."""

from __future__ import annotations

import torch

from moe_compress.compression.mapping import MoeLayer
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.factorization import uniform_ranks


def choose_ranks(layers: list[MoeLayer], config: Config) -> dict[tuple[str, str], int]:
    """The delta rank of each (module name, projection): from compression.rank, or from a budget of bytes.

    Raises:
        UserError: the budget cannot be reached; the message names the nearest feasible ratio.
    """
    settings = config.compression
    keys = [(layer, projection) for layer in layers for projection in layer.experts.projections]
    if settings.target_ratio is None and settings.target_bytes is None:
        if settings.rank is None:
            raise UserError("set compression.rank, compression.target_ratio or compression.target_bytes")
        return {(layer.name, projection): 2 * settings.rank for layer, projection in keys}
    width = _only({stored_dtype(layer, projection, config).itemsize for layer, projection in keys})
    original_width = _only({layer.dtypes[projection].itemsize for layer, projection in keys})
    budget = settings.target_bytes
    if budget is not None:
        budget -= sum(
            experts * rows * stored_dtype(layer, projection, config).itemsize
            for layer, projection in keys
            if layer.experts.has_bias
            for experts, rows, _ in [layer.experts.projections[projection]]
        )
    found = uniform_ranks(
        {f"{layer.name}.{projection}": layer.experts.projections[projection] for layer, projection in keys},
        target_bytes=budget,
        ratio=settings.target_ratio,
        cores=settings.cores,
        bytes_per_value=width,
        original_bytes_per_value=original_width,
        rank_multiple=settings.rank_multiple,
        parameterization=settings.parameterization,
    )
    return {(layer.name, projection): found[f"{layer.name}.{projection}"] for layer, projection in keys}


def stored_dtype(layer: MoeLayer, parameter: str, config: Config) -> torch.dtype:
    """The type in which a projection or bias of a layer is stored: compression.dtype, or that of the source."""
    if config.compression.dtype == "auto":
        return layer.dtypes[parameter]
    dtype = getattr(torch, config.compression.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"compression.dtype={config.compression.dtype} is not a floating type; use auto or bfloat16")
    return dtype


def _only(widths: set[int]) -> int:
    if len(widths) > 1:
        raise UserError(
            "the experts of this checkpoint are stored in types of different width, so that a budget of bytes is not "
            "supported; set compression.rank instead, or convert the checkpoint to bfloat16"
        )
    return widths.pop()
