"""The one distillation that all methods get: cross-entropy and KL to cached top-k targets, AdamW, cosine, no stages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import get_scheduler

from moe_compress.config import DistillationConfig
from moe_compress.distillation.parameters import parameter_groups
from moe_compress.files import file_in_progress


@dataclass(frozen=True)
class Training:
    """Settings of the distillation; the learning rate is searched over `learning_rates` with the first seed."""

    steps: int = 120
    batch_size: int = 4
    warmup_steps: int = 20
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    alpha: float = 0.9
    weight_decay: float = 0.01
    top_k: int = 64


@torch.inference_mode()
def cached_targets(teacher: Any, rows: Tensor, top_k: int, file: Path) -> dict[str, Tensor]:
    """What the teacher says on rows [N, L], from `file` where it exists, else written there.

    Returns:
        `indices` int32 and `log_probs` fp16 [N, L, k] of the most probable tokens; `tail` fp16 [N, L], the log
        of the probability of all others.
    """
    if not file.exists():
        teacher.eval()
        parts: dict[str, list[Tensor]] = {"indices": [], "log_probs": [], "tail": []}
        for batch in rows.split(4):
            log_probs = teacher(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
            top, indices = log_probs.topk(top_k, dim=-1)
            parts["indices"].append(indices.int())
            parts["log_probs"].append(top.half())
            parts["tail"].append(log_probs.scatter(-1, indices, -math.inf).logsumexp(-1).half())
        file.parent.mkdir(parents=True, exist_ok=True)
        with file_in_progress(file) as temporary:
            save_file({name: torch.cat(values) for name, values in parts.items()}, temporary)
    return load_file(file)


def loss(logits: Tensor, rows: Tensor, targets: dict[str, Tensor], alpha: float) -> Tensor:
    """(1 - alpha) * cross-entropy + alpha * KL(teacher || student), where all tokens but the top-k are one class.

    Args:
        logits: the student's, [B, L, V].
        rows: [B, L] token ids; position t predicts the token at t + 1.
        targets: of these rows, see `cached_targets`.
    """
    log_q = logits[:, :-1].float().log_softmax(-1)
    entropy = -log_q.gather(-1, rows[:, 1:, None]).mean()
    top, indices, tail = (targets[name][:, :-1] for name in ("log_probs", "indices", "tail"))
    head_q = log_q.gather(-1, indices.long())
    tail_q = log_q.scatter(-1, indices.long(), -math.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat([top, tail[..., None]], -1).float()
    divergence = (log_p.exp() * (log_p - torch.cat([head_q, tail_q], -1))).sum(-1).mean()
    return (1 - alpha) * entropy + alpha * divergence


def distil(
    model: Any, rows: Tensor, targets: dict[str, Tensor], training: Training, learning_rate: float, seed: int
) -> float:
    """Train all parameters of a student in place on rows [N, L], in an order that `seed` decides.

    Learning rates of embeddings, norms and routers have the product's default multipliers.

    Returns:
        The mean training loss of the last tenth of the steps.
    """
    defaults = DistillationConfig()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.numel()]
    groups = parameter_groups(
        named,
        trainable=[".*"],
        multipliers=defaults.parameter_lr_multipliers,
        default_multiplier=defaults.default_lr_multiplier,
        stage="benchmark",
    )
    for _, parameter in named:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": group.parameters,
                "lr": learning_rate * group.lr_multiplier,
                "weight_decay": training.weight_decay if group.decay else 0.0,
            }
            for group in groups
        ]
    )
    schedule = get_scheduler("cosine", optimizer, training.warmup_steps, training.steps)
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(training.steps * training.batch_size / len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])
    model.train()
    losses = []
    for index in order.split(training.batch_size)[: training.steps]:
        logits = model(input_ids=rows[index], use_cache=False).logits
        chosen = {name: values[index] for name, values in targets.items()}
        step_loss = loss(logits, rows[index], chosen, training.alpha)
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(step_loss.item())
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def next_rates(grid: tuple[float, ...], losses: dict[float, float]) -> tuple[float, ...]:
    """The learning rates to try next, given the validation losses so far; empty once the best has worse neighbours.

    Every method gets the same search: the middle two of an ascending grid, then outwards from the best while that
    helps, so that a grid of any width costs one rate more than the steps from its middle to the best.
    """
    if not losses:
        middle = (len(grid) - 1) // 2
        return grid[middle : middle + 2]
    best = grid.index(min(losses, key=losses.__getitem__))
    return tuple(rate for rate in grid[max(0, best - 1) : best + 2] if rate not in losses)
