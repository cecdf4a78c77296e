"""The form (cores, basis) and the delta rank of every projection, and the type it is stored in, from the settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import torch

from moe_compress.compression.mapping import MoeLayer
from moe_compress.config import CompressionConfig, Config
from moe_compress.errors import UserError
from moe_compress.factorization import Budget, Choice, Form, largest_rank, rank_within, uniform_ranks
from moe_compress.factorization.budget import Shape

Key = tuple[str, str]  # module name and projection
Choices = dict[Key, Choice]

# Of the inputs, what `compression.input_basis=auto` tries beside 0.
BASIS_SHARES = (Fraction(1, 4), Fraction(1, 3), Fraction(1, 2), Fraction(2, 3))


def full_name(key: Key) -> str:
    """A projection's name in the whole model, as budgets and curves have it."""
    return ".".join(key)


def forms_of(projection: str, shape: Shape, settings: CompressionConfig) -> tuple[Form, ...]:
    """The forms that a projection may take: one if the settings name it, else those that can make it smaller.

    Args:
        projection: its name; `down_proj` reads the neurons of one expert, and never has a shared basis.
        shape: (E, out, in).
    """
    wrapper = settings.parameterization == "wrapper"
    if isinstance(settings.cores, int):
        cores: tuple[int, ...] = (settings.cores,)
    else:
        cores = (*(() if wrapper else (0,)), 1, *more_cores(shape[0], settings.cores))
    shares: tuple[Fraction, ...] = (Fraction(0),)
    if projection != "down_proj" and settings.input_basis == "auto":
        shares = shares if wrapper or settings.method != "closed_form" else (Fraction(0), *BASIS_SHARES)
    elif projection != "down_proj":
        shares = (Fraction(str(settings.input_basis)),)
    forms = tuple(
        Form(number, basis_size(share, shape, settings))
        for number in cores
        for share in shares
        if number < 2 or not share or len(cores) == len(shares) == 1  # the last is refused by the fit
    )
    if len(forms) == 1:
        return forms
    unit = 2 if wrapper else 1
    fitting = [
        form for form in forms if largest_rank(shape, form=form, parameterization=settings.parameterization) >= unit
    ]
    return tuple(fitting) or forms[:1]


def basis_size(share: Fraction, shape: Shape, settings: CompressionConfig) -> int:
    """The size of a basis of a share of the inputs, a multiple of `rank_multiple` (where above it)."""
    size, multiple = round(share * shape[2]), settings.rank_multiple
    return size - size % multiple if size > multiple else size


def more_cores(experts: int, cores: int | str) -> tuple[int, ...]:
    """The numbers of cores beside 0 and 1 that are tried on a projection of so many experts: with `cores=groups`."""
    return (2, 4) if cores == "groups" and experts >= 16 else ()


def is_measured(settings: CompressionConfig, shapes: Mapping[Key, Shape]) -> list[str]:
    """The settings that leave forms or ranks to be chosen by measuring the model; none, if headers are enough."""
    open_settings = ["compression.allocation=greedy"] if settings.allocation == "greedy" else []
    forms = {form for (_, name), shape in shapes.items() for form in forms_of(name, shape, settings)}
    if isinstance(settings.cores, str):
        open_settings.append(f"compression.cores={settings.cores}")
    if settings.input_basis == "auto" and any(form.basis for form in forms):
        open_settings.append("compression.input_basis=auto")
    return open_settings


def choose(layers: list[MoeLayer], config: Config) -> Choices:
    """What each projection becomes as far as headers tell: see `header_choices`.

    Raises:
        UserError: the budget cannot be reached (the message names the nearest feasible ratio), or cannot be counted.
    """
    shapes, settings = shapes_of(layers), config.compression
    width = original = 1  # a rank counts no bytes
    if _target(settings, 0, 0) is not None or is_measured(settings, shapes):
        width, original = value_width(layers, config), original_width(layers)
    return header_choices(
        shapes,
        config,
        bytes_per_value=width,
        original_bytes_per_value=original,
        bias_bytes=_bias_bytes(layers, config),
    )


