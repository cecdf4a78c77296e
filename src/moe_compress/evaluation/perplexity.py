"""Loss and perplexity on held-out text, and agreement with a teacher on the same tokens in the same pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moe_compress.config import Config
from moe_compress.data import packed_dataset
from moe_compress.errors import UserError
from moe_compress.evaluation.routing import LayerRouting, overlap, recorded_routing
from moe_compress.evaluation.scores import TextScore
from moe_compress.evaluation.teacher_text import TeacherRows, TeacherText, TeacherTextWriter

# Bounds of memory: the logits that a forward pass leaves, and the slice of them that is held in fp32.
_LOGIT_BYTES_PER_PASS = 256 * 2**20
_LOGITS_PER_CHUNK = 8 * 2**20
_ROWS_PER_PASS = 8


def held_out_rows(config: Config, tokenizer: Any) -> Tensor:
    """The text of `evaluation.perplexity`, packed: `[N, L]`, int64.

    Raises:
        UserError: the data set cannot be had, or is to be read in another way than end to end.
    """
    text = config.evaluation.perplexity
    if text.packing != "pack":
        raise UserError(
            f"evaluation.perplexity.packing is {text.packing}, but held-out text is read end to end; set it to pack"
        )
    return torch.tensor(packed_dataset(text, tokenizer, config.seed)["input_ids"][:])


@torch.inference_mode()
def score_text(
    model: Any,
    rows: Tensor,
    teacher: TeacherText | None = None,
    *,
    keep: TeacherTextWriter | None = None,
    progress: bool = True,
) -> TextScore:
    """Score a model on packed text, and compare it with a teacher on the same text where one is given.

    Every row stands alone (no state is carried over) and predicts its tokens 2 to L from those before.

    Args:
        model: a causal language model of Transformers.
        rows: `[N, L]`, int64, token ids without padding.
        teacher: what a teacher with the same vocabulary makes of the same rows.
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
    losses, divergences, agreements = [], [], []
    overlaps: dict[str, float] = {}
    with recorded_routing(model) as routing:
        start = 0
        for batch in _progress(rows.split(_rows_per_pass(model, rows.shape[1])), len(rows), progress):
            logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1]
            if teacher is not None and logits.shape[-1] != teacher.vocabulary:
                raise UserError(
                    f"the teacher's vocabulary ({teacher.vocabulary}) is not the model's ({logits.shape[-1]})"
                )
            theirs = None if teacher is None else teacher.read(start, start + len(batch))
            for row in range(len(batch)):
                scores = _score_row(batch[row, 1:].to(logits.device), logits[row], theirs, row)
                losses.append(scores[0])
                divergences.append(scores[1])
                agreements.append(scores[2])
                if keep is not None:
                    keep.add(logits[row], {name: layer.of_row(row, len(batch)) for name, layer in routing.items()})
            for name in routing.keys() & (theirs.routing if theirs is not None else {}).keys():
                share = overlap(routing[name], theirs.routing[name])  # type: ignore[union-attr]
                overlaps[name] = overlaps.get(name, 0.0) + share * len(batch) / len(rows)
            start += len(batch)
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
    _add_routing(score, routing, overlaps)
    return score


def _score_row(
    targets: Tensor, logits: Tensor, teacher: TeacherRows | None, row: int = 0
) -> tuple[float, float, float]:
    """Mean loss, KL(teacher || student) and top-1 agreement over the `[T]` targets of one row, logits `[T, V]`.

    A slice of tokens at a time, so that of a large vocabulary little is held in fp32 at once.
    """
    chunk = max(1, _LOGITS_PER_CHUNK // logits.shape[-1])
    loss, divergence, agreement = 0.0, 0.0, 0.0
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        student = logits[part].float().log_softmax(-1)
        loss -= student.gather(-1, targets[part, None]).double().sum().item()
        if teacher is not None:
            divergence += teacher.divergence(row, part, student).double().sum().item()
            agreement += (student.argmax(-1) == teacher.top[row, part].to(student.device)).sum().item()
    return loss / len(targets), divergence / len(targets), agreement / len(targets)


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
