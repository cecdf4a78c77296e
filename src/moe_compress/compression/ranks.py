"""The cores and the delta rank of every projection, and the type in which it is stored, from the settings."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch

from moe_compress.compression.mapping import MoeLayer
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.factorization import projection_bytes, rank_within, uniform_ranks

Ranks = dict[tuple[str, str], int]  # (module name, projection) to delta rank


class Choice(NamedTuple):
    """What a projection becomes."""

    cores: int
    delta_rank: int


Choices = dict[tuple[str, str], tuple[Choice, ...]]  # (module name, projection) to the candidates, one if it is settled


def candidates(layers: list[MoeLayer], config: Config, ranks: Ranks | None = None) -> Choices:
    """What each projection may become; with `compression.cores=auto` the fit takes the best.

    The candidates of a projection take no more bytes than its share of the budget. A share of the target is the same
    part of every projection, and buys ranks rounded to `compression.rank_multiple`; where ranks are given, or set by
    `compression.rank`, it is what they cost with one core, and buys others to the last rank.

    Args:
        ranks: as `allocate_ranks` measures them; None takes those of `choose_ranks`.

    Raises:
        UserError: the budget cannot be reached; the message names the nearest feasible ratio.
    """
    settings = config.compression
    if settings.cores != "auto":
        return {
            key: (Choice(fixed_cores(config), rank),) for key, rank in (ranks or choose_ranks(layers, config)).items()
        }
    target = settings.target_ratio is not None or settings.target_bytes is not None
    if ranks is None and not target:
        ranks = choose_ranks(layers, config)
    wrapper = settings.parameterization == "wrapper"
    share = Fraction(0)
    if ranks is None:
        choose_ranks(layers, config, cores=1 if wrapper else 0)  # refuses what cannot be reached
        share = Fraction(projections_budget(layers, config, {}), sum(map(_original_bytes, layers)))
    found: Choices = {}
    for layer in layers:
        for name, shape in layer.experts.projections.items():
            width = stored_dtype(layer, name, config).itemsize
            if ranks is None:
                budget = math.floor(share * math.prod(shape) * layer.dtypes[name].itemsize)
            else:
                budget = projection_bytes(*shape, ranks[layer.name, name], 1, width)
            tried = []
            for cores in (*(() if wrapper else (0,)), 1, *more_cores(shape[0])):
                rank = rank_within(
                    shape,
                    budget,
                    cores=cores,
                    bytes_per_value=width,
                    rank_multiple=settings.rank_multiple if ranks is None else 1,
                    parameterization=settings.parameterization,
                )
                if ranks is not None and cores == 1:
                    rank = ranks[layer.name, name]
                if rank:
                    tried.append(Choice(cores, rank))
            found[layer.name, name] = tuple(tried)
    return found


def more_cores(experts: int) -> tuple[int, ...]:
    """The numbers of cores beside 0 and 1 that are tried on a projection of so many experts."""
    return (2, 4) if experts >= 16 else ()


def fixed_cores(config: Config) -> int:
    """The number of cores to count with before the fit: that of the settings, one with `auto`."""
    cores = config.compression.cores
    return cores if isinstance(cores, int) else 1


def choose_ranks(layers: list[MoeLayer], config: Config, cores: int | None = None) -> Ranks:
    """The delta rank of each (module name, projection): from compression.rank, or from a budget of bytes.

    Args:
        cores: of each projection; None takes `fixed_cores`.

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
        cores=fixed_cores(config) if cores is None else cores,
        bytes_per_value=value_width(layers, config),
        original_bytes_per_value=original_width,
        rank_multiple=settings.rank_multiple,
        parameterization=settings.parameterization,
    )
    return {(layer.name, projection): found[f"{layer.name}.{projection}"] for layer, projection in keys}


def projections_budget(layers: list[MoeLayer], config: Config, uniform: Ranks) -> int:
    """The bytes that all cores and factors may take: the target, or what the ranks of `choose_ranks` cost.

    Args:
        uniform: what `choose_ranks` found, which counts where there is no target.
    """
    settings = config.compression
    if settings.target_bytes is not None:
        return settings.target_bytes - _bias_bytes(layers, config)
    if settings.target_ratio is not None:
        return math.floor(Fraction(str(settings.target_ratio)) * sum(map(_original_bytes, layers)))
    width, cores = value_width(layers, config), fixed_cores(config)
    return sum(
        projection_bytes(*shape, uniform[layer.name, name], cores, width)
        for layer in layers
        for name, shape in layer.experts.projections.items()
    )


def _original_bytes(layer: MoeLayer) -> int:
    """Bytes of the projections of a layer as they are."""
    return sum(math.prod(shape) * layer.dtypes[name].itemsize for name, shape in layer.experts.projections.items())


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
