"""Which parameters train in a stage, and at which learning rate: groups by regular expression, and their table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from torch.nn import Parameter

from moe_compress.config import DistillationConfig, LrMultiplier
from moe_compress.errors import UserError

# Biases and norms; the experts' biases are matrices, one row for each expert.
_NEVER_DECAYS = re.compile(r"bias|norm")


@dataclass
class ParameterGroup:
    """Parameters with the same learning rate and weight decay."""

    pattern: str
    lr_multiplier: float
    decay: bool
    names: list[str] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Numbers in this group."""
        return sum(parameter.numel() for parameter in self.parameters)


def _compiled(patterns: Iterable[str], setting: str) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"{setting}: {pattern!r} is not a regular expression ({error})") from None
    return compiled


def parameter_groups(
    parameters: Sequence[tuple[str, Parameter]],
    *,
    trainable: Sequence[str],
    multipliers: Sequence[LrMultiplier],
    default_multiplier: float,
    stage: str,
) -> list[ParameterGroup]:
    """Divide a model's parameters into groups, in the order of the patterns.

    A parameter trains if a pattern of `trainable` is found in its name and its multiplier is not 0. The first
    multiplier pattern found in its name decides. A multiplier pattern that no parameter has is an error, unless it is
    one of the defaults, which are written for many architectures.

    Args:
        parameters: the model's named parameters.
        trainable: patterns of what trains in this stage.
        multipliers: patterns and learning-rate multipliers.
        default_multiplier: for names that no pattern matches.
        stage: name of the stage, for messages.

    Raises:
        UserError: a pattern is malformed or matches nothing, a multiplier is negative, or nothing is left to train.
    """
    setting = f"distillation.stages ({stage}).trainable"
    wanted = _compiled(trainable, setting)
    for regex in wanted:
        if not any(regex.search(name) for name, _ in parameters):
            raise UserError(f"{setting}: {regex.pattern!r} matches no parameter of the student")
    rules = _compiled([rule.pattern for rule in multipliers], "distillation.parameter_lr_multipliers")
    factors = [rule.lr_multiplier for rule in multipliers]
    if min([default_multiplier, *factors]) < 0:
        raise UserError("distillation: learning-rate multipliers must not be negative (0 freezes)")
    defaults = {rule.pattern for rule in DistillationConfig().parameter_lr_multipliers}
    for regex in rules:
        if regex.pattern not in defaults and not any(regex.search(name) for name, _ in parameters):
            raise UserError(
                f"distillation.parameter_lr_multipliers: {regex.pattern!r} matches no parameter of the student"
            )
    groups: dict[tuple[int, bool], ParameterGroup] = {}
    for name, parameter in parameters:
        number = next((i for i, regex in enumerate(rules) if regex.search(name)), len(rules))
        factor = factors[number] if number < len(rules) else default_multiplier
        if factor == 0 or not any(regex.search(name) for regex in wanted):
            continue
        decay = parameter.ndim > 1 and not _NEVER_DECAYS.search(name)
        if (number, decay) not in groups:
            pattern = rules[number].pattern if number < len(rules) else "(others)"
            groups[number, decay] = ParameterGroup(pattern, factor, decay)
        groups[number, decay].names.append(name)
        groups[number, decay].parameters.append(parameter)
    if not groups:
        raise UserError(f"distillation: nothing trains in stage {stage}; its multipliers freeze all that it names")
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


def set_trainable(model: Any, groups: Sequence[ParameterGroup]) -> None:
    """Let exactly the parameters of `groups` require gradients, whatever an earlier stage left."""
    chosen = {id(parameter) for group in groups for parameter in group.parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def group_table(model: Any, groups: Sequence[ParameterGroup], *, title: str, learning_rate: float) -> Table:
    """The groups as a table: tensors, numbers, learning rate, weight decay; and what is frozen."""
    table = Table(title=title, title_justify="left")
    table.add_column("parameters")
    for column in ("tensors", "numbers", "learning rate", "decay"):
        table.add_column(column, justify="right")
    for group in groups:
        rate = f"{learning_rate * group.lr_multiplier:.2e}"
        table.add_row(group.pattern, str(len(group.names)), f"{group.size:,}", rate, "yes" if group.decay else "no")
    chosen = {id(parameter) for group in groups for parameter in group.parameters}
    frozen = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    if frozen:
        table.add_row("(frozen)", str(len(frozen)), f"{sum(p.numel() for p in frozen):,}", "-", "-")
    return table
