"""The one distillation that all methods get: the product's loss on cached top-k targets, AdamW, cosine, no stages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import get_scheduler

from moe_compress.config import DistillationConfig
from moe_compress.distillation.encoders import TopKEncoder
from moe_compress.distillation.losses import distillation_loss
from moe_compress.distillation.parameters import parameter_groups
from moe_compress.files import file_in_progress


@dataclass(frozen=True)
class Training:
    """Settings of the distillation; the learning rate is searched over `learning_rates` with the first seed."""

    steps: int = 240
    batch_size: int = 4
    warmup_steps: int = 20
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    alpha: float = 0.9
    temperature: float = 1.0
    weight_decay: float = 0.01
    top_k: int = 64


@torch.inference_mode()
def cached_targets(teacher: Any, rows: Tensor, top_k: int, file: Path) -> dict[str, Tensor]:
    """The teacher's top-k log-probabilities on rows [N, L], from `file` where it exists, else written there."""
    if not file.exists():
        teacher.eval()
        encoder = TopKEncoder(top_k, teacher.config.vocab_size)
        parts = [encoder.encode(teacher(input_ids=batch, use_cache=False).logits) for batch in rows.split(4)]
        file.parent.mkdir(parents=True, exist_ok=True)
        with file_in_progress(file) as temporary:
            save_file({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, temporary)
    arrays = load_file(file)
    arrays["indices"] = arrays["indices"].astype(np.int32)  # torch cannot index unsigned integers
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def distil(
    model: Any, rows: Tensor, targets: dict[str, Tensor], training: Training, learning_rate: float, seed: int
) -> float:
    """Train all parameters of a student in place on rows [N, L], in an order that `seed` decides.

    Learning rates of embeddings, norms and routers have the product's default multipliers.

    Returns:
        The mean training loss of the last tenth of the steps.
    """
    encoder = TopKEncoder(training.top_k, model.config.vocab_size)
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
        record = encoder.decode({name: values[index] for name, values in targets.items()})
        parts = distillation_loss(logits, rows[index], record, alpha=training.alpha, temperature=training.temperature)
        parts.loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(parts.loss.detach()))
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)
