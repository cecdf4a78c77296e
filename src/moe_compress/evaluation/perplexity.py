"""Loss and perplexity on held-out text, and agreement with a teacher on the same tokens in the same pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_compress.config import Config
from moe_compress.data import rows_in_memory
from moe_compress.errors import UserError
from moe_compress.evaluation.routing import LayerRouting, overlap, recorded_routing
from moe_compress.evaluation.scores import TextScore
from moe_compress.evaluation.teacher_text import TeacherRows, TeacherText, TeacherTextWriter

# Bounds of memory: the logits that a forward pass leaves, and the slice of them that is held in fp32.
_LOGIT_BYTES_PER_PASS = 256 * 2**20
_LOGITS_PER_CHUNK = 8 * 2**20
_ROWS_PER_PASS = 8


def held_out_rows(config: Config, tokenizer: Any) -> Tensor:
    """The token ids of `held_out_text`."""
    return held_out_text(config, tokenizer)[0]


def held_out_text(config: Config, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The text of `evaluation.perplexity`, packed: token ids, `[N, L]`, int64, and which of them count, `[N, L]`, bool.

    Raises:
        UserError: the data set cannot be had, has no end, or is to be read in another way than end to end.
    """
    text = config.evaluation.perplexity
    if text.packing != "pack":
        raise UserError(
            f"evaluation.perplexity.packing is {text.packing}, but held-out text is read end to end; set it to pack"
        )
    rows = rows_in_memory(text, tokenizer, config.seed)
    ids, labelled = (torch.from_numpy(np.stack([row[name] for row in rows])) for name in ("input_ids", "labelled"))
    return ids.long(), labelled


@torch.inference_mode()
def score_text(
    model: Any,
    rows: Tensor,
    teacher: TeacherText | None = None,
    *,
    labelled: Tensor | None = None,
    vocabulary: int | None = None,
    keep: TeacherTextWriter | None = None,
    progress: bool = True,
) -> TextScore:
    """Score a model on packed text, and compare it with a teacher on the same text where one is given.

    Every row stands alone (no state is carried over) and predicts its tokens 2 to L from those before.

    Args:
        model: a causal language model of Transformers.
        rows: `[N, L]`, int64, token ids without padding.
        teacher: what a teacher with the same vocabulary makes of the same rows.
        labelled: `[N, L]`, bool, the tokens to predict; all without it.
        vocabulary: the ids to compare both on, the first so many, where their vocabularies are padded to different
            sizes (see `common_vocabulary`).
        keep: where to write what this model makes of them, to compare others with it.
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
    model.eval()
    labels = torch.ones(rows.shape, dtype=torch.bool)[:, 1:] if labelled is None else labelled[:, 1:].cpu()
    losses, divergences, agreements = [], [], []
    overlaps: dict[str, float] = {}
    with recorded_routing(model) as routing:
        start = 0
        for batch in _progress(rows.split(_rows_per_pass(model, rows.shape[1])), len(rows), progress):
            logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1]
            if teacher is not None and vocabulary is None and logits.shape[-1] != teacher.vocabulary:
                raise UserError(
                    f"the teacher's vocabulary ({teacher.vocabulary}) is not the model's ({logits.shape[-1]})"
                )
            theirs = None if teacher is None else teacher.read(start, start + len(batch))
            for row in range(len(batch)):
                places = labels[start + row].nonzero().flatten()
                scores = _score_row(batch[row, 1:].to(logits.device), logits[row], theirs, row, places, vocabulary)
                losses.append(scores[0])
                divergences.append(scores[1])
                agreements.append(scores[2])
                if keep is not None:
                    keep.add(logits[row], {name: layer.of_row(row, len(batch)) for name, layer in routing.items()})
            for name in routing.keys() & (theirs.routing if theirs is not None else {}).keys():
                share = overlap(routing[name], theirs.routing[name])  # type: ignore[union-attr]
                overlaps[name] = overlaps.get(name, 0.0) + share * len(batch) / len(rows)
            start += len(batch)
    counts = labels.sum(-1)
    loss, stderr = _mean_and_stderr(losses, counts)
    score = TextScore(
        loss=loss,
        stderr=stderr,
        perplexity=_exp(loss),
        perplexity_stderr=None if stderr is None else _exp(loss) * stderr,
        tokens=int(counts.sum()),
        sequences=rows.shape[0],
        sequence_losses=losses,
        sequence_tokens=counts.tolist() if len(counts.unique()) > 1 else [],
    )
    if teacher is not None:
        score.kl, score.kl_stderr = _mean_and_stderr(divergences, counts)
        score.top1_agreement, score.top1_stderr = _mean_and_stderr(agreements, counts)
    _add_routing(score, routing, overlaps)
    return score


def _score_row(
    targets: Tensor,
    logits: Tensor,
    teacher: TeacherRows | None,
    row: int = 0,
    places: Tensor | None = None,
    vocabulary: int | None = None,
) -> tuple[float, float, float]:
    """Mean loss, KL(teacher || student) and top-1 agreement over the `[T]` targets of one row, or those at `places`.

    Of the logits, `[T, V]`, a few tokens at a time, so that of a large vocabulary little is held in fp32 at once.
    """
    places = torch.arange(len(targets)) if places is None else places
    chunk = max(1, _LOGITS_PER_CHUNK // logits.shape[-1])
    loss, divergence, agreement = 0.0, 0.0, 0.0
    for part in places.split(chunk):
        student = logits[part].float().log_softmax(-1)
        loss -= student.gather(-1, targets[part, None]).double().sum().item()
        if teacher is not None:
            if vocabulary is not None and vocabulary < student.shape[-1]:
                student = student[:, :vocabulary].log_softmax(-1)
            divergence += teacher.divergence(row, part, student).double().sum().item()
            agreement += (student.argmax(-1) == teacher.top[row, part].to(student.device)).sum().item()
    return loss / len(places), divergence / len(places), agreement / len(places)


def _add_routing(score: TextScore, routing: dict[str, LayerRouting], overlaps: dict[str, float]) -> None:
    for name, layer in routing.items():
        score.routing[name] = {
            "entropy": layer.entropy(),
            "largest": layer.largest_load(),
            "unused": int((layer.counts == 0).sum()),
        }
        if name in overlaps:
            score.routing[name]["agreement"] = overlaps[name]
    if score.routing:
        score.load_entropy = sum(layer["entropy"] for layer in score.routing.values()) / len(score.routing)
    if overlaps:
        score.routing_agreement = sum(overlaps.values()) / len(overlaps)


def _rows_per_pass(model: Any, length: int) -> int:
    config = model.config.get_text_config()
    row_bytes = length * config.vocab_size * torch.finfo(model.dtype).bits // 8
    return max(1, min(_ROWS_PER_PASS, _LOGIT_BYTES_PER_PASS // row_bytes))


def _mean_and_stderr(values: list[float], counts: Tensor) -> tuple[float, float | None]:
    """The mean over all tokens of the sequences' means, `[N]`, over `counts` tokens each, and its standard error."""
    tensor, weight = torch.tensor(values, dtype=torch.float64), counts / counts.double().mean()
    mean = (weight * tensor).mean()
    # One sequence says nothing about the spread: its standard error is unknown, not zero.
    many = len(values)
    stderr = (weight * (tensor - mean)).square().sum().div(many * (many - 1)).sqrt() if many > 1 else None
    return float(mean), None if stderr is None else float(stderr)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _progress(batches: Iterable[Tensor], total: int, enabled: bool) -> Iterable[Tensor]:
    from tqdm import tqdm

    with tqdm(total=total, desc="held-out text", unit="row", disable=None if enabled else True, leave=False) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
