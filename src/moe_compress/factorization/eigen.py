"""Eigenvectors of symmetric matrices, whatever the driver does, and leading singular vectors by way of them."""

from __future__ import annotations

import torch
from torch import Tensor

_SWEEPS = 4  # of subspace iteration, where there is a span to start from


def leading_left_vectors(matrix: Tensor, rank: int, start: Tensor | None = None) -> Tensor:
    """The leading left singular vectors [e, m, rank] of matrix [e, m, n], rank <= min(m, n), or near them from a start.

    By the eigenvectors of the smaller Gram side, three times as fast as an SVD here. Squaring costs only directions
    below sqrt(eps) of the largest singular value: no more than about 1e-7 of the squared norm each in fp32.

    With columns `start` [e, m, rank], an orthonormal basis of their span after subspace iteration (Halko et al. 2011,
    arXiv 0909.4061, algorithm 4.4), many times as fast again. It captures no less of the matrix than the start did:
    each sweep multiplies with a positive semi-definite matrix, which cannot lower the Rayleigh quotient.
    """
    if start is not None:
        span = torch.linalg.qr(start).Q
        for _ in range(_SWEEPS):
            span = torch.linalg.qr(matrix @ (matrix.mT @ span)).Q
        return span
    rows, columns = matrix.shape[1:]
    if rows <= columns:
        return leading_eigenvectors(matrix @ matrix.mT, rank)
    right = leading_eigenvectors(matrix.mT @ matrix, rank)
    return torch.linalg.qr(matrix @ right).Q


def leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """The eigenvectors [..., n, rank] of the largest eigenvalues of symmetric [..., n, n], the largest first."""
    return eigh(symmetric)[1][..., -rank:].flip(-1)


def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., n], ascending, and eigenvectors [..., n, n] of symmetric [..., n, n]."""
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:  # rare: the fp32 driver did not converge
        values, vectors = torch.linalg.eigh(symmetric.double())
    return values.to(symmetric.dtype), vectors.to(symmetric.dtype)


def eigenvalues(symmetric: Tensor) -> Tensor:
    """The eigenvalues [..., n] of symmetric [..., n, n], ascending."""
    try:
        return torch.linalg.eigvalsh(symmetric)
    except torch.linalg.LinAlgError:  # as above
        return torch.linalg.eigvalsh(symmetric.double()).to(symmetric.dtype)
