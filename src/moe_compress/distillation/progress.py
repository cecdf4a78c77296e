"""What a training shows on the terminal."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback

from moe_compress.distillation.stages import Stage

_SHOWN = {
    "loss": "loss",
    "ce": "ce",
    "kl": "kl",
    "router": "router",
    "hidden": "hidden",
    "tokens_per_second": "tok/s",
}


class StageProgress(ProgressCallback):
    """One bar over all steps of the distillation so far, with the stage's name and the latest numbers."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.mininterval = 1.0
            self.training_bar.set_description(f"distil: {self.stage.name}")
            self.training_bar.initial = state.global_step
            self.training_bar.n = state.global_step
            self.training_bar.refresh()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        # So that an average of the log never spans a checkpoint, and a resumed run logs what an uninterrupted one does.
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            numbers = {short: f"{logs[name]:.4g}" for name, short in _SHOWN.items() if name in logs}
            if numbers:
                self.training_bar.set_postfix(numbers, refresh=False)

    def close(self) -> None:
        """End the bar where it is, for a training that does not come to its end."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None
