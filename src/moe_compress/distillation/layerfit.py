"""The training of one compressed MoE layer towards the outputs of the layer it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from moe_compress.config import TrainingConfig
from moe_compress.distillation.parameters import ParameterGroup
from moe_compress.distillation.stages import Stage
from moe_compress.modeling.experts import SharedCoreExperts


class LayerFit:
    """A compressed experts module with its optimizer, taught by what a hook on the original module sees.

    The error of a step is the squared distance of the two outputs over the squared norm of the original's, the mean
    over its batches.

    Args:
        module: the compressed experts, in fp32, on the device of the original ones.
        groups: the parameters of it that train.
        stage: steps, learning rate and schedule.
        training: AdamW, clipping and autocast.
    """

    def __init__(
        self, module: SharedCoreExperts, groups: Sequence[ParameterGroup], stage: Stage, training: TrainingConfig
    ) -> None:
        self.module = module.train()
        self.training = training
        chosen = [parameter for group in groups for parameter in group.parameters]
        module.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        self.parameters = chosen
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": group.parameters,
                    "lr": stage.learning_rate * group.lr_multiplier,
                    "weight_decay": training.weight_decay if group.decay else 0.0,
                }
                for group in groups
            ],
            betas=(training.adam_beta1, training.adam_beta2),
        )
        self.rate_of_one = 1 / groups[0].lr_multiplier
        self.scheduler = get_scheduler(stage.lr_scheduler_type, self.optimizer, stage.warmup_steps, stage.steps)
        self.learning_rate = 0.0
        self.grad_norm = 0.0
        self.first_error = float("nan")
        self.last_error = float("nan")
        self._errors: list[float] = []
        self._step_error = torch.zeros((), device=next(module.parameters()).device)
        self._rows: Tensor | None = None
        self._share = 1.0

    def expect(self, rows: Tensor, share: float) -> None:
        """Say of the batch to come which tokens count (bool `[tokens]`), and what share of its step it is."""
        self._rows = rows
        self._share = share

    def see(self, original: nn.Module, arguments: Any, keywords: dict[str, Any], output: Tensor) -> None:
        """A forward hook of the original experts: add the gradient of the error on what they were called with."""
        names = ("hidden_states", "top_k_index", "top_k_weights")
        values = dict(zip(names, arguments, strict=False)) | keywords
        assert self._rows is not None
        rows = self._rows.to(output.device).nonzero().squeeze(-1)
        hidden, index, weights = (values[name].detach().index_select(0, rows) for name in names)
        target = output.detach().index_select(0, rows).float()
        device = output.device.type
        with torch.enable_grad():
            with torch.autocast(device, torch.bfloat16, enabled=self.training.bf16):
                found = self.module(hidden.float(), index, weights)
            distance = (found.float() - target).square().sum()
            error = self._share * distance / target.square().sum().clamp_min(1e-12)
            error.backward()
        self._step_error += error.detach()

    def step(self) -> None:
        """Take an optimizer step with the gradients so far."""
        self.last_error = float(self._step_error)
        if self.first_error != self.first_error:
            self.first_error = self.last_error
        self._errors.append(self.last_error)
        self._step_error.zero_()
        limit = self.training.max_grad_norm or float("inf")
        self.grad_norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
        self.learning_rate = self.optimizer.param_groups[0]["lr"] * self.rate_of_one
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def mean_error(self) -> float:
        """The mean error of the steps since the last call."""
        mean = sum(self._errors) / len(self._errors)
        self._errors.clear()
        return mean

    def result(self) -> dict[str, Tensor]:
        """The parameters as they are now, by name within the module, on the CPU."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.module.state_dict().items()}