def header_choices(
    shapes: Mapping[Key, Shape],
    config: Config,
    *,
    bytes_per_value: int,
    original_bytes_per_value: int,
    bias_bytes: int = 0,
) -> Choices:
    """What each projection becomes, by compression.rank or the same share of the bytes for all.

    Where the settings leave something to be measured, this stands for it: the fewest cores for `cores=auto`
    or `groups`, and for `input_basis=auto` the smallest basis that can spend the share.

    Raises:
        UserError: the budget cannot be reached; the message names the nearest feasible ratio.
    """
    settings = config.compression
    total = sum(map(math.prod, shapes.values())) * original_bytes_per_value
    target = _target(settings, total, bias_bytes)
    if target is None and settings.rank is None:
        raise UserError("set compression.rank, compression.target_ratio or compression.target_bytes")
    forms = {}
    for key, shape in shapes.items():
        share = 0
        if target is not None:
            share = math.floor(Fraction(target, total) * math.prod(shape) * original_bytes_per_value)
        forms[key] = _stand_in(key[1], shape, settings, share, bytes_per_value)
    if target is None:
        assert settings.rank is not None
        return {key: Choice(form, 2 * settings.rank) for key, form in forms.items()}
    ranks = uniform_ranks(
        {full_name(key): shape for key, shape in shapes.items()},
        target_bytes=target if settings.target_ratio is None else None,
        ratio=settings.target_ratio,
        forms={full_name(key): form for key, form in forms.items()},
        bytes_per_value=bytes_per_value,
        original_bytes_per_value=original_bytes_per_value,
        rank_multiple=settings.rank_multiple,
        parameterization=settings.parameterization,
    )
    return {key: Choice(form, ranks[full_name(key)]) for key, form in forms.items()}


def budget_of(layers: list[MoeLayer], config: Config, plain: Choices) -> Budget:
    """What all projections together may cost: the target, or what the ranks of the choices `plain` cost.

    Its projections are called by their full names.
    """
    settings = config.compression
    shapes = {full_name(key): shape for key, shape in shapes_of(layers).items()}
    width, original = value_width(layers, config), original_width(layers)
    total = _target(settings, sum(map(math.prod, shapes.values())) * original, _bias_bytes(layers, config))
    budget = Budget(shapes, total or 0, width, original, settings.rank_multiple, settings.parameterization)
    if total is not None:
        return budget
    return replace(budget, total=sum(budget.cost(full_name(key), choice) for key, choice in plain.items()))


def _target(settings: CompressionConfig, original: int, bias_bytes: int) -> int | None:
    """The bytes that all projections may take, of so many; None where the rank is set instead."""
    if settings.target_bytes is not None:
        return settings.target_bytes - bias_bytes
    if settings.target_ratio is not None:
        return math.floor(Fraction(str(settings.target_ratio)) * original)
    return None


def _stand_in(projection: str, shape: Shape, settings: CompressionConfig, share: int, bytes_per_value: int) -> Form:
    """The form that is counted with before anything is measured."""
    forms = forms_of(projection, shape, settings)
    if len(forms) == 1:
        return forms[0]
    cores = settings.cores if isinstance(settings.cores, int) else min(form.cores for form in forms)
    plain = [form for form in forms if form.cores == cores] or list(forms)
    for form in sorted(plain):
        rank = rank_within(
            shape, share, form=form, bytes_per_value=bytes_per_value, parameterization=settings.parameterization
        )
        if form.basis and 0 < rank < form.basis:
            return form
    return min(plain)


def shapes_of(layers: list[MoeLayer]) -> dict[Key, Shape]:
    """(E, out, in) of every projection."""
    return {(layer.name, name): shape for layer in layers for name, shape in layer.experts.projections.items()}


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


def original_width(layers: list[MoeLayer]) -> int:
    """Bytes of one value of the original experts.

    Raises:
        UserError: it is not the same for all of them.
    """
    return _only({layer.dtypes[projection].itemsize for layer in layers for projection in layer.experts.projections})


def _bias_bytes(layers: list[MoeLayer], config: Config) -> int:
    """Bytes of the experts' biases, which are stored as they are."""
    return sum(
        experts * rows * stored_dtype(layer, f"{projection}_bias", config).itemsize
        for layer in layers
        for projection, (experts, rows, _) in layer.experts.projections.items()
        if f"{projection}_bias" in layer.dtypes
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
            "the experts of this checkpoint are stored in types of different width, which no budget of bytes supports; "
            "convert the checkpoint to bfloat16, or set compression.rank, with target_ratio=null, target_bytes=null, "
            "allocation=uniform and numbers for cores and input_basis"
        )
    return widths.pop()
