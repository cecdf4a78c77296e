"""`DistillationTrainer`: the Transformers Trainer for one stage, with our loss, parameter groups and checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer

from moe_compress.config import LossConfig
from moe_compress.distillation.checkpoints import TRAINING_STATE, rotate, save_master_weights, save_student
from moe_compress.distillation.losses import distillation_loss
from moe_compress.distillation.parameters import ParameterGroup
from moe_compress.distillation.stages import Stage
from moe_compress.distillation.teachers import TeacherSource
from moe_compress.errors import UserError
from moe_compress.files import append_line, directory_in_progress

if TYPE_CHECKING:
    from moe_compress.run import Run

TRAIN_LOG = "train.jsonl"


class DistillationTrainer(Trainer):
    """Trains a student through one stage.

    Steps are counted over all stages: the state's `global_step` starts at `stage.first_step`, and checkpoints and logs
    carry it. The training data must be exactly the sequences of this stage, in order (`data.TrainingOrder`).

    Args:
        run: where checkpoints and logs go.
        stage: its step range, loss weights and learning rate.
        groups: what trains, and how fast (`parameters.parameter_groups`).
        teacher: targets of a batch; None trains on cross-entropy alone.
        loss: tail and reduction.
        dtypes: type in which each tensor of the student is stored.
        kwargs: of the Trainer.
    """

    # Our loss is divided by the tokens of the whole optimizer step, so the Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        run: Run,
        stage: Stage,
        groups: Sequence[ParameterGroup],
        teacher: TeacherSource | None,
        loss: LossConfig,
        dtypes: Mapping[str, torch.dtype],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # Makes the Trainer count the labels of the whole optimizer step, as shifted: for a model whose forward does
        # not take `num_items_in_batch` too, since it is ours that needs it.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.run = run
        self.stage = stage
        self.groups = groups
        self.teacher = teacher
        self.loss_options: dict[str, Any] = {"tail": loss.tail, "kl_reduction": loss.kl_reduction}
        self.dtypes = dtypes
        self._saving: Path | None = None
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._logged_at = time.perf_counter()
        self.remove_callback(ProgressCallback)
        self.add_callback(StageProgress(stage))

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the stage's groups, at the stage's rate; weight decay only where the group has it."""
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args)
            rate = options.pop("lr")
            self.optimizer = cls(
                [
                    {
                        "params": group.parameters,
                        "lr": rate * group.lr_multiplier,
                        "lr_multiplier": group.lr_multiplier,
                        "weight_decay": self.args.weight_decay if group.decay else 0.0,
                    }
                    for group in self.groups
                ],
                lr=rate,
                **options,
            )
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """The rate of multiplier 1."""
        assert self.optimizer is not None
        group = self.optimizer.param_groups[0]
        return float(group["lr"] / group["lr_multiplier"])

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            self._stop(f"the gradient norm became {float(norm)}")
        return norm

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The blended loss, divided by the labelled tokens of the whole optimizer step.

        Raises:
            UserError: it is not finite, or no token of the step has a label.
        """
        labels = inputs.pop("labels")
        record = inputs.pop("teacher", None)
        if num_items_in_batch is not None and int(num_items_in_batch) == 0:
            self._stop("all labels of a batch are masked (-100)")
        targets = self.teacher(inputs, record) if self.teacher is not None else None
        outputs = model(**inputs, use_cache=False)
        parts = distillation_loss(
            outputs.logits,
            labels,
            targets,
            alpha=self.stage.alpha,
            temperature=self.stage.temperature,
            normalizer=num_items_in_batch,
            **self.loss_options,
        )
        loss = parts.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The normalizer counts the tokens of all ranks, and the gradients are then averaged over the ranks.
            loss = loss * self.accelerator.num_processes
        if not torch.isfinite(loss):
            self._stop(f"the loss became {float(loss.detach())}")
        sums = torch.stack([parts.ce, parts.kl, parts.ce.new_tensor(parts.tokens)]).double()
        self._sums = self._sums.to(sums.device) + sums
        return (loss, outputs) if return_outputs else loss

    def _stop(self, reason: str) -> None:
        steps = [step for step, _ in self.run.checkpoints()]
        raise UserError(
            f"distillation stage '{self.stage.name}': {reason} at step {self.state.global_step + 1}; checkpoint-"
            f"{max(steps, default=0)} is the last good one; try a lower learning rate or more warm-up in a new run"
        )

    # Steps and logs

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume: Any, trial: Any
    ) -> tuple[int, int]:
        """Count steps from the stage's first one; the data of a stage is one epoch of the Trainer."""
        super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        if resume is None:
            self.state.global_step = self.stage.first_step
        self.state.max_steps = self.stage.last_step
        return 0, (self.state.global_step - self.stage.first_step) * self.args.gradient_accumulation_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss and the speed, and write `RUN/logs/train.jsonl`."""
        step = "loss" in logs
        if step:
            ce, kl, labelled = self.accelerator.reduce(self._sums, "sum").tolist()
            now = time.perf_counter()
            logs["ce"] = ce / max(labelled, 1)
            if self.teacher is not None:
                logs["kl"] = kl / max(labelled, 1)
            logs["tokens_per_second"] = labelled / (now - self._logged_at)
            self._sums = torch.zeros_like(self._sums)
            self._logged_at = now
        super().log(logs, start_time)
        if step and self.is_world_process_zero():
            rates = {group.pattern: logs["learning_rate"] * group.lr_multiplier for group in self.groups}
            line = {"step": self.state.global_step, "stage": self.stage.name}
            line |= {key: value for key, value in logs.items() if key != "epoch"}
            line |= {"learning_rates": rates, "time": time.time()}
            append_line(self.run.logs_dir / TRAIN_LOG, line)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving or self.run.checkpoints_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save under a temporary name what the Trainer saves, and rename it when all of it is there."""
        final = self.run.checkpoint(self.state.global_step)
        main = self.is_world_process_zero()
        with directory_in_progress(final) if main else nullcontext():
            self.accelerator.wait_for_everyone()
            # The Trainer writes to <output directory>/checkpoint-<step>, which becomes our folder of training state.
            self._saving = final.with_name(f".{final.name}.partial")
            try:
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if main:
                    os.replace(self._saving / final.name, self._saving / TRAINING_STATE)
            finally:
                self._saving = None
        self.accelerator.wait_for_everyone()
        if main:
            # The Trainer's own limit is unset, because it knows nothing of evaluators.
            rotate(self.run, self.run.config.distillation.training.save_total_limit)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model directory, and the fp32 weights to `output_dir`, the folder of training state."""
        if self._saving is None or output_dir is None:
            return super().save_model(output_dir, _internal_call)
        student: Any = self.accelerator.unwrap_model(self.model)
        # Under FSDP gathering the whole state is a collective: every rank takes part, rank 0 gets it.
        state = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else student.state_dict()
        if self.is_world_process_zero():
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_student(student, state, self.dtypes, self._saving, self.run.checkpoint(0))
            save_master_weights(state, self.dtypes, Path(output_dir))
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the student was loaded from the checkpoint, fp32 weights included, before the Trainer was made."""


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
            shown = {"loss": "loss", "ce": "ce", "kl": "kl", "tokens_per_second": "tok/s"}
            numbers = {short: f"{logs[name]:.4g}" for name, short in shown.items() if name in logs}
            if numbers:
                self.training_bar.set_postfix(numbers, refresh=False)
