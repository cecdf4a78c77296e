"""Gram matrices: which inputs an expert really sees, and the norm that follows from them.

With G_e the sum of g^2 x x^T over the tokens x routed to expert e with weight g, tr(D G_e D^T) is the squared error
that a change D of the weights makes in the expert's weighted output on those tokens. The same idea whitens the SVD in
SVD-LLM (arXiv 2403.07378) and D2-MoE (arXiv 2502.17298).

With the gradients d of the log-likelihood with respect to the expert's outputs too, S_e = sum of d d^T and
G_e = sum of |d|^2 x x^T, tr(S_e D G_e D^T) / (2 tr S_e) estimates what the change does to the model's predictions: the
Kronecker-factored Fisher information (K-FAC, Martens and Grosse 2015, arXiv 1503.05671), summed over the text in nats.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_compress.errors import UserError

_DAMPING = 1e-2  # of the mean diagonal of each Gram matrix
CHUNK_BYTES = 32 * 2**20  # size of one temporary over a chunk of experts, of which a fit has about eight at a time


def shrink_grams(grams: Tensor, shrinkage: float, counts: Tensor | None = None) -> Tensor:
    """Move each expert's Gram matrix towards the mean of its layer: (1 - shrinkage) G_e + shrinkage * mean.

    Rarely used experts have too few tokens to span the input space. Experts without any token get the mean itself,
    which is taken over the experts that have tokens.

    Args:
        grams: [E, in, in].
        shrinkage: from 0 (as measured) to 1 (the same for all experts).
        counts: [E] tokens of each expert; without it, an expert has no token if its Gram matrix is zero.

    Returns:
        [E, in, in] in fp32 (fp64 stays fp64).

    Raises:
        UserError: shrinkage is not between 0 and 1.
    """
    if not 0 <= shrinkage <= 1:
        raise UserError(f"compression.calibration.shrinkage={shrinkage}: it must be between 0 and 1")
    grams = grams if grams.dtype == torch.float64 else grams.float()
    traces = grams.diagonal(dim1=1, dim2=2).sum(1)
    seen = (traces if counts is None else counts.to(grams.device)) > 0
    mean = grams[seen].mean(0) if bool(seen.any()) else torch.zeros_like(grams[0])
    return torch.where(seen[:, None, None], torch.lerp(grams, mean, shrinkage), mean)


class Metric:
    """The norm in which a fit is measured: tr(S_e D G_e D^T) with Gram matrices per expert, or Frobenius without.

    Gram matrices are symmetrized, scaled to a mean diagonal of 1 over all experts (so that only their relative weight
    matters) and damped by a small multiple of the identity, raised for matrices that rounding made indefinite.

    Attributes:
        gram: [E, in, in] fp32, or None.
        root: [E, in, in] fp32 with root_e root_e^T = gram_e, or None.
        out_gram, out_root: the same for S_e, [E, out, out]; None weighs all outputs alike.
        unit: what 1 of the squared norm is in the units of the given matrices.
    """

    def __init__(self, gram: Tensor | None = None, out_gram: Tensor | None = None) -> None:
        """Of Gram matrices gram [E, in, in] and, only with them, out_gram [E, out, out]."""
        self.gram: Tensor | None = None
        self.root: Tensor | None = None
        self.out_gram: Tensor | None = None
        self.out_root: Tensor | None = None
        self.unit = 1.0
        if gram is None:
            return
        traces = None
        if out_gram is not None:
            # Otherwise the weight of an expert's tokens would count twice, in both sums.
            traces = out_gram.diagonal(dim1=1, dim2=2).double().sum(1)
            traces = traces.clamp_min(_DAMPING * float(traces.mean()))
            self.out_gram, self.out_root, self.unit = _roots(out_gram)
        self.gram, self.root, scale = _roots(gram, traces)
        self.unit *= scale

    def select(self, experts: Tensor) -> Metric:
        """The same norm of some experts only, which a mask [E] tells."""
        part = Metric()
        part.unit = self.unit
        if self.gram is not None and self.root is not None:
            part.gram, part.root = self.gram[experts], self.root[experts]
        if self.out_gram is not None and self.out_root is not None:
            part.out_gram, part.out_root = self.out_gram[experts], self.out_root[experts]
        return part

    def whiten(self, matrix: Tensor, experts: slice) -> Tensor:
        """out_root^T matrix [e, out, in] root of the given experts: its Frobenius norm is the norm of the metric."""
        return self.whiten_out(matrix if self.root is None else matrix @ self.root[experts], experts)

    def whiten_out(self, matrix: Tensor, experts: slice) -> Tensor:
        """out_root^T times matrix [e, out, n] of the given experts."""
        return matrix if self.out_root is None else self.out_root[experts].mT @ matrix

    def unwhiten_out(self, matrix: Tensor, experts: slice) -> Tensor:
        """out_root^-T times matrix [e, out, n] of the given experts."""
        if self.out_root is None:
            return matrix
        return torch.linalg.solve_triangular(self.out_root[experts].mT, matrix, upper=True)

    def unwhiten(self, matrix: Tensor, experts: slice) -> Tensor:
        """matrix [e, n, in] of the given experts times root^-1."""
        if self.root is None:
            return matrix
        return torch.linalg.solve_triangular(self.root[experts], matrix, upper=False, left=False)

    def apply(self, matrix: Tensor, experts: slice) -> Tensor:
        """matrix [e, n, in] of the given experts times gram."""
        return matrix if self.gram is None else matrix @ self.gram[experts]

    def apply_out(self, matrix: Tensor, experts: slice) -> Tensor:
        """out_gram times matrix [e, out, n] of the given experts."""
        return matrix if self.out_gram is None else self.out_gram[experts] @ matrix

    def squared_norms(self, matrix: Tensor, experts: slice) -> Tensor:
        """Squared norm of matrix [e, out, in] for each of the given experts, [e] in fp64."""
        return self.whiten(matrix, experts).square().sum((1, 2), dtype=torch.float64)


def _roots(gram: Tensor, divisors: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Gram matrices [E, n, n], scaled and damped, and their Cholesky factors, fp32; and by what they were divided.

    Each is first divided by one of the `divisors` [E], if there are any. In fp64 there is one at a time.
    """
    if divisors is None:
        divisors = torch.ones(len(gram), dtype=torch.float64, device=gram.device)
    if not bool(torch.isfinite(gram).all()):
        raise UserError("the Gram matrices of the calibration hold NaN or infinity: check the model's activations")
    diagonal = (gram.diagonal(dim1=1, dim2=2).double() / divisors[:, None]).mean(1)
    if float(diagonal.mean()) <= 0:
        raise UserError("the Gram matrices of the calibration are all zero: calibrate on more text")
    scale = float(diagonal.mean())
    scaled = torch.empty(gram.shape, dtype=torch.float32, device=gram.device)
    root = torch.empty_like(scaled)
    for expert in range(gram.shape[0]):
        scaled[expert], root[expert] = _damped(gram[expert].double() / divisors[expert], scale)
    return scaled, root, scale


def _damped(gram: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One Gram matrix in fp64, scaled and damped until it has a Cholesky factor, and that factor."""
    gram = (gram + gram.mT) / (2 * scale)
    mean = float(gram.diagonal().mean())
    damping = _DAMPING * max(mean, _DAMPING)
    while True:
        damped = gram + damping * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return damped, root
        damping *= 10


def chunks(experts: int, bytes_per_expert: int) -> Iterator[slice]:
    """Slices over the experts such that one fp32 temporary of a slice stays near `CHUNK_BYTES`."""
    size = max(1, CHUNK_BYTES // max(1, bytes_per_expert))
    for start in range(0, experts, size):
        yield slice(start, min(start + size, experts))


def residual(weights: Tensor, core: Tensor | None, experts: slice) -> Tensor:
    """Weights [e, out, in] of the given experts, of [E, out, in], less the core [out, in] if there is one; fp32."""
    chosen = weights[experts].float()
    return chosen if core is None else chosen - core
