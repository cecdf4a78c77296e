"""Recovering quality by knowledge distillation from the original model.

`encoders`, `manifest`, `writer` and `reader` are the cache of teacher logits, `generate` fills it; `teachers` serves a
cached teacher and `live` one that runs beside the student, through one interface. `losses`, `chunks` and `heads` are
the loss on the output, `layers` compares what is inside, `objective` joins both; `parameters`, `stages`, `data`,
`spikes`, `checkpoints` and `trainer` train the student end to end, `blockwise` layer by layer;
`pipeline` is the stage of a run. Names are imported on first use, so that `--help` stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_compress.lazy import lazy_names

if TYPE_CHECKING:
    from moe_compress.distillation.generate import generate_teacher_logits
    from moe_compress.distillation.losses import distillation_loss
    from moe_compress.distillation.pipeline import distill
    from moe_compress.distillation.reader import TeacherCache
    from moe_compress.distillation.targets import DenseTargets, SparseTargets
    from moe_compress.distillation.trainer import DistillationTrainer

_HOME = {
    "DenseTargets": "targets",
    "DistillationTrainer": "trainer",
    "SparseTargets": "targets",
    "TeacherCache": "reader",
    "distill": "pipeline",
    "distillation_loss": "losses",
    "generate_teacher_logits": "generate",
}

__all__ = [
    "DenseTargets",
    "DistillationTrainer",
    "SparseTargets",
    "TeacherCache",
    "distill",
    "distillation_loss",
    "generate_teacher_logits",
]

__getattr__ = lazy_names(__name__, _HOME)
