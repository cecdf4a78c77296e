"""A basis of the inputs that the deltas of all experts share: W_e = core + A_e M_e B with B [s, in].

The experts of a layer read much the same directions of the hidden states, whatever they write. B x is computed once per
token, and each rank of an expert costs out + s values instead of out + in. It is one step of a Tucker decomposition
(Tucker 1966; De Lathauwer et al. 2000, HOSVD) of the experts' weights along the input side, in the norm of the fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.factorization.eigen import leading_eigenvectors
from moe_compress.factorization.grams import Metric, residual


@dataclass(frozen=True)
class Inside:
    """Whitened weights [e, out, in] of some experts as the basis sees them.

    Attributes:
        matrix: [e, out, s], in orthonormal coordinates: its Frobenius norm is that of the part within the basis.
        triangle: [e, s, s] upper, from coordinates of the basis to these.
        outside: the squared norm of what no factors on the basis can reach, all experts together.
    """

    matrix: Tensor
    triangle: Tensor
    outside: float

    def unwhiten(self, right: Tensor) -> Tensor:
        """From right [e, R, s] in the orthonormal coordinates to a factor on the basis."""
        return torch.linalg.solve_triangular(self.triangle.mT, right, upper=False, left=False)


class SharedBasis:
    """The leading directions of the weights of all experts together.

    They are the best in the mean of the experts' norms on the input side; B x has uncorrelated components of equal
    size over the inputs that this mean stands for.

    Attributes:
        basis: [s, in] fp32.
    """

    def __init__(self, weights: Tensor, core: Tensor | None, size: int, metric: Metric, parts: list[slice]) -> None:
        """Of weights [E, out, in] less a core [out, in], with `size` rows; `parts` are slices over the experts."""
        self.metric = metric
        columns = weights.shape[2]
        root = None
        if metric.gram is not None:
            root = torch.linalg.cholesky(metric.gram.mean(0, dtype=torch.float64))
        products = torch.zeros(columns, columns, dtype=torch.float64, device=weights.device)
        for part in parts:
            stacked = metric.whiten_out(residual(weights, core, part), part).flatten(0, 1)
            products += (stacked.mT @ stacked).double()
        if root is not None:
            products = root.mT @ products @ root
        leading = leading_eigenvectors(products, size).mT
        if root is not None:
            leading = torch.linalg.solve_triangular(root, leading, upper=False, left=False)
        self.basis = leading.float()

    def inside(self, rest: Tensor, part: slice) -> Inside:
        """What the basis can express of rest [e, out, in], the weights of some experts less the core."""
        root = self.metric.root
        seen = self.basis if root is None else self.basis @ root[part]  # [e, s, in] or [s, in]
        span, triangle = torch.linalg.qr(seen.mT)
        whitened = self.metric.whiten(rest, part)
        matrix = whitened @ span
        outside = float((whitened - matrix @ span.mT).square().sum(dtype=torch.float64))
        return Inside(matrix, triangle, outside)
