"""The teacher beside the student: it runs on every batch, and may show what happens inside its layers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from moe_compress.config import LossConfig
from moe_compress.distillation.chunks import TeacherHead
from moe_compress.distillation.heads import headless
from moe_compress.distillation.layers import LayerRecorder
from moe_compress.distillation.targets import DenseTargets


def layer_recorder(model: Any, loss: LossConfig) -> LayerRecorder | None:
    """What records the layers of a teacher or student that a loss compares; None if it compares none."""
    routers, hidden = loss.router_weight > 0, loss.hidden_weight > 0
    return LayerRecorder(model, routers=routers, hidden=hidden) if routers or hidden else None


class LiveTeacher:
    """Targets over the whole vocabulary from a model that runs beside the student.

    Attributes:
        recorder: what the loss compares of its layers, recorded in the last call; None if it compares none.
    """

    def __init__(self, model: Any, loss: LossConfig) -> None:
        self.model = model.eval().requires_grad_(False)
        self.recorder = layer_recorder(model, loss)
        self._headless = headless(model)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], record: Mapping[str, Tensor] | None) -> TeacherHead | DenseTargets:
        with self.recorder.recording() if self.recorder is not None else nullcontext():
            if self._headless is not None:
                return self._headless.run(self.model, dict(inputs), TeacherHead)
            return DenseTargets(self.model(**inputs, use_cache=False).logits)
