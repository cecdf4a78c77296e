"""The two forms of a factorized projection, and the exact step from one to the other.

A projection of one MoE layer holds E experts, y = W_e x with W_e of shape [out, in]. Both forms share one core C
between the experts; `DeltaFactors` is what runs at inference, `WrapperFactors` is folded into it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeltaFactors:
    """W_e = core + delta_out_e delta_in_e: a core plus a free delta of rank R.

    Attributes:
        core: [out, in], or None for plain low-rank experts without anything in common.
        delta_out: [E, out, R].
        delta_in: [E, R, in].
    """

    core: Tensor | None
    delta_out: Tensor
    delta_in: Tensor

    @property
    def delta_rank(self) -> int:
        """The inner size R of the delta."""
        return self.delta_in.shape[1]

    def materialize(self, experts: slice = slice(None)) -> Tensor:
        """The dense weights [E, out, in] of all experts, or of those in `experts`; differentiable."""
        delta_out, delta_in = self.delta_out[experts], self.delta_in[experts]
        if self.core is None:
            return delta_out @ delta_in
        return torch.baddbmm(self.core.expand(delta_out.shape[0], -1, -1), delta_out, delta_in)

    def fold(self) -> DeltaFactors:
        """Itself: so that callers may fold either form."""
        return self


@dataclass(frozen=True)
class WrapperFactors:
    """W_e = (I + u_out_e v_out_e^T) core (I + u_in_e v_in_e^T), of rank r per side.

    Attributes:
        core: [out, in].
        u_out, v_out: [E, out, r].
        u_in, v_in: [E, in, r].
    """

    core: Tensor
    u_out: Tensor
    v_out: Tensor
    u_in: Tensor
    v_in: Tensor

    @property
    def delta_rank(self) -> int:
        """The inner size R = 2r of the folded delta."""
        return 2 * self.u_out.shape[2]

    def fold(self) -> DeltaFactors:
        """The same weights as core plus delta, exactly; R = 2r. Differentiable with respect to every factor.

        With S = I + u_out v_out^T the product expands to C + S C u_in v_in^T + u_out v_out^T C.
        """
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
        return self._select(experts).fold().materialize()

    def _select(self, experts: slice) -> WrapperFactors:
        sides = (self.u_out, self.v_out, self.u_in, self.v_in)
        return WrapperFactors(self.core, *(side[experts] for side in sides))


Factors = DeltaFactors | WrapperFactors
