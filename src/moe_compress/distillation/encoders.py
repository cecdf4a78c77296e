"""The record of a sequence in the cache: how teacher logits become small arrays and come back as targets.

An encoder is the one place that knows the fields of its record; writer, reader and trainer treat them by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moe_compress.distillation.targets import SparseTargets, TeacherTargets
from moe_compress.errors import UserError

# Bytes of fp32 logits that encoding holds at a time, whatever batch and vocabulary.
_CHUNK_BYTES = 64 * 2**20


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned integer type that holds every id of a vocabulary."""
    return np.min_scalar_type(max(vocab_size - 1, 0))


@dataclass(frozen=True)
class Field:
    """One array of a record: `[tokens, *shape]` of `dtype`."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Encoder(Protocol):
    """Teacher logits to a record and back."""

    @property
    def name(self) -> str:
        """Its name in the manifest."""

    def settings(self) -> dict[str, Any]:
        """What the manifest says of the encoder: enough to make it again with `make_encoder`."""

    def fields(self) -> dict[str, Field]:
        """The arrays of a record."""

    def encode(self, logits: Tensor) -> dict[str, np.ndarray]:
        """Logits `[sequences, tokens, vocabulary]` to arrays `[sequences, tokens, ...]`, by field."""

    def decode(self, record: Mapping[str, Tensor]) -> TeacherTargets:
        """Arrays by field, as tensors `[..., tokens, ...]`, to targets on the same device."""


@dataclass(frozen=True)
class TopKEncoder:
    """The k largest logits and the mass of the rest.

    Values are kept as log-probabilities, `logit - logsumexp`, in float16, together with the logsumexp in float32: the
    same information as the raw logits, but float16 is finest near zero, where the probable tokens now are (a
    probability of 0.9 is off by 2e-5 instead of 8e-3 at a raw logit of 20). The tail is kept at two temperatures,
    because its mass at T=2 cannot be told from its mass at T=1.
    """

    top_k: int
    vocab_size: int
    name: str = "topk"

    def settings(self) -> dict[str, Any]:
        return {"encoder": self.name, "top_k": self.top_k, "vocab_size": self.vocab_size, "dtype": "float16"}

    def fields(self) -> dict[str, Field]:
        half, single = np.dtype(np.float16), np.dtype(np.float32)
        return {
            "indices": Field((self.top_k,), token_dtype(self.vocab_size)),
            "log_probs": Field((self.top_k,), half),
            "logsumexp": Field((), single),
            "log_tail": Field((2,), half),
        }

    @torch.no_grad()
    def encode(self, logits: Tensor) -> dict[str, np.ndarray]:
        """Logits `[sequences, tokens, vocabulary]` to arrays `[sequences, tokens, ...]`, by field.

        Raises:
            UserError: the teacher's logits are not finite.
        """
        tokens = logits.flatten(0, -2)
        chunks = []
        for chunk in tokens.split(max(1, _CHUNK_BYTES // (4 * self.vocab_size))):
            log_probs = chunk.float()
            logsumexp = log_probs.logsumexp(-1)
            if not torch.isfinite(logsumexp).all():
                raise UserError(
                    "the teacher's logits are not finite; set model.dtype=float32 or check the teacher's weights"
                )
            log_probs = log_probs - logsumexp.unsqueeze(-1)
            top, indices = log_probs.topk(self.top_k, dim=-1)
            rest = log_probs.scatter_(-1, indices, -math.inf)
            log_tail = torch.stack([rest.logsumexp(-1), (rest / 2).logsumexp(-1)], -1)
            chunks.append((indices.cpu(), top.cpu(), logsumexp.cpu(), log_tail.cpu()))
        arrays = [torch.cat(parts).numpy() for parts in zip(*chunks, strict=True)]
        lead = tuple(logits.shape[:-1])
        return {
            name: array.reshape(lead + field.shape).astype(field.dtype)
            for (name, field), array in zip(self.fields().items(), arrays, strict=True)
        }

    def decode(self, record: Mapping[str, Tensor]) -> SparseTargets:
        return SparseTargets(
            indices=record["indices"].long(),
            log_probs=record["log_probs"].float(),
            logsumexp=record["logsumexp"].float(),
            log_tail=record["log_tail"].float(),
        )


def make_encoder(settings: Mapping[str, Any]) -> Encoder:
    """The encoder that a manifest names.

    Raises:
        UserError: this version knows no such encoder, or `top_k` does not fit the vocabulary.
    """
    if settings["encoder"] != TopKEncoder.name:
        raise UserError(
            f"teacher cache: unknown encoder '{settings['encoder']}'; this version reads: {TopKEncoder.name}"
        )
    top_k, vocab_size = settings["top_k"], settings["vocab_size"]
    if not 1 <= top_k <= vocab_size:
        raise UserError(
            f"distillation.teacher.generation.top_k={top_k} must be between 1 and the vocabulary size {vocab_size}"
        )
    return TopKEncoder(top_k=top_k, vocab_size=vocab_size)
