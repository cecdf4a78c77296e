"""Spikes of the loss or of the gradient norm, told from running medians, and what is done about them."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from moe_compress.config import SpikeConfig
from moe_compress.distillation.checkpoints import SPIKE_STATE
from moe_compress.files import write_json

SPIKE_LOG = "spikes.jsonl"


class RollBack(Exception):
    """Training is to return to the last checkpoint, because of a spike at `step` (counted from 1)."""

    def __init__(self, step: int) -> None:
        super().__init__(f"spike at step {step}")
        self.step = step


@dataclass(frozen=True)
class Spike:
    """A step that stands out: its loss and gradient norm, and the medians of the steps before it."""

    loss: float
    loss_median: float
    grad_norm: float
    grad_norm_median: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4g} (median {self.loss_median:.4g}), "
            f"gradient norm {self.grad_norm:.4g} (median {self.grad_norm_median:.4g})"
        )

    def facts(self) -> dict[str, Any]:
        """For the log."""
        return asdict(self)


class SpikeDetector:
    """Running medians of one stage; a spike is not taken into them.

    Attributes:
        in_a_row: spikes since the last ordinary step.
    """

    def __init__(self, settings: SpikeConfig) -> None:
        self.settings = settings
        self.losses: deque[float] = deque(maxlen=settings.window)
        self.grad_norms: deque[float] = deque(maxlen=settings.window)
        self.in_a_row = 0

    def check(self, loss: float, grad_norm: float) -> Spike | None:
        """Judge one step, and remember it if it is an ordinary one."""
        if len(self.losses) >= self.settings.window // 2:
            usual_loss, usual_norm = median(self.losses), median(self.grad_norms)
            # Of positive losses the same as loss > factor * median; an estimate from draws may be below 0.
            high = loss - usual_loss > (self.settings.loss_factor - 1) * median(map(abs, self.losses))
            if high or grad_norm > self.settings.grad_norm_factor * usual_norm:
                self.in_a_row += 1
                return Spike(loss, usual_loss, grad_norm, usual_norm)
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        self.in_a_row = 0
        return None

    def save(self, directory: Path, skipped: int) -> None:
        """Write the state, and by how many steps the data has been moved on, to a folder of training state."""
        state = {
            "losses": list(self.losses),
            "grad_norms": list(self.grad_norms),
            "in_a_row": self.in_a_row,
            "skipped": skipped,
        }
        write_json(directory / SPIKE_STATE, state)

    def load(self, directory: Path) -> None:
        """Take the medians from where `save` left them; nothing if it left none."""
        state = _read(directory)
        self.losses.extend(state.get("losses", []))
        self.grad_norms.extend(state.get("grad_norms", []))
        self.in_a_row = state.get("in_a_row", 0)


def skipped_steps(directory: Path) -> int:
    """By how many steps earlier returns have moved the data on, from a folder of training state."""
    return int(_read(directory).get("skipped", 0))


def _read(directory: Path) -> dict[str, Any]:
    path = directory / SPIKE_STATE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
