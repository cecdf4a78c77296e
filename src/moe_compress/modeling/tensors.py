"""Names and shapes of the tensors that one factorized projection is stored as.

The core keeps the projection's original name, but its own two dimensions: a loader without our plug-in then meets a
size mismatch and raises, where it would otherwise have made up random experts. Without a core, the empty `[0, in]`
stands there for the same reason; several cores stand there one below the other, and which expert has which is no
tensor, but written in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor

from moe_compress.errors import UserError
from moe_compress.factorization.budget import Form
from moe_compress.factorization.factors import DeltaFactors, Factors, WrapperFactors

Parameterization = Literal["delta", "wrapper"]


class Layout(TypedDict):
    """What a projection is stored as, beside the parameterization: an entry of `SharedCoreConfig.layers`."""

    delta_rank: int  # inner size R of the folded delta, twice the rank of a wrapper's side
    cores: int  # G; 0 for plain low rank
    groups: NotRequired[list[int]]  # the core of each expert; only with more than one
    basis: NotRequired[int]  # s, directions of the input that all deltas read; only with a shared basis


_DELTA: tuple[str, ...] = ("delta_out", "delta_in")
_WRAPPER: tuple[str, ...] = ("u_out", "v_out", "u_in", "v_in")


def factor_tensors(projection: str, factors: Factors) -> dict[str, Tensor]:
    """The tensors to store for one projection, by their names within the experts module, contiguous.

    Returns:
        `<projection>` (the cores [G * out, in], or the empty [0, in]) and `<projection>_<factor>` for
        delta_in [E, in, R], delta_out [E, R, out] or u_out, v_out [E, out, r], u_in, v_in [E, in, r]; with a shared
        basis [s, in] also `<projection>_basis`, and delta_in is [E, s, R].
        The delta lies as a row x meets it, x delta_in delta_out: a weighted sum of rows each time, which is what few
        tokens are fastest at (see `expert_mm`).
    """
    if isinstance(factors, WrapperFactors):
        core, names = factors.core, _WRAPPER
    else:
        inputs = factors.delta_in if factors.basis is None else factors.basis
        empty = factors.delta_in.new_empty(0, inputs.shape[-1])
        core, names = (empty if factors.core is None else factors.core), _DELTA
    sides = {name: getattr(factors, name) for name in names}
    sides = {name: side.mT if name in _DELTA else side for name, side in sides.items()}
    tensors = {projection: core} | {f"{projection}_{name}": side for name, side in sides.items()}
    if isinstance(factors, DeltaFactors) and factors.basis is not None:
        tensors[f"{projection}_basis"] = factors.basis
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def factors_from_tensors(projection: str, tensors: Mapping[str, Tensor], groups: Tensor | None = None) -> Factors:
    """The inverse of `factor_tensors`; `tensors` may hold more.

    Args:
        groups: [E], the core of each expert, where there are several.
    """
    core = tensors[projection]
    if f"{projection}_u_out" in tensors:
        u_out, v_out, u_in, v_in = (tensors[f"{projection}_{name}"] for name in _WRAPPER)
        return WrapperFactors(core, u_out, v_out, u_in, v_in, groups)
    delta_out, delta_in = (tensors[f"{projection}_{name}"].mT for name in _DELTA)
    basis = tensors.get(f"{projection}_basis")
    return DeltaFactors(core if core.shape[0] else None, delta_out, delta_in, groups, basis)


def cast_factors(factors: Factors, dtype: torch.dtype) -> Any:
    """The same factors, of the same class, in another dtype; themselves if they are in it."""
    own = vars(factors).items()
    others = {name: value for name, value in own if value is not None and value.dtype != dtype and name != "groups"}
    return replace(factors, **{name: value.to(dtype) for name, value in others.items()}) if others else factors


def stored_dtype(factors: Factors) -> torch.dtype:
    """The dtype the factors are in."""
    return (factors.u_out if isinstance(factors, WrapperFactors) else factors.delta_out).dtype


def working_dtype(factors: Factors) -> torch.dtype:
    """What products of factors are formed in, to be rounded once: fp32 for 16-bit factors."""
    return torch.promote_types(stored_dtype(factors), torch.float32)


def factor_names(projection: str, layout: Layout, parameterization: Parameterization) -> list[str]:
    """The names of what `factor_tensors` returns."""
    sides = _WRAPPER if parameterization == "wrapper" else _DELTA
    basis = ("basis",) if "basis" in layout else ()
    return [projection, *(f"{projection}_{name}" for name in (*sides, *basis))]


def factor_shapes(
    projection: str, shape: tuple[int, int, int], layout: Layout, parameterization: Parameterization
) -> dict[str, tuple[int, ...]]:
    """The shapes of what `factor_tensors` returns, by name.

    Args:
        shape: (E, out, in) of the projection.
        layout: what the projection becomes.
    """
    experts, out_features, in_features = shape
    rank = layout["delta_rank"]
    shapes: dict[str, tuple[int, ...]] = {projection: (layout["cores"] * out_features, in_features)}
    if parameterization == "wrapper":
        for name in _WRAPPER:
            features = out_features if name.endswith("out") else in_features
            shapes[f"{projection}_{name}"] = (experts, features, rank // 2)
    else:
        shapes[f"{projection}_delta_out"] = (experts, rank, out_features)
        shapes[f"{projection}_delta_in"] = (experts, layout.get("basis", in_features), rank)
        if "basis" in layout:
            shapes[f"{projection}_basis"] = (layout["basis"], in_features)
    return shapes


def make_layout(form: Form, delta_rank: int, groups: list[int] | None = None) -> Layout:
    """The entry of a projection of this form and rank; `groups` [E] is the core of each expert, of several."""
    layout: Layout = {"delta_rank": delta_rank, "cores": form.cores}
    if groups is not None:
        layout["groups"] = groups
    if form.basis:
        layout["basis"] = form.basis
    return layout


def layout_of(factors: Factors) -> Layout:
    """The entry of `SharedCoreConfig.layers` that describes the factors of one projection."""
    groups = None if factors.groups is None else factors.groups.tolist()
    return make_layout(Form(factors.cores, factors.basis_size), factors.delta_rank, groups)


def form_of(layout: Layout) -> Form:
    """The form of a projection, without its rank."""
    return Form(layout["cores"], layout.get("basis", 0))


def parameterization_of(factors: list[Factors]) -> Parameterization:
    """The one parameterization that all factors of a model have.

    Raises:
        UserError: they are mixed.
    """
    kinds: set[Parameterization] = {"wrapper" if isinstance(f, WrapperFactors) else "delta" for f in factors}
    if len(kinds) != 1:
        raise UserError("wrapper and delta factors are mixed in one model; fold the wrappers first")
    return kinds.pop()
