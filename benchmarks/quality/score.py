"""Loss, KL to the teacher and top-1 agreement on packed text; the teacher's side is computed once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

_ROWS = 8


@torch.inference_mode()
def teacher_log_probs(teacher: Any, rows: Tensor) -> list[Tensor]:
    """The teacher's log-probabilities, [rows, L - 1, V] for each batch of `rows` [N, L]."""
    teacher.eval()
    return [log_softmax(teacher(input_ids=b, use_cache=False).logits[:, :-1].float(), -1) for b in rows.split(_ROWS)]


@torch.inference_mode()
def score(model: Any, rows: Tensor, teacher: list[Tensor]) -> dict[str, float]:
    """`loss`, `perplexity`, `kl` (teacher || student, nats per token) and `top1` of a model on rows [N, L]."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch, reference in zip(rows.split(_ROWS), teacher, strict=True):
        found = log_softmax(model(input_ids=batch, use_cache=False).logits[:, :-1].float(), -1)
        sums[0] -= found.gather(-1, batch[:, 1:, None]).sum(dtype=torch.float64)
        sums[1] += (reference.exp() * (reference - found)).sum(dtype=torch.float64)
        sums[2] += (found.argmax(-1) == reference.argmax(-1)).sum()
    loss, kl, top1 = (sums / (rows.shape[0] * (rows.shape[1] - 1))).tolist()
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "kl": kl, "top1": top1}
