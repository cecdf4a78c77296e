"""The stages of a distillation with every setting filled in, each knowing at which global step it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from moe_compress.config import DistillationConfig, LossConfig, StageConfig
from moe_compress.errors import UserError

T = TypeVar("T")

# Those schedules of Transformers that need no settings of their own.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


@dataclass(frozen=True)
class Stage:
    """One stage, from global step `first_step` on, for `steps` steps."""

    name: str
    kind: str
    first_step: int
    steps: int
    trainable: tuple[str, ...]
    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: int
    alpha: float
    temperature: float

    @property
    def last_step(self) -> int:
        """The global step at which this stage is complete."""
        return self.first_step + self.steps


def compares_layers(loss: LossConfig) -> bool:
    """Whether a loss has terms that need the teacher's layers, which a cache does not hold."""
    return loss.router_weight > 0 or loss.hidden_weight > 0


def needs_teacher(config: DistillationConfig) -> bool:
    """Whether a stage compares the student with the whole teacher, live or cached; block-wise ones never do."""
    stages = config.stages or [StageConfig()]
    alphas = [either(stage.alpha, config.loss.alpha) for stage in stages if stage.kind == "train"]
    return any(alpha > 0 or compares_layers(config.loss) for alpha in alphas)


def reads_cache(config: DistillationConfig) -> bool:
    """Whether the teacher's logits are read from the cache."""
    return config.teacher.use_cached_logits and needs_teacher(config)


def resolve_stages(config: DistillationConfig, *, sequences: int, sequences_per_step: int) -> list[Stage]:
    """The stages of `config`; without any, one that trains everything for `max_steps` or `num_train_epochs`.

    Args:
        config: the settings.
        sequences: sequences in the data set.
        sequences_per_step: sequences of one optimizer step, over all ranks.

    Raises:
        UserError: a stage has no steps, or both steps and tokens, or a value that is out of range.
    """
    training = config.training
    if config.stages:
        listed: Sequence[StageConfig] = config.stages
    else:
        steps = training.max_steps
        if steps < 0:
            steps = math.ceil(training.num_train_epochs * sequences / sequences_per_step)
        listed = [StageConfig(name="all", steps=steps)]
    stages: list[Stage] = []
    first = 0
    for number, item in enumerate(listed, start=1):
        name = item.name or f"stage{number}"
        stage = Stage(
            name=name,
            kind=item.kind,
            first_step=first,
            steps=_steps(name, item, sequences_per_step * config.dataset.max_length),
            trainable=tuple(item.trainable),
            learning_rate=either(item.learning_rate, training.learning_rate),
            lr_scheduler_type=either(item.lr_scheduler_type, training.lr_scheduler_type),
            warmup_steps=either(item.warmup_steps, training.warmup_steps),
            alpha=either(item.alpha, config.loss.alpha),
            temperature=either(item.temperature, config.loss.temperature),
        )
        _check(stage)
        stages.append(stage)
        first = stage.last_step
    return stages


def _steps(name: str, item: StageConfig, tokens_per_step: int) -> int:
    if item.tokens is None:
        return item.steps
    if item.steps:
        raise UserError(
            f"distillation stage '{name}': steps={item.steps} and tokens={item.tokens} are both set; keep one"
        )
    return math.ceil(item.tokens / tokens_per_step)


def either(own: T | None, common: T) -> T:
    """A stage's own value, or the common one where it sets none."""
    return common if own is None else own


def _check(stage: Stage) -> None:
    where = f"distillation stage '{stage.name}'"
    if stage.steps < 1:
        raise UserError(
            f"{where}: steps={stage.steps} must be at least 1 (set steps or tokens in distillation.stages, or "
            "max_steps or num_train_epochs in distillation.training)"
        )
    if not 0 <= stage.alpha <= 1:
        raise UserError(f"{where}: alpha={stage.alpha} must be between 0 and 1")
    if stage.temperature <= 0:
        raise UserError(f"{where}: temperature={stage.temperature} must be above 0")
    if stage.learning_rate <= 0:
        raise UserError(f"{where}: learning_rate={stage.learning_rate} must be above 0")
    if stage.warmup_steps < 0:
        raise UserError(f"{where}: warmup_steps={stage.warmup_steps} must not be negative")
    if stage.lr_scheduler_type not in SCHEDULES:
        raise UserError(
            f"{where}: lr_scheduler_type={stage.lr_scheduler_type} is unknown; use one of: {', '.join(SCHEDULES)}"
        )
