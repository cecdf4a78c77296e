"""How teacher logits become small arrays and come back as targets.

An encoder is the one place that knows the fields it writes; writer, reader and trainer treat them by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moe_compress.config import GenerationConfig
from moe_compress.distillation.chunks import HeadLogits
from moe_compress.distillation.records import ENTRIES, Field, Record, token_dtype
from moe_compress.distillation.targets import SampledTargets, SparseTargets
from moe_compress.errors import UserError

# Bytes of fp32 logits that encoding holds at a time, whatever sequence length and vocabulary.
_CHUNK_BYTES = 64 * 2**20

# Keeps the random numbers of the draws apart from others that are seeded by (seed, number).
_DRAWS = 0x6B64


class Encoder(Protocol):
    """Teacher logits to fields of a record and back."""

    @property
    def name(self) -> str:
        """Its name in the manifest."""

    @property
    def vocab_size(self) -> int:
        """Ids that its targets cover."""

    def fields(self) -> dict[str, Field]:
        """The arrays it adds to a record."""

    def encode(self, logits: Tensor | HeadLogits, sequence: int) -> Record:
        """Logits `[targets, vocabulary]` of sequence number `sequence` to arrays `[targets, ...]`, by field.

        Raises:
            UserError: the logits are not finite.
        """

    def decode(self, record: Mapping[str, Tensor]) -> SparseTargets | SampledTargets:
        """Arrays by field, as tensors `[..., tokens, ...]`, to targets on the same device."""

    def distance(self, targets: Any, logits: Tensor) -> float:
        """How far decoded targets `[n, ...]` are from logits `[n, vocabulary]`: near 0 if they were made from them."""

    @property
    def temperatures(self) -> str:
        """The temperatures that a loss can ask for, in words."""


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
    temperatures = "any; exact at 1 and 2"

    def fields(self) -> dict[str, Field]:
        half, single = np.dtype(np.float16), np.dtype(np.float32)
        return {
            "indices": Field((self.top_k,), token_dtype(self.vocab_size)),
            "log_probs": Field((self.top_k,), half),
            "logsumexp": Field((), single),
            "log_tail": Field((2,), half),
        }

    @torch.no_grad()
    def encode(self, logits: Tensor | HeadLogits, sequence: int) -> Record:
        chunks: list[tuple[Tensor, ...]] = []
        for log_probs, logsumexp in _log_probs(logits):
            top, indices = log_probs.topk(self.top_k, dim=-1)
            rest = log_probs.scatter_(-1, indices, -math.inf)
            log_tail = torch.stack([rest.logsumexp(-1), (rest / 2).logsumexp(-1)], -1)
            chunks.append((indices, top, logsumexp, log_tail))
        return _record(self.fields(), chunks)

    def decode(self, record: Mapping[str, Tensor]) -> SparseTargets:
        return SparseTargets(
            indices=record["indices"].long(),
            log_probs=record["log_probs"].float(),
            logsumexp=record["logsumexp"].float(),
            log_tail=record["log_tail"].float(),
            vocab_size=self.vocab_size,
        )

    @torch.no_grad()
    def distance(self, targets: SparseTargets, logits: Tensor) -> float:
        """Total variation between the stored and the given distribution, over the k tokens: mean over tokens."""
        now = logits.float().log_softmax(-1).gather(-1, targets.indices).exp()
        return float((now - targets.log_probs.exp()).abs().sum(-1).mean() / 2)


@dataclass(frozen=True)
class SampleEncoder:
    """Draws with replacement from the teacher's distribution at a temperature (random-sampling KD, arXiv 2503.16870).

    Kept are the different ids and how often each was drawn; where the temperature is not 1 also the log of p/q, the
    importance weight that makes draws from q an unbiased sample of p. The entropy turns cross-entropy into KL.
    The draws depend on the seed, the number of the sequence and the logits alone: not on worker, batch or device.
    """

    samples: int
    sample_temperature: float
    seed: int
    vocab_size: int
    name: str = "sample"

    @property
    def temperatures(self) -> str:
        return "1" if self.sample_temperature == 1 else f"1 and {self.sample_temperature:g}"

    def fields(self) -> dict[str, Field]:
        half, count = np.dtype(np.float16), np.min_scalar_type(self.samples)
        fields = {
            ENTRIES: Field((), count),
            "indices": Field((self.samples,), token_dtype(self.vocab_size), "entry"),
            "counts": Field((self.samples,), count, "entry"),
            "entropy": Field((2,), half),
        }
        if self.sample_temperature != 1:
            fields["log_ratio"] = Field((self.samples,), half, "entry")
        return fields

    @torch.no_grad()
    def encode(self, logits: Tensor | HeadLogits, sequence: int) -> Record:
        generator = np.random.default_rng([self.seed, _DRAWS, sequence])
        # fp64: in fp32 a cumulative sum over a large vocabulary loses the rare tokens.
        uniform = torch.from_numpy(generator.random((len(logits), self.samples))).to(logits.device)
        chunks: list[tuple[Tensor, ...]] = []
        done = 0
        for log_p, _ in _log_probs(logits):
            log_q = log_p if self.sample_temperature == 1 else (log_p / self.sample_temperature).log_softmax(-1)
            q = log_q.exp()
            cumulative = q.cumsum(-1, dtype=torch.float64)
            point = uniform[done : done + len(log_p)] * cumulative[:, -1:]
            done += len(log_p)
            drawn = torch.searchsorted(cumulative, point, right=True).clamp_(max=self.vocab_size - 1)
            drawn = drawn.sort(-1).values
            group = torch.zeros_like(drawn)
            group[:, 1:] = (drawn[:, 1:] != drawn[:, :-1]).cumsum(-1)
            indices = torch.zeros_like(drawn).scatter_(1, group, drawn)
            counts = torch.zeros_like(drawn).scatter_add_(1, group, torch.ones_like(drawn))
            entropy = _entropy(q)
            of_p = entropy if self.sample_temperature == 1 else _entropy(log_p.exp())
            parts: tuple[Tensor, ...] = (group[:, -1] + 1, indices, counts, torch.stack([of_p, entropy], -1))
            if self.sample_temperature != 1:
                parts = (*parts, (log_p - log_q).gather(-1, indices))
            chunks.append(parts)
        return _record(self.fields(), chunks)

    def decode(self, record: Mapping[str, Tensor]) -> SampledTargets:
        counts = record["counts"].float()
        ratio = record.get("log_ratio")
        return SampledTargets(
            indices=record["indices"].long(),
            shares=counts / self.samples,
            log_ratio=torch.zeros_like(counts) if ratio is None else ratio.float(),
            entropy=record["entropy"].float(),
            temperature=self.sample_temperature,
            vocab_size=self.vocab_size,
        )

    @torch.no_grad()
    def distance(self, targets: SampledTargets, logits: Tensor) -> float:
        """Mean difference of the entropies in nats, or by how much the draws' likelihood is beyond chance off it."""
        log_q = (logits.float() / self.sample_temperature).log_softmax(-1)
        entropy = _entropy(log_q.exp())
        excess = -(targets.shares * log_q.gather(-1, targets.indices)).sum(-1) - entropy
        chance = 4 * excess.std() / math.sqrt(len(excess)) if len(excess) > 1 else math.inf
        return max(float((entropy - targets.entropy[:, 1]).abs().mean()), float(excess.mean().abs() - chance))


