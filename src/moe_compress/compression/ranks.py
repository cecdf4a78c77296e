"""The delta rank of every projection, and the type in which it is stored, from the settings."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from moe_compress.compression.mapping import MoeLayer
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.factorization import projection_bytes, uniform_ranks


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
    original_width = _only({layer.dtypes[projection].itemsize for layer, projection in keys})
    found = uniform_ranks(
        {f"{layer.name}.{projection}": layer.experts.projections[projection] for layer, projection in keys},
        target_bytes=None if settings.target_bytes is None else settings.target_bytes - _bias_bytes(layers, config),
        ratio=settings.target_ratio,
        cores=settings.cores,
        bytes_per_value=value_width(layers, config),
        original_bytes_per_value=original_width,
        rank_multiple=settings.rank_multiple,
        parameterization=settings.parameterization,
    )
    return {(layer.name, projection): found[f"{layer.name}.{projection}"] for layer, projection in keys}


def projections_budget(layers: list[MoeLayer], config: Config, uniform: dict[tuple[str, str], int]) -> int:
    """The bytes that all cores and factors may take: the target, or what the ranks of `choose_ranks` cost.

    Args:
        uniform: what `choose_ranks` found.
    """
    settings = config.compression
    if settings.target_bytes is not None:
        return settings.target_bytes - _bias_bytes(layers, config)
    shapes = [(layer, projection, shape) for layer in layers for projection, shape in layer.experts.projections.items()]
    if settings.target_ratio is not None:
        original = sum(math.prod(shape) * layer.dtypes[name].itemsize for layer, name, shape in shapes)
        return math.floor(Fraction(str(settings.target_ratio)) * original)
    width = value_width(layers, config)
    return sum(
        projection_bytes(*shape, uniform[layer.name, name], settings.cores, width) for layer, name, shape in shapes
    )


def value_width(layers: list[MoeLayer], config: Config) -> int:
    """Bytes of one stored value of cores and factors.

    Raises:
        UserError: it is not the same for all of them.
    """
    return _only(
        {
            stored_dtype(layer, projection, config).itemsize
            for layer in layers
            for projection in layer.experts.projections
        }
    )


def _bias_bytes(layers: list[MoeLayer], config: Config) -> int:
    """Bytes of the experts' biases, which are stored as they are."""
    return sum(
        experts * rows * stored_dtype(layer, projection, config).itemsize
        for layer in layers
        if layer.experts.has_bias
        for projection, (experts, rows, _) in layer.experts.projections.items()
    )


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
