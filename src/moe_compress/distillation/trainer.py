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
from moe_compress.distillation.measures import gradient_norms, memory_bytes
from moe_compress.distillation.objective import PARTS, Objective
from moe_compress.distillation.parameters import ParameterGroup
from moe_compress.distillation.progress import StageProgress
from moe_compress.distillation.spikes import SPIKE_LOG, RollBack, SpikeDetector
from moe_compress.distillation.stages import Stage
from moe_compress.distillation.teachers import TeacherSource
from moe_compress.distillation.trackers import metric_names
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
        loss: divergence, tail, reduction, and terms that compare the layers.
        dtypes: type in which each tensor of the student is stored.
        spikes: what watches for spikes; None where nothing does.
        skipped: by how many steps spikes have moved the data on so far.
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
        spikes: SpikeDetector | None = None,
        skipped: int = 0,
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
        student: Any = self.model
        self.objective: Objective = Objective(student, teacher, stage, loss)
        self.dtypes = dtypes
        self.spikes = spikes
        self.skipped = skipped
        self._saving: Path | None = None
        self._sums = torch.zeros(len(PARTS), dtype=torch.float64)
        self._step_loss = torch.zeros(())
        self._norms: dict[str, float] = {}
        self._logged_at = time.perf_counter()
        self.remove_callback(ProgressCallback)
        self.progress = StageProgress(stage)
        self.add_callback(self.progress)

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

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._measure_gradients()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last look at the gradients before the optimizer takes its step."""
        if grad_norm is None:  # nothing is clipped
            self._measure_gradients()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            self._stop(f"the gradient norm became {float(norm)}")
        if self.spikes is not None:
            # DeepSpeed need not know the norm; then the loss alone is watched.
            self._watch(model, self.spikes, 0.0 if norm is None else float(norm))
        return norm

    def _measure_gradients(self) -> None:
        student: Any = self.model
        step = self.state.global_step + 1
        if step % self.args.logging_steps == 0 or step % self.args.save_steps == 0 or step == self.stage.last_step:
            self._norms = gradient_norms(student)

    def _watch(self, model: nn.Module, spikes: SpikeDetector, norm: float) -> None:
        """Leave this step's update out, or go back, if the step is a spike; all ranks decide alike."""
        loss = float(self.accelerator.reduce(self._step_loss, "sum"))
        self._step_loss = torch.zeros_like(self._step_loss)
        spike = spikes.check(loss, norm)
        if spike is None:
            return
        step, action = self.state.global_step + 1, spikes.settings.action
        if self.is_world_process_zero():
            line = {"step": step, "stage": self.stage.name, "action": action, **spike.facts(), "time": time.time()}
            append_line(self.run.logs_dir / SPIKE_LOG, line)
            print(f"spike at step {step}: {spike}; {action}", flush=True)
        if action == "rollback":
            raise RollBack(step)
        if spikes.in_a_row > spikes.settings.limit:
            self._stop(f"the last {spikes.in_a_row} steps were spikes ({spike})")
        model.zero_grad()  # an optimizer leaves parameters without a gradient alone, and their momenta too

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, divided by the labelled tokens of the whole optimizer step.

        Raises:
            UserError: it is not finite, or no token of the step has a label.
        """
        labels = inputs.pop("labels")
        record = inputs.pop("teacher", None)
        if num_items_in_batch is not None and int(num_items_in_batch) == 0:
            self._stop("all labels of a batch are masked (-100)")
        measured = self.objective(model, inputs, labels, record, num_items_in_batch)
        loss = measured.loss
        if not torch.isfinite(loss):
            self._stop(f"the loss became {float(loss.detach())}")
        self._sums = self._sums.to(loss.device) + measured.sums
        if self.spikes is not None:
            self._step_loss = self._step_loss.to(loss.device) + loss.detach()
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The normalizer counts the tokens of all ranks, and the gradients are then averaged over the ranks.
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

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
        if not step:
            return super().log(logs, start_time)
        sums = dict(zip(PARTS, self.accelerator.reduce(self._sums, "sum").tolist(), strict=True))
        labelled, now = sums["tokens"], time.perf_counter()
        logs |= {name: sums[name] / max(labelled, 1) for name in self.objective.parts}
        logs["tokens_per_second"] = labelled / (now - self._logged_at)
        self._sums = torch.zeros_like(self._sums)
        self._logged_at = now
        rates = {group.pattern: logs["learning_rate"] * group.lr_multiplier for group in self.groups}
        memory = memory_bytes()
        # Trackers draw numbers, so what is nested in our lines is flat for them.
        named = metric_names(rates)
        flat = {f"learning_rate/{named[pattern]}": rate for pattern, rate in rates.items()}
        flat |= {f"grad_norm/{kind}": norm for kind, norm in self._norms.items()} | {"memory_bytes": memory}
        super().log({**logs, **flat}, start_time)
        if self.is_world_process_zero():
            line = {"step": self.state.global_step, "stage": self.stage.name}
            line |= {key: value for key, value in logs.items() if key != "epoch"}
            line |= {"learning_rates": rates, "grad_norms": self._norms, "memory_bytes": memory, "time": time.time()}
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
        # Gathering a sharded state is a collective: every rank takes part, rank 0 gets it.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        state = self.accelerator.get_state_dict(self.model_wrapped) if sharded else student.state_dict()
        if self.is_deepspeed_enabled:
            state = _with_full_precision(student, state)
        if self.is_world_process_zero():
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_student(student, state, self.dtypes, self._saving, self.run.checkpoint(0))
            save_master_weights(state, self.dtypes, Path(output_dir))
            if self.spikes is not None:
                self.spikes.save(Path(output_dir), self.skipped)
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the student was loaded from the checkpoint, fp32 weights included, before the Trainer was made."""


def _with_full_precision(student: nn.Module, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """A state gathered by DeepSpeed, with the fp32 weights that it keeps beside the 16-bit ones; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    state = dict(state or {})
    full: dict[int, Tensor | None] = {}
    # Tied weights have two names and must stay one tensor.
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if id(parameter) not in full:
            value = safe_get_full_fp32_param(parameter)
            full[id(parameter)] = None if value is None else value.detach().to("cpu", copy=True)
        value = full[id(parameter)]
        if name in state and value is not None:
            state[name] = value
    return state
