"""Which values of the settings make sense: choices, ranges, and what must hold between settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_compress import config as schema
from moe_compress.config import Config
from moe_compress.distillation.stages import either
from moe_compress.errors import UserError
from moe_compress.schema import fields_of, show

_DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class _Rule:
    holds: Callable[[Any], bool]
    words: str


def _between(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> _Rule:
    def holds(value: Any) -> bool:
        return (low < value if open_low else low <= value) and (value < high if open_high else value <= high)

    return _Rule(holds, f"between {low:g} and {high:g}" + (", not at the ends" if open_low and open_high else ""))


def _at_least(low: float) -> _Rule:
    return _Rule(lambda value: value >= low, f"at least {low:g}")


def _one_of(*names: str) -> _Rule:
    return _Rule(lambda value: value in names, f"one of {', '.join(names)}")


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


_POSITIVE = _Rule(lambda value: value > 0, "above 0")
_ABOVE_ONE = _Rule(lambda value: value > 1, "above 1")
_NOT_EMPTY = _Rule(lambda value: bool(value.strip()), "a name, not empty")
_REGEX = _Rule(_is_regex, "a regular expression")
_REGEXES = _Rule(lambda patterns: bool(patterns) and all(map(_is_regex, patterns)), "regular expressions, at least one")
_OPEN_UNIT = _between(0, 1, open_low=True, open_high=True)

# What a type cannot say. None is always let through: where it is allowed it means "not set".
_RULES: dict[type, dict[str, _Rule]] = {
    schema.Config: {
        "experiment_name": _Rule(lambda name: bool(name.strip()) and "/" not in name, "a name without slashes"),
        "seed": _between(0, 2**32 - 1),
        "run": _NOT_EMPTY,
    },
    schema.ModelConfig: {"name": _NOT_EMPTY, "dtype": _one_of(*_DTYPES)},
    schema.DatasetConfig: {
        "name": _NOT_EMPTY,
        "max_samples": _at_least(1),
        "max_length": _at_least(2),
        "shuffle_buffer": _at_least(1),
    },
    schema.CalibrationConfig: {"shrinkage": _between(0, 1), "batch_size": _at_least(1), "trials": _at_least(0)},
    schema.CompressionConfig: {
        "rank": _at_least(1),
        "target_ratio": _OPEN_UNIT,
        "target_bytes": _at_least(1),
        "rank_multiple": _at_least(1),
        "cores": _Rule(
            lambda cores: cores >= 0 if isinstance(cores, int) else cores in ("auto", "groups"),
            "a whole number from 0, auto or groups",
        ),
        "input_basis": _Rule(
            lambda share: share == "auto" if isinstance(share, str) else 0 <= share < 1, "from 0 to below 1, or auto"
        ),
        "iterations": _at_least(1),
        "num_steps": _at_least(1),
        "lr": _POSITIVE,
        "dtype": _one_of(*_DTYPES),
    },
    schema.GenerationConfig: {
        "top_k": _at_least(1),
        "samples": _between(1, 65535),
        "sample_temperature": _POSITIVE,
        "batch_size": _at_least(1),
        "worker_id": _at_least(0),
        "total_workers": _at_least(1),
        "sequences_per_file": _at_least(1),
    },
    schema.LossConfig: {
        "alpha": _between(0, 1),
        "temperature": _POSITIVE,
        "router_weight": _at_least(0),
        "hidden_weight": _at_least(0),
    },
    schema.SpikeConfig: {
        "loss_factor": _ABOVE_ONE,
        "grad_norm_factor": _ABOVE_ONE,
        "window": _at_least(2),
        "limit": _at_least(1),
    },
    schema.TrainingConfig: {
        "num_train_epochs": _POSITIVE,
        "max_steps": _Rule(lambda value: value == -1 or value >= 1, "-1 or at least 1"),
        "per_device_train_batch_size": _at_least(1),
        "gradient_accumulation_steps": _at_least(1),
        "learning_rate": _POSITIVE,
        "warmup_steps": _at_least(0),
        "adam_beta1": _between(0, 1, open_high=True),
        "adam_beta2": _between(0, 1, open_high=True),
        "weight_decay": _at_least(0),
        "max_grad_norm": _at_least(0),
        "save_steps": _at_least(1),
        "save_total_limit": _at_least(1),
        "logging_steps": _at_least(1),
    },
    schema.LrMultiplier: {"pattern": _REGEX, "lr_multiplier": _at_least(0)},
    schema.StageConfig: {
        "trainable": _REGEXES,
        "steps": _at_least(0),
        "tokens": _at_least(1),
        "learning_rate": _POSITIVE,
        "warmup_steps": _at_least(0),
        "alpha": _between(0, 1),
        "temperature": _POSITIVE,
    },
    schema.DistillationConfig: {"default_lr_multiplier": _at_least(0)},
    schema.FsdpConfig: {"param_dtype": _one_of(*_DTYPES[1:]), "reduce_dtype": _one_of(*_DTYPES[1:])},
    schema.EvaluationConfig: {
        "limit": _at_least(1),
        "batch_size": _Rule(lambda text: text == "auto" or (text.isdecimal() and int(text) > 0), "auto or at least 1"),
        "poll_seconds": _POSITIVE,
        "gpus_per_model": _at_least(1),
        "generate_tokens": _at_least(1),
        "loop_samples": _at_least(0),
    },
}


def check_values(config: Config) -> None:
    """Check choices and ranges of every setting, and what must hold between settings.

    Raises:
        UserError: the first setting that makes no sense, by its key.
    """
    _check_group("", config)
    compression, generation = config.compression, config.distillation.teacher.generation
    if compression.rank is None and compression.target_ratio is None and compression.target_bytes is None:
        raise UserError("no size is set: give compression.rank, compression.target_ratio or compression.target_bytes")
    if compression.target_ratio is not None and compression.target_bytes is not None:
        raise UserError("compression.target_ratio and compression.target_bytes are both set; set one of them to null")
    if compression.input_basis not in ("auto", 0):
        key = f"compression.input_basis={show(compression.input_basis)}"
        if compression.method != "closed_form":
            raise UserError(f"{key} needs compression.method=closed_form; set that, or compression.input_basis=0")
        if compression.cores not in ("auto", "groups", 0, 1):
            raise UserError(f"{key} goes with at most one core; set compression.cores=1, or compression.input_basis=0")
    calibration = compression.calibration
    if calibration.enabled and calibration.fisher:
        key = "compression.calibration.fisher=true"
        if calibration.sequential:
            raise UserError(f"{key} needs compression.calibration.sequential=false; set one of them to false")
        if compression.parameterization == "wrapper":
            raise UserError(f"{key} is not for wrappers; choose compression=wrapper, which sets what they need")
    if generation.worker_id >= generation.total_workers:
        raise UserError(
            f"distillation.teacher.generation.worker_id={generation.worker_id} must be below "
            f"total_workers={generation.total_workers} (workers count from 0)"
        )
    _check_sampled(config.distillation)


def _check_sampled(distillation: schema.DistillationConfig) -> None:
    """Draws from one distribution say nothing exact of the others: the loss must ask for what was drawn."""
    generation = distillation.teacher.generation
    if generation.encoder != "sample" or not distillation.teacher.use_cached_logits:
        return
    loss = distillation.loss
    for stage in distillation.stages or [schema.StageConfig()]:
        temperature = either(stage.temperature, loss.temperature)
        if (
            stage.kind == "train"
            and either(stage.alpha, loss.alpha) > 0
            and temperature not in (1, generation.sample_temperature)
        ):
            raise UserError(
                f"distillation.loss.temperature (or a stage's) is {temperature:g}, but a cache of "
                "distillation.teacher.generation.encoder=sample serves 1 and sample_temperature="
                f"{generation.sample_temperature:g} alone; set one of these, or encoder=topk"
            )


def _check_group(prefix: str, group: Any) -> None:
    cls: type = type(group)
    rules = _RULES.get(cls, {})
    for name, info in fields_of(cls).items():
        value, key = getattr(group, name), prefix + name
        if info.dataclass is not None:
            _check_group(f"{key}.", value)
        elif info.element is not None:
            for index, item in enumerate(value):
                _check_group(f"{key}.{index}.", item)
        elif value is not None:
            _check_value(key, value, info.choices, rules.get(name))


def _check_value(key: str, value: Any, choices: Sequence[Any] | None, rule: _Rule | None) -> None:
    if isinstance(value, float) and value != value:
        raise UserError(f"{key} is not a number (nan)")
    if choices and value not in choices:
        raise UserError(f"{key}={show(value)} is not one of: {', '.join(map(str, choices))}")
    if rule is not None and not rule.holds(value):
        raise UserError(f"{key}={show(value)} must be {rule.words}")
