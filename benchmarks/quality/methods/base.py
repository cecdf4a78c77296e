"""What a method is given and gives back, and the registry."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from benchmarks.quality.calibration import Layer, collect_layers
from benchmarks.quality.forms import Form, replace_experts


@dataclass
class Task:
    """One model to compress to a share of its expert bytes.

    Attributes:
        teacher: the original, fp32; it must be left as it is.
        rows: [N, L] calibration text.
        ratio: share of the expert bytes to keep; both in bf16.
        seed: of every random choice.
    """

    teacher: Any
    rows: Tensor
    ratio: float
    seed: int
    shared: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def layers(self) -> list[Layer]:
        """What the calibration text does in each MoE layer; the same object for all ratios (`shared`)."""
        if "layers" not in self.shared:
            self.shared["layers"] = collect_layers(self.teacher, self.rows, seed=self.seed)
        return self.shared["layers"]

    def budget(self, weight: Tensor) -> int:
        """Values that a projection [E, out, in] may be stored in."""
        return math.floor(round(self.ratio * weight.numel(), 6))

    def student(self) -> Any:
        """A copy of the teacher to compress."""
        return copy.deepcopy(self.teacher)

    def with_forms(self, forms: Callable[[Layer], dict[str, Form]]) -> Any:
        """A student whose experts are what `forms` makes of each layer."""
        return replace_experts(self.student(), {layer.name: forms(layer) for layer in self.layers})


@dataclass(frozen=True)
class Method:
    """A method and what tells its results from those of another version of it."""

    name: str
    compress: Callable[[Task], Any]
    settings: dict[str, Any]


METHODS: dict[str, Method] = {}


def method(name: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register `function(task, **settings)` under a name; raise `version` when the same settings give other weights."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        arguments = {key: value for key, value in settings.items() if key != "version"}
        METHODS[name] = Method(name, lambda task: function(task, **arguments), settings)
        return function

    return register
