"""The stages of a run in one table: what each does, reads, needs and freezes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_TOP = ("experiment_name", "gpu_ids", "seed", "run", "output", "model")
_EVALUATION = ("evaluation", "distillation.teacher.model_path", "wandb_project", "distillation.training.report_to")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: its verb on the command line.
        summary: one line for `--help`.
        function: `module:name` of what does it, imported only when it is called.
        reads: settings it reads (a key stands for all below it).
        needs: stages that must be finished before it.
        starts_run: whether it can be the first stage of a run.
    """

    name: str
    summary: str
    function: str
    reads: tuple[str, ...]
    needs: tuple[str, ...] = ()
    starts_run: bool = False

    def load(self) -> Callable[..., Any]:
        """Import and return the function of this stage."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)

    def reads_key(self, key: str) -> bool:
        """Whether this stage reads a setting."""
        return any(_is_below(key, prefix) for prefix in self.reads)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "compress",
            "replace the experts by shared cores and low-rank factors; writes the zero-shot student",
            "moe_compress.compression:compress",
            (*_TOP, "compression"),
            starts_run=True,
        ),
        Stage(
            "teacher-logits",
            "write the teacher's logits to HDF5 files",
            "moe_compress.distillation:generate_teacher_logits",
            (*_TOP, "distillation.teacher", "distillation.dataset"),
            starts_run=True,
        ),
        Stage(
            "distill",
            "train the student on text and the teacher's logits; torchrun shards it",
            "moe_compress.distillation:distill",
            (*_TOP, "wandb_project", "distillation", "fsdp"),
            needs=("compress",),
        ),
        Stage(
            "evaluate",
            "measure teacher and student: perplexity, agreement, lm_eval tasks, speed",
            "moe_compress.evaluation:evaluate_run",
            (*_TOP, *_EVALUATION),
            needs=("compress",),
        ),
        Stage(
            "watch",
            "evaluate checkpoints as the distillation writes them",
            "moe_compress.evaluation:watch_run",
            (*_TOP, *_EVALUATION),
        ),
        Stage(
            "report",
            "write RUN/report.html from what the run has measured",
            "moe_compress.report:write_report",
            ("experiment_name", "run", "output"),
            needs=("compress",),
        ),
        Stage(
            "run",
            "all stages in order: compress, teacher-logits, distill, evaluate, report",
            "moe_compress.pipeline:run_all",
            ("",),
            starts_run=True,
        ),
    )
}

# Settings that describe one process, not the experiment: never compared with the frozen ones, never written.
PER_PROCESS = (
    "run",
    "distillation.teacher.generation.worker_id",
    "distillation.teacher.generation.total_workers",
    "distillation.teacher.generation.force_regenerate",
)

# Settings of the machine, which change no result: written by the first stage; another value later is for that
# process alone.
FREE = (
    "gpu_ids",
    "output",
    "compression.device",
    "distillation.teacher.generation.batch_size",
    "distillation.teacher.device_map",
    "distillation.teacher.max_memory",
    "distillation.teacher.offload_folder",
    "distillation.teacher.fsdp",
    "evaluation.devices",
    "evaluation.gpus_per_model",
    "evaluation.order",
    "evaluation.poll_seconds",
)

# Which stages freeze a setting by having run; the first line that fits counts, and what fits none is frozen by any.
_FROZEN_BY: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("distillation.teacher.use_cached_logits", ("distill",)),
    ("distillation.teacher.model_path", ("teacher-logits", "distill", "evaluate", "watch")),
    ("distillation.teacher", ("teacher-logits", "distill")),
    ("distillation.dataset", ("teacher-logits", "distill")),
    ("distillation", ("distill",)),
    ("fsdp", ("distill",)),
    ("wandb_project", ("distill",)),
    ("evaluation", ("evaluate", "watch")),
)


def _is_below(key: str, prefix: str) -> bool:
    return not prefix or key == prefix or key.startswith(prefix + ".")


def is_per_process(key: str) -> bool:
    """Whether a setting belongs to one process and is never frozen."""
    return any(_is_below(key, prefix) for prefix in PER_PROCESS)


def is_free(key: str) -> bool:
    """Whether a setting may differ between stages because no result depends on it."""
    return is_per_process(key) or any(_is_below(key, prefix) for prefix in FREE)


def freezing_stages(key: str) -> tuple[str, ...]:
    """The stages that freeze a setting once any of them has run."""
    for prefix, stages in _FROZEN_BY:
        if _is_below(key, prefix):
            return stages
    return tuple(STAGES)
