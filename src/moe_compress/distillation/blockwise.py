"""Block-wise output matching: each MoE layer learns by itself to give what the teacher's gives for the same input.

The teacher is run one decoder layer at a time, so that it is never in memory as a whole. What its experts are called
with (hidden states, chosen experts, routing weights) and what they return is the training data of the student's experts
of that layer, which train at once, with an optimizer of their own. The teacher's hidden states go on to the next layer,
so no layer depends on how well another one was learnt, and processes may divide the layers among them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from moe_compress.compression.checkpoint import made_by
from moe_compress.compression.layerwise import DoesNotFit, LayerwiseModel
from moe_compress.compression.source import open_model
from moe_compress.compression.states import StateFile
from moe_compress.distillation.data import TrainingOrder, collate
from moe_compress.distillation.layerfit import LayerFit
from moe_compress.distillation.parameters import ParameterGroup
from moe_compress.distillation.stages import Stage
from moe_compress.distillation.teachers import teacher_path
from moe_compress.errors import UserError
from moe_compress.files import append_line, file_in_progress, fingerprint
from moe_compress.modeling import find_shared_cores
from moe_compress.modeling.experts import SharedCoreExperts

if TYPE_CHECKING:
    from moe_compress.run import Run

BLOCKWISE_LOG = "blockwise.jsonl"


class BlockwiseTraining:
    """The block-wise training of one stage, or of the layers in it that fall to one process.

    Args:
        run: where settings come from and logs go.
        stage: steps, learning rate and schedule; every layer takes all its steps.
        order: the sequences of the stage.
        student: the student in fp32; what is learnt is written to files, not to it.
        groups: what trains, and how fast.
        rank, world: this process among those that divide the layers.

    Raises:
        UserError: the student has no shared cores, or the teacher cannot be run layer by layer.
    """

    def __init__(
        self,
        run: Run,
        stage: Stage,
        order: TrainingOrder,
        student: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.run = run
        self.stage = stage
        self.order = order
        self.groups = groups
        self.main = rank == 0
        self.directory = run.path / "blockwise" / f"from-{stage.first_step}"
        self.inputs_directory = self.directory / f"rank-{rank}"
        self.training = run.config.distillation.training
        self.device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
        settings = replace(run.config.model, name=str(teacher_path(run.config)), revision=None)
        source = open_model(settings)
        cores = find_shared_cores(student)
        self.names = [layer.name for layer in source.map.layers]
        if sorted(cores) != sorted(self.names):
            raise UserError(
                f"distillation stage '{stage.name}' (blockwise) trains shared cores towards the teacher's experts, but "
                f"the student has {len(cores)} of them and the teacher {len(self.names)} MoE layers"
            )
        try:
            self.teacher = LayerwiseModel(source, settings, torch.device(self.device))
        except DoesNotFit as reason:
            raise UserError(
                f"distillation stage '{stage.name}' (blockwise): {settings.name} cannot be run layer by layer "
                f"({reason}); leave the stage out"
            ) from None
        self.modules = [cores[name] for name in self.names]
        share = -(-len(self.names) // world)
        self.mine = range(len(self.names))[rank * share : (rank + 1) * share]
        self.key = fingerprint([asdict(stage), run.config.seed, len(order), source.checkpoint.fingerprint])

    def layer_file(self, index: int) -> Path:
        """Where the learnt parameters of a MoE layer are, fp32, by their names in the experts module."""
        return self.directory / f"layer-{index:05d}.safetensors"

    def finished(self, index: int) -> bool:
        """Whether a MoE layer has been learnt, with these settings."""
        return made_by(self.layer_file(index), self.key)

    def train(self) -> None:
        """Train the layers of this process, but for those that an interrupted attempt has finished."""
        todo = [index for index in self.mine if not self.finished(index)]
        if not todo:
            return
        self.inputs_directory.mkdir(parents=True, exist_ok=True)
        wanted = [number for number, layers in enumerate(self.teacher.moe_layers) if not set(todo).isdisjoint(layers)]
        first = next((n for n in range(wanted[0], 0, -1) if self._inputs(n).exists()), 0)
        bar = tqdm(
            total=(wanted[-1] + 1 - first) * self.stage.steps, disable=not self.main, mininterval=1.0, unit="step"
        )
        with bar:
            for number in range(first, wanted[-1] + 1):
                here = [index for index in self.teacher.moe_layers[number] if index in todo]
                bar.set_description(f"{self.stage.name}: layer {number + 1} of {len(self.teacher.moe_layers)}")
                self._pass(number, here, bar, onward=number < wanted[-1])
        self._inputs(wanted[-1]).remove()

    def load_into(self, student: nn.Module) -> None:
        """Give a student what all processes have learnt; waits for those that are not ready."""
        modules = find_shared_cores(student)
        for index, name in enumerate(self.names):
            while not self.finished(index):
                time.sleep(0.2)
            modules[name].load_state_dict(load_file(self.layer_file(index)), strict=False)

    @torch.no_grad()
    def _pass(self, number: int, indices: list[int], bar: Any, *, onward: bool) -> None:
        """Run all sequences through one decoder layer of the teacher, training the MoE layers `indices` in it."""
        block = self.teacher.layer(number)
        fits = {index: self._fit(index) for index in indices}
        with ExitStack() as stack:
            for index, module in self.teacher.experts(block, number).items():
                if index in fits:
                    handle = module.register_forward_hook(fits[index].see, with_kwargs=True)
                    stack.callback(handle.remove)
            outputs = self._outputs(block, number, fits, bar)
            if onward:
                self._inputs(number + 1).write(outputs, len(self.order))
            else:
                for _ in outputs:
                    pass
        if onward:
            self._inputs(number).remove()

    def _fit(self, index: int) -> LayerFit:
        name = self.names[index]
        groups = [
            ParameterGroup(group.pattern, group.lr_multiplier, group.decay, *_those_below(name, group))
            for group in self.groups
        ]
        groups = [group for group in groups if group.names]
        if not groups:
            raise UserError(f"distillation stage '{self.stage.name}' (blockwise): nothing of {name} trains in it")
        module: SharedCoreExperts = self.modules[index]
        return LayerFit(module.to(self.device), groups, self.stage, self.training)

    def _outputs(self, block: nn.Module, number: int, fits: dict[int, LayerFit], bar: Any) -> Iterator[Tensor]:
        """The hidden states after a decoder layer, batch by batch; the layers in `fits` train on the way."""
        size = self.training.per_device_train_batch_size
        per_step = len(self.order) // self.stage.steps
        for step in range(1, self.stage.steps + 1):
            starts = range((step - 1) * per_step, step * per_step, size)
            for start in starts:
                stop = min(start + size, step * per_step)
                records = [self.order[item] for item in range(start, stop)]
                batch, tokens = self._teacher_inputs(records)
                call = self.teacher.call(number, **batch)
                hidden = call.hidden_states if number == 0 else self._inputs(number).read(start, stop)
                for fit in fits.values():
                    fit.expect(tokens, share=(stop - start) / per_step)
                yield call.run(block, hidden.to(self.device))
            for index, fit in fits.items():
                self._take_step(index, fit, step)
            bar.update()
            if fits and step % self.training.logging_steps == 0:
                bar.set_postfix(error=f"{next(iter(fits.values())).last_error:.4g}", refresh=False)

    def _teacher_inputs(self, records: Sequence[Mapping[str, np.ndarray]]) -> tuple[dict[str, Tensor], Tensor]:
        """What the teacher is called with for some sequences, all padded to the same length; which places are tokens.

        Returns:
            `input_ids` and, where documents are isolated, `position_ids`, int64 `[batch, length]`; bool
            `[batch * length]`.
        """
        dataset = self.run.config.distillation.dataset
        batch = collate(records, isolate=dataset.packing == "isolate")
        padding = (0, dataset.max_length - batch["input_ids"].shape[1])
        names = [name for name in ("input_ids", "position_ids") if name in batch]
        inputs: dict[str, Tensor] = {name: functional.pad(batch[name], padding) for name in names}
        lengths = torch.tensor([len(record["input_ids"]) for record in records])
        return inputs, (torch.arange(dataset.max_length) < lengths[:, None]).flatten()

    def _take_step(self, index: int, fit: LayerFit, step: int) -> None:
        fit.step()
        name = self.names[index]
        if fit.last_error != fit.last_error or fit.last_error == float("inf"):
            raise UserError(
                f"distillation stage '{self.stage.name}': the error of {name} became {fit.last_error} at step {step}; "
                "try a lower learning rate or more warm-up in a new run"
            )
        last = step == self.stage.steps
        if step % self.training.logging_steps == 0 or step == 1 or last:
            line = {"stage": self.stage.name, "layer": name, "step": step, "error": fit.mean_error()}
            line |= {"learning_rate": fit.learning_rate, "grad_norm": fit.grad_norm, "time": time.time()}
            append_line(self.run.logs_dir / BLOCKWISE_LOG, line)
        if last:
            with file_in_progress(self.layer_file(index)) as temporary:
                save_file(fit.result(), temporary, metadata={"fingerprint": self.key})
            self.modules[index].to("cpu")
            tqdm.write(f"{name}: error {fit.first_error:.4f} -> {fit.last_error:.4f}")

    def _inputs(self, number: int) -> StateFile:
        """The teacher's hidden states before a decoder layer."""
        return StateFile(self.inputs_directory / f"inputs-{number:05d}.safetensors", self.key)


def _those_below(name: str, group: ParameterGroup) -> tuple[list[str], list[nn.Parameter]]:
    pairs = zip(group.names, group.parameters, strict=True)
    chosen = [pair for pair in pairs if pair[0].startswith(f"{name}.")]
    return [name for name, _ in chosen], [parameter for _, parameter in chosen]
