"""What a stage minimizes: the blended loss on the student's output, and terms that compare its layers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.config import LossConfig
from moe_compress.distillation.chunks import LinearHead
from moe_compress.distillation.heads import headless
from moe_compress.distillation.layers import hidden_error, router_divergence
from moe_compress.distillation.live import LiveTeacher, layer_recorder
from moe_compress.distillation.losses import LossParts, distillation_loss, labelled_rows
from moe_compress.distillation.stages import Stage
from moe_compress.distillation.teachers import TeacherSource

# What is summed over the labelled tokens, and last their number.
PARTS = ("ce", "kl", "router", "hidden", "tokens")


@dataclass(frozen=True)
class Measured:
    """A loss to differentiate and, detached, the sums of `PARTS` `[5]`."""

    loss: Tensor
    sums: Tensor


class Objective:
    """The loss of a batch.

    Args:
        student: the model that trains, before anything wraps it.
        teacher: targets of a batch; None leaves cross-entropy alone.
        stage: weight and temperature of the divergence.
        loss: divergence, tail, reduction, and the weights of what compares the layers.
    """

    def __init__(self, student: nn.Module, teacher: TeacherSource | None, stage: Stage, loss: LossConfig) -> None:
        self.teacher = teacher
        self.loss = loss
        self.options: dict[str, Any] = {
            "alpha": stage.alpha,
            "temperature": stage.temperature,
            "tail": loss.tail,
            "kind": loss.divergence,
            "kl_reduction": loss.kl_reduction,
        }
        self.headless = headless(student)
        self._theirs = teacher.recorder if isinstance(teacher, LiveTeacher) else None
        self._mine = layer_recorder(student, loss) if self._theirs is not None else None

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of `PARTS` that mean something here."""
        weights = {
            "kl": self.teacher is not None,
            "router": self.loss.router_weight > 0,
            "hidden": self.loss.hidden_weight > 0,
        }
        return tuple(name for name in PARTS[:-1] if weights.get(name, True))

    def __call__(
        self,
        model: Any,
        inputs: dict[str, Any],
        labels: Tensor,
        record: dict[str, Tensor] | None,
        normalizer: Tensor | int | None,
    ) -> Measured:
        """The loss of a batch, divided by `normalizer` (see `distillation_loss`).

        Args:
            model: the student, or what wraps it.
            inputs: its arguments.
            labels: int64 `[batch, length]`.
            record: what the data set holds of the teacher.
        """
        targets = self.teacher(inputs, record) if self.teacher is not None else None
        options = {**self.options, "normalizer": normalizer}

        def at_head(hidden: Tensor, head: LinearHead) -> dict[str, Any]:
            # A dictionary, in which FSDP finds the loss.
            return vars(distillation_loss(hidden, labels, targets, head=head, **options))

        with self._mine.recording() if self._mine is not None else nullcontext():
            if self.headless is not None:
                parts = LossParts(**self.headless.run(model, inputs, at_head))
            else:
                parts = distillation_loss(model(**inputs, use_cache=False).logits, labels, targets, **options)
        loss, router, hidden = parts.loss, parts.ce.new_zeros(()), parts.ce.new_zeros(())
        if self._mine is not None and self._theirs is not None:
            rows = labelled_rows(labels)[1]
            if self.loss.router_weight > 0:
                router = router_divergence(self._mine.router_logits, self._theirs.router_logits, rows)
            if self.loss.hidden_weight > 0:
                hidden = hidden_error(self._mine.hidden, self._theirs.hidden, rows)
            count = max(parts.tokens, 1) if normalizer is None else normalizer
            loss = loss + (self.loss.router_weight * router + self.loss.hidden_weight * hidden) / count
        tokens = parts.ce.new_tensor(parts.tokens)
        return Measured(loss, torch.stack([parts.ce, parts.kl, router.detach(), hidden.detach(), tokens]).double())