def encoder_settings(generation: GenerationConfig, seed: int) -> dict[str, Any]:
    """What the settings of a run say of the encoder; with `vocab_size` it is what `make_encoder` takes."""
    encoder = _ENCODERS[generation.encoder]
    every = {**asdict(generation), "seed": seed}
    return {"encoder": encoder.name} | {name: every[name] for name in _options(encoder) - {"vocab_size"}}


def make_encoder(settings: Mapping[str, Any]) -> Encoder:
    """The encoder that a manifest names.

    Raises:
        UserError: this version knows no such encoder, or its settings are missing or do not fit the vocabulary.
    """
    encoder = _ENCODERS.get(settings["encoder"])
    if encoder is None:
        raise UserError(
            f"teacher cache: unknown encoder '{settings['encoder']}'; this version reads: {', '.join(_ENCODERS)}"
        )
    missing = _options(encoder) - settings.keys()
    if missing:
        raise UserError(f"teacher cache: the manifest does not say {', '.join(sorted(missing))}; make the cache again")
    made = encoder(**{name: settings[name] for name in _options(encoder)})
    if isinstance(made, TopKEncoder) and not 1 <= made.top_k <= made.vocab_size:
        raise UserError(
            f"distillation.teacher.generation.top_k={made.top_k} must be between 1 and the vocabulary size "
            f"{made.vocab_size}"
        )
    return made


_ENCODERS: dict[str, type[TopKEncoder] | type[SampleEncoder]] = {
    TopKEncoder.name: TopKEncoder,
    SampleEncoder.name: SampleEncoder,
}


def _options(encoder: type[TopKEncoder] | type[SampleEncoder]) -> set[str]:
    return {field.name for field in fields(encoder)} - {"name"}


def _log_probs(logits: Tensor | HeadLogits) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of logits `[targets, vocabulary]` as log-probabilities fp32, and their logsumexp."""
    for chunk in logits.split(max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))):
        log_probs = chunk.float()
        logsumexp = log_probs.logsumexp(-1)
        if not torch.isfinite(logsumexp).all():
            raise UserError(
                "the teacher's logits are not finite; set model.dtype=float32 or check the teacher's weights"
            )
        yield log_probs - logsumexp.unsqueeze(-1), logsumexp


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(-1)


def _record(fields: Mapping[str, Field], chunks: list[tuple[Tensor, ...]]) -> Record:
    """Chunks of tensors, in the order of the fields, as arrays of the fields' types."""
    columns = zip(*chunks, strict=True)
    return {
        name: torch.cat(parts).cpu().numpy().astype(field.dtype)
        for (name, field), parts in zip(fields.items(), columns, strict=True)
    }
