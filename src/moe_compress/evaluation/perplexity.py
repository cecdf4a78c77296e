"""Loss and perplexity on held-out text, and agreement with a teacher on the same tokens in the same pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_compress.config import Config
from moe_compress.data import packed_dataset
from moe_compress.errors import UserError
from moe_compress.evaluation.routing import overlap, recorded_routing

# Bounds of memory: the logits that a forward pass leaves, and the slice of them that is held in fp32.
_LOGIT_BYTES_PER_PASS = 256 * 2**20
_LOGITS_PER_CHUNK = 8 * 2**20
_ROWS_PER_PASS = 8


@dataclass
class TextScore:
    """What a model makes of a text. Standard errors are over sequences, which are independent; tokens are not.

    Attributes:
        loss: mean negative log-likelihood per token, in nats.
        stderr: standard error of `loss`.
        perplexity, perplexity_stderr: exp(loss), and its error by the delta method.
        tokens, sequences: how much text.
        sequence_losses: mean loss of each sequence, for paired comparison of models on the same text.
        kl, kl_stderr: mean KL(teacher || student) per token, in nats.
        top1_agreement, top1_stderr: share of tokens where both find the same next token most likely.
        routing: per MoE layer `entropy` (1 is balanced), `unused` experts, and, with a teacher, `agreement`.
    """

    loss: float
    stderr: float | None
    perplexity: float
    perplexity_stderr: float | None
    tokens: int
    sequences: int
    sequence_losses: list[float]
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    top1_stderr: float | None = None
    routing: dict[str, dict[str, Any]] = field(default_factory=dict)


def held_out_rows(config: Config, tokenizer: Any) -> Tensor:
    """The text of `evaluation.perplexity`, packed: `[N, L]`, int64.

    Raises:
        UserError: the data set cannot be had.
    """
    return torch.tensor(packed_dataset(config.evaluation.perplexity, tokenizer, config.seed)["input_ids"][:])


@torch.inference_mode()
def score_text(model: Any, rows: Tensor, teacher: Any = None, *, progress: bool = True) -> TextScore:
    """Score a model on packed text, and compare it with a teacher where one is given.

    Every row stands alone (no state is carried over) and predicts its tokens 2 to L from those before.

    Args:
        model: a causal language model of Transformers.
        rows: `[N, L]`, int64, token ids without padding.
        teacher: a model with the same vocabulary, on any device.
        progress: show a progress bar.

    Raises:
        UserError: the rows are shorter than two tokens or longer than the model can read, or the vocabularies differ.
    """
    if rows.ndim != 2 or rows.shape[0] == 0 or rows.shape[1] < 2:
        raise UserError(f"held-out text must be rows of at least two tokens, not of shape {list(rows.shape)}")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and rows.shape[1] > most:
        raise UserError(
            f"held-out text has rows of {rows.shape[1]} tokens and the model reads {most}; "
            f"set evaluation.perplexity.max_length to {most} or less"
        )
    models = [model] if teacher is None else [model, teacher]
    for each in models:
        each.eval()
    losses, divergences, agreements = [], [], []
    overlaps: dict[str, list[float]] = {}
    with ExitStack() as stack:
        routings = [stack.enter_context(recorded_routing(each)) for each in models]
        for batch in _progress(rows.split(_rows_per_pass(model, rows.shape[1])), len(rows), progress):
            logits = [each(input_ids=batch.to(each.device), use_cache=False).logits for each in models]
            if len(models) == 2 and logits[0].shape != logits[1].shape:
                raise UserError(
                    f"the teacher's vocabulary ({logits[1].shape[-1]}) is not the model's ({logits[0].shape[-1]})"
                )
            for row in range(len(batch)):
                targets = batch[row, 1:].to(logits[0].device)
                scores = _score_row(targets, logits[0][row, :-1], logits[1][row, :-1] if teacher is not None else None)
                losses.append(scores[0])
                divergences.append(scores[1])
                agreements.append(scores[2])
            if teacher is not None:
                for name in routings[0].keys() & routings[1].keys():
                    share = overlap(routings[0][name], routings[1][name])
                    overlaps.setdefault(name, []).extend([share] * len(batch))
    loss, stderr = _mean_and_stderr(losses)
    score = TextScore(
        loss=loss,
        stderr=stderr,
        perplexity=_exp(loss),
        perplexity_stderr=None if stderr is None else _exp(loss) * stderr,
        tokens=rows.shape[0] * (rows.shape[1] - 1),
        sequences=rows.shape[0],
        sequence_losses=losses,
    )
    if teacher is not None:
        score.kl, score.kl_stderr = _mean_and_stderr(divergences)
        score.top1_agreement, score.top1_stderr = _mean_and_stderr(agreements)
    for name, routing in routings[0].items():
        score.routing[name] = {"entropy": routing.entropy(), "unused": int((routing.counts == 0).sum())}
        if name in overlaps:
            score.routing[name]["agreement"] = sum(overlaps[name]) / len(overlaps[name])
    return score


def _score_row(targets: Tensor, logits: Tensor, teacher_logits: Tensor | None) -> tuple[float, float, float]:
    """Mean loss, KL(teacher || student) and top-1 agreement over the `[T]` targets of one row, logits `[T, V]`.

    A slice of tokens at a time, so that of a large vocabulary little is held in fp32 at once.
    """
    chunk = max(1, _LOGITS_PER_CHUNK // logits.shape[-1])
    loss, divergence, agreement = 0.0, 0.0, 0.0
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        student = logits[part].float().log_softmax(-1)
        loss -= student.gather(-1, targets[part, None]).double().sum().item()
        if teacher_logits is not None:
            reference = teacher_logits[part].to(student.device).float().log_softmax(-1)
            # xlogy-like: a token the teacher rules out (-inf) adds nothing, rather than 0 * inf.
            terms = reference.exp() * (reference - student).masked_fill(reference.isneginf(), 0.0)
            divergence += terms.double().sum().item()
            agreement += (student.argmax(-1) == reference.argmax(-1)).sum().item()
    return loss / len(targets), divergence / len(targets), agreement / len(targets)


def _rows_per_pass(model: Any, length: int) -> int:
    config = model.config.get_text_config()
    row_bytes = length * config.vocab_size * torch.finfo(model.dtype).bits // 8
    return max(1, min(_ROWS_PER_PASS, _LOGIT_BYTES_PER_PASS // row_bytes))


def _mean_and_stderr(values: list[float]) -> tuple[float, float | None]:
    tensor = torch.tensor(values, dtype=torch.float64)
    # One sequence says nothing about the spread: its standard error is unknown, not zero.
    stderr = float(tensor.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return float(tensor.mean()), stderr


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _progress(batches: Iterable[Tensor], total: int, enabled: bool) -> Iterable[Tensor]:
    from tqdm import tqdm

    with tqdm(total=total, desc="held-out text", unit="row", disable=None if enabled else True, leave=False) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
