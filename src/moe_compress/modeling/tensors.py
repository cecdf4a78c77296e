"""Names and shapes of the tensors that one factorized projection is stored as.

The core keeps the projection's original name, but its own two dimensions: a loader without our plug-in then meets a
size mismatch and raises, where it would otherwise have made up random experts. Without a core, the empty `[0, in]`
stands there for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from moe_compress.errors import UserError
from moe_compress.factorization.factors import DeltaFactors, Factors, WrapperFactors

Parameterization = Literal["delta", "wrapper"]
_DELTA: tuple[str, ...] = ("delta_out", "delta_in")
_WRAPPER: tuple[str, ...] = ("u_out", "v_out", "u_in", "v_in")


def factor_tensors(projection: str, factors: Factors) -> dict[str, Tensor]:
    """The tensors to store for one projection, by their names within the experts module, contiguous.

    Returns:
        `<projection>` (the core [out, in], or the empty [0, in]) and `<projection>_<factor>` for
        delta_out [E, out, R], delta_in [E, R, in] or u_out, v_out [E, out, r], u_in, v_in [E, in, r].
    """
    if isinstance(factors, WrapperFactors):
        core, names = factors.core, _WRAPPER
    else:
        empty = factors.delta_in.new_empty(0, factors.delta_in.shape[2])
        core, names = (empty if factors.core is None else factors.core), _DELTA
    tensors = {projection: core} | {f"{projection}_{name}": getattr(factors, name) for name in names}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def factors_from_tensors(projection: str, tensors: Mapping[str, Tensor]) -> Factors:
    """The inverse of `factor_tensors`; `tensors` may hold more."""
    core = tensors[projection]
    if f"{projection}_u_out" in tensors:
        return WrapperFactors(core, *(tensors[f"{projection}_{name}"] for name in _WRAPPER))
    delta_out, delta_in = (tensors[f"{projection}_{name}"] for name in _DELTA)
    return DeltaFactors(core if core.shape[0] else None, delta_out, delta_in)


def cast_factors(factors: Factors, dtype: torch.dtype) -> Any:
    """The same factors, of the same class, in another dtype."""
    values = {field.name: getattr(factors, field.name) for field in fields(factors)}
    return replace(factors, **{name: value.to(dtype) for name, value in values.items() if value is not None})


def stored_dtype(factors: Factors) -> torch.dtype:
    """The dtype the factors are in."""
    return (factors.u_out if isinstance(factors, WrapperFactors) else factors.delta_out).dtype


def working_dtype(factors: Factors) -> torch.dtype:
    """What products of factors are formed in, to be rounded once: fp32 for 16-bit factors."""
    return torch.promote_types(stored_dtype(factors), torch.float32)


def factor_shapes(
    projection: str, shape: tuple[int, int, int], layout: dict[str, int], parameterization: Parameterization
) -> dict[str, tuple[int, ...]]:
    """The shapes of what `factor_tensors` returns, by name.

    Args:
        shape: (E, out, in) of the projection.
        layout: `delta_rank` R and `cores` (0 or 1), as in `SharedCoreConfig.layers`.
    """
    experts, out_features, in_features = shape
    rank = layout["delta_rank"]
    shapes: dict[str, tuple[int, ...]] = {projection: (out_features if layout["cores"] else 0, in_features)}
    if parameterization == "wrapper":
        for name in _WRAPPER:
            features = out_features if name.endswith("out") else in_features
            shapes[f"{projection}_{name}"] = (experts, features, rank // 2)
    else:
        shapes[f"{projection}_delta_out"] = (experts, out_features, rank)
        shapes[f"{projection}_delta_in"] = (experts, rank, in_features)
    return shapes


def layout_of(factors: Factors) -> dict[str, int]:
    """The entry of `SharedCoreConfig.layers` that describes the factors of one projection."""
    return {"delta_rank": factors.delta_rank, "cores": 0 if factors.core is None else 1}


def parameterization_of(factors: list[Factors]) -> Parameterization:
    """The one parameterization that all factors of a model have.

    Raises:
        UserError: they are mixed.
    """
    kinds: set[Parameterization] = {"wrapper" if isinstance(f, WrapperFactors) else "delta" for f in factors}
    if len(kinds) != 1:
        raise UserError("wrapper and delta factors are mixed in one model; fold the wrappers first")
    return kinds.pop()
