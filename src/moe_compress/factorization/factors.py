"""The two forms of a factorized projection, and the exact step from one to the other.

A projection of one MoE layer holds E experts, y = W_e x with W_e of shape [out, in]. Both forms share one core C
between the experts, or one between those of each group; `DeltaFactors` is what runs at inference, `WrapperFactors` is
folded into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

_Kind = TypeVar("_Kind", "DeltaFactors", "WrapperFactors")


@dataclass(frozen=True)
class DeltaFactors:
    """W_e = core_g(e) + delta_out_e delta_in_e [basis]: a core plus a free delta of rank R.

    With a basis, which all experts share, the deltas of all experts read the same s directions of the input.

    Attributes:
        core: [out, in], or [G * out, in] for G cores one below the other, or None for plain low-rank experts without
            anything in common.
        delta_out: [E, out, R].
        delta_in: [E, R, in], or [E, R, s] with a basis.
        groups: [E] int64, the core of each expert; None with less than two cores.
        basis: [s, in], or None.
    """

    core: Tensor | None
    delta_out: Tensor
    delta_in: Tensor
    groups: Tensor | None = None
    basis: Tensor | None = None

    @property
    def delta_rank(self) -> int:
        """The inner size R of the delta."""
        return self.delta_in.shape[1]

    @property
    def cores(self) -> int:
        """The number G of cores."""
        return 0 if self.core is None else self.core.shape[0] // self.delta_out.shape[1]

    @property
    def basis_size(self) -> int:
        """The size s of the shared basis, 0 without one."""
        return 0 if self.basis is None else self.basis.shape[0]

    def materialize(self, experts: slice = slice(None)) -> Tensor:
        """The dense weights [E, out, in] of all experts, or of those in `experts`; differentiable."""
        delta_out, delta_in = self.delta_out[experts], self.delta_in[experts]
        if self.basis is not None:
            delta_in = delta_in @ self.basis
        if self.core is None:
            return delta_out @ delta_in
        if self.groups is None:
            core = self.core.expand(delta_out.shape[0], -1, -1)
        else:
            core = self.core.view(self.cores, -1, self.core.shape[1])[self.groups[experts]]
        return torch.baddbmm(core, delta_out, delta_in)

    def fold(self) -> DeltaFactors:
        """Itself: so that callers may fold either form."""
        return self


@dataclass(frozen=True)
class WrapperFactors:
    """W_e = (I + u_out_e v_out_e^T) core_g(e) (I + u_in_e v_in_e^T), of rank r per side.

    Attributes:
        core: [out, in], or [G * out, in] for G cores one below the other.
        u_out, v_out: [E, out, r].
        u_in, v_in: [E, in, r].
        groups: [E] int64, the core of each expert; None with one core.
    """

    core: Tensor
    u_out: Tensor
    v_out: Tensor
    u_in: Tensor
    v_in: Tensor
    groups: Tensor | None = None

    @property
    def delta_rank(self) -> int:
        """The inner size R = 2r of the folded delta."""
        return 2 * self.u_out.shape[2]

    @property
    def cores(self) -> int:
        """The number G of cores."""
        return self.core.shape[0] // self.u_out.shape[1]

    @property
    def basis_size(self) -> int:
        """Wrappers have no shared basis: 0."""
        return 0

    def fold(self) -> DeltaFactors:
        """The same weights as core plus delta, exactly; R = 2r. Differentiable with respect to every factor.

        With S = I + u_out v_out^T the product expands to C + S C u_in v_in^T + u_out v_out^T C.
        """
        if self.groups is not None:
            return merge_groups([part.fold() for part in split_groups(self)], self.groups)
        rows = self.v_out.mT @ self.core  # [E, r, in]
        columns = self.core @ self.u_in  # [E, out, r]
        columns = columns + self.u_out @ (self.v_out.mT @ columns)
        return DeltaFactors(
            core=self.core,
            delta_out=torch.cat([columns, self.u_out], dim=2),
            delta_in=torch.cat([self.v_in.mT, rows], dim=1),
        )

    def materialize(self, experts: slice = slice(None)) -> Tensor:
        """The dense weights [E, out, in] of all experts, or of those in `experts`; differentiable."""
        sides = (self.u_out, self.v_out, self.u_in, self.v_in)
        groups = None if self.groups is None else self.groups[experts]
        u_out, v_out, u_in, v_in = (side[experts] for side in sides)
        return WrapperFactors(self.core, u_out, v_out, u_in, v_in, groups).fold().materialize()


Factors = DeltaFactors | WrapperFactors


def split_groups(factors: _Kind) -> list[_Kind]:
    """The factors of the experts of each group, which have one core: the inverse of `merge_groups`."""
    assert factors.groups is not None and factors.core is not None
    cores = factors.core.view(factors.cores, -1, factors.core.shape[1])
    return [
        type(factors)(core, **{name: side[factors.groups == group] for name, side in _sides(factors).items()})
        for group, core in enumerate(cores)
    ]


def merge_groups(parts: Sequence[_Kind], groups: Tensor) -> _Kind:
    """One set of factors for the experts of several groups, each of which has one core.

    Args:
        parts: the factors of the experts of group 0, 1, ..., in the order of the experts.
        groups: [E], the group of each expert.
    """
    position = groups.argsort(stable=True).argsort()  # of each expert among the parts
    sides = {name: torch.cat([getattr(part, name) for part in parts])[position] for name in _sides(parts[0])}
    return type(parts[0])(torch.cat([part.core for part in parts]), **sides, groups=groups)  # type: ignore[misc]


def _sides(factors: Factors) -> dict[str, Any]:
    names = (field.name for field in fields(factors) if field.name not in ("core", "groups", "basis"))
    return {name: getattr(factors, name) for name in names}
