"""What a teacher says about each token: `SparseTargets` from a cache, `DenseTargets` from a live model.

Both hold the distribution at temperature 1; the loss tempers it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's logits over the whole vocabulary.

    Attributes:
        logits: `[..., vocabulary]`, any floating type.
    """

    logits: Tensor

    def flatten(self) -> DenseTargets:
        """All leading dimensions as one: `[tokens, vocabulary]`."""
        return DenseTargets(self.logits.flatten(0, -2))

    def rows(self, index: Tensor) -> DenseTargets:
        """The tokens `index` (int64 `[n]`) of flattened targets."""
        return DenseTargets(self.logits.index_select(0, index))


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's k most probable tokens, and the mass of all others.

    Attributes:
        indices: int64 `[..., k]`, token ids, most probable first.
        log_probs: fp32 `[..., k]`, log-probabilities at T=1, normalized over the whole vocabulary.
        logsumexp: fp32 `[...]`, logsumexp of the raw logits over the whole vocabulary (`log_probs + logsumexp` are
            the raw logits).
        log_tail: fp32 `[..., 2]`, for T=1 and T=2 the log of the sum of `exp(log-probability / T)` over the tokens that
            are not among the k; minus infinity where k is the whole vocabulary.
    """

    indices: Tensor
    log_probs: Tensor
    logsumexp: Tensor
    log_tail: Tensor

    @property
    def logits(self) -> Tensor:
        """The raw logits of the k tokens, fp32 `[..., k]`."""
        return self.log_probs + self.logsumexp.unsqueeze(-1)

    def flatten(self) -> SparseTargets:
        """All leading dimensions as one: `[tokens, ...]`."""
        return SparseTargets(
            self.indices.flatten(0, -2),
            self.log_probs.flatten(0, -2),
            self.logsumexp.flatten(),
            self.log_tail.flatten(0, -2),
        )

    def rows(self, index: Tensor) -> SparseTargets:
        """The tokens `index` (int64 `[n]`) of flattened targets."""
        return SparseTargets(
            self.indices.index_select(0, index),
            self.log_probs.index_select(0, index),
            self.logsumexp.index_select(0, index),
            self.log_tail.index_select(0, index),
        )


TeacherTargets = DenseTargets | SparseTargets
