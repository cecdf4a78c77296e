"""What a teacher says about each token: its logits (`DenseTargets`, from a live model), the largest of them
(`SparseTargets`) or random draws (`SampledTargets`), both from a cache.

All may cover fewer ids than the student's logits, or more, where one of the two vocabularies is padded: the loss
compares the ids that both have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self, cast

from torch import Tensor

from moe_compress.errors import UserError


class _Targets:
    """A dataclass of tensors that all begin with the same dimensions, one place for each token."""

    def flatten(self) -> Self:
        """All leading dimensions as one: `[tokens, ...]`."""
        leading = next(iter(self._tensors().values())).dim() - 1
        return self._each(lambda tensor: tensor.flatten(0, leading - 1))

    def rows(self, index: Tensor) -> Self:
        """The tokens `index` (int64 `[n]`) of flattened targets."""
        return self._each(lambda tensor: tensor.index_select(0, index))

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(cast(Any, self), **{name: change(tensor) for name, tensor in self._tensors().items()})


@dataclass(frozen=True)
class DenseTargets(_Targets):
    """The teacher's logits over the whole vocabulary.

    Attributes:
        logits: `[..., vocabulary]`, any floating type.
    """

    logits: Tensor

    @property
    def vocab_size(self) -> int:
        """Ids covered."""
        return self.logits.shape[-1]

    def cut(self, vocab_size: int) -> DenseTargets:
        """Without the ids from `vocab_size` on."""
        return DenseTargets(self.logits[..., :vocab_size])


@dataclass(frozen=True)
class SparseTargets(_Targets):
    """The teacher's k most probable tokens, and the mass of all others.

    Attributes:
        indices: int64 `[..., k]`, token ids, most probable first.
        log_probs: fp32 `[..., k]`, log-probabilities at T=1, normalized over the whole vocabulary.
        logsumexp: fp32 `[...]`, logsumexp of the raw logits over the whole vocabulary (`log_probs + logsumexp` are
            the raw logits).
        log_tail: fp32 `[..., 2]`, for T=1 and T=2 the log of the sum of `exp(log-probability / T)` over the tokens that
            are not among the k; minus infinity where k is the whole vocabulary.
        vocab_size: ids covered; None means as many as the student has.
    """

    indices: Tensor
    log_probs: Tensor
    logsumexp: Tensor
    log_tail: Tensor
    vocab_size: int | None = None

    @property
    def logits(self) -> Tensor:
        """The raw logits of the k tokens, fp32 `[..., k]`."""
        return self.log_probs + self.logsumexp.unsqueeze(-1)


@dataclass(frozen=True)
class SampledTargets(_Targets):
    """Random draws from the teacher's distribution q at `temperature` (random-sampling KD, arXiv 2503.16870).

    The expectation over the draws of the weight that `at` gives to each id is its probability exactly. So the expected
    gradient of the loss is that of the dense cross-entropy, whatever the number of draws.

    Attributes:
        indices: int64 `[..., n]`, the different ids drawn; where there are fewer than n, zeros with share 0.
        shares: fp32 `[..., n]`, share of the draws that gave the id.
        log_ratio: fp32 `[..., n]`, log of p/q of the id, where p is the teacher's distribution at T=1.
        entropy: fp32 `[..., 2]`, of p and of q.
        temperature: of q.
        vocab_size: ids covered; None means as many as the student has.
    """

    indices: Tensor
    shares: Tensor
    log_ratio: Tensor
    entropy: Tensor
    temperature: float = 1.0
    vocab_size: int | None = None

    def at(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Unbiased weights of the ids `[..., n]` and the entropy `[...]` of the distribution at a temperature.

        The draws themselves at the temperature that was drawn from; at T=1 importance weights p/q times the shares,
        which do not add up to 1 token by token, only in expectation.

        Raises:
            UserError: another temperature, for which the normalization of the distribution is not known.
        """
        if temperature == self.temperature:
            return self.shares, self.entropy[..., 1]
        if temperature == 1:
            return self.shares * self.log_ratio.exp(), self.entropy[..., 0]
        raise UserError(
            f"the teacher cache holds draws at temperature {self.temperature:g}, which say nothing of temperature "
            f"{temperature:g}; set distillation.loss.temperature to 1 or {self.temperature:g}"
        )

    def cut(self, vocab_size: int) -> SampledTargets:
        """Without the ids from `vocab_size` on, which must be padding."""
        outside = self.indices >= vocab_size
        return replace(
            self,
            indices=self.indices.masked_fill(outside, 0),
            shares=self.shares.masked_fill(outside, 0),
            vocab_size=vocab_size,
        )


TeacherTargets = DenseTargets | SparseTargets | SampledTargets
