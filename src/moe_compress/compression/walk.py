"""The calibration text's way through the model, one decoder layer in memory at a time.

The hidden states between two layers lie on disk, one file at a time, so that a killed run goes on where it was and the
text may be larger than memory. Every pass runs the experts by the same code, whether it collects or not: what comes
out of a layer does not depend on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_compress.compression.calibrate import Calibration, LayerGrams, collect_into
from moe_compress.compression.checkpoint import read_header, read_tensor
from moe_compress.compression.layerwise import LayerwiseModel
from moe_compress.compression.shards import Source, tensor_source, write_shard
from moe_compress.errors import UserError
from moe_compress.factorization import Factors
from moe_compress.files import fingerprint
from moe_compress.modeling import ExpertsModule
from moe_compress.modeling.find import set_expert_weights

Parameters = tuple[Mapping[str, Factors], Mapping[str, Tensor]]  # factors by projection, biases by `<projection>_bias`


class CalibrationWalk:
    """Collects the Gram matrices of a calibration layer by layer."""

    def __init__(self, model: LayerwiseModel, calibration: Calibration, experts: list[ExpertsModule]) -> None:
        """Bind a model and a text; `experts` are the modules of the MoE layers, by index. Nothing is run yet."""
        self.model = model
        self.calibration = calibration
        self.experts = experts

    def run(
        self,
        done: Callable[[int], bool],
        compressed: Callable[[int], Parameters],
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> Iterator[int]:
        """Yield the index of each MoE layer that is not `done`, in order, once its matrices are on disk.

        With `calibration.sequential`, the caller has to compress the layer before it asks for the next one.

        Args:
            done: whether a MoE layer needs no matrices (any more).
            compressed: the factors and biases of a compressed MoE layer; asked for only with `calibration.sequential`.
            progress: called with the decoder layers done and those to do.
        """
        self.calibration.directory.mkdir(parents=True, exist_ok=True)
        todo = [index for layers in self.model.moe_layers for index in layers if not done(index)]
        if not self.calibration.sequential:  # what an interrupted walk has left can be used before going on
            ready = list(takewhile(self.calibration.finished, todo))
            yield from ready
            todo = todo[len(ready) :]
        if not todo:
            return
        wanted = [number for number, layers in enumerate(self.model.moe_layers) if not set(todo).isdisjoint(layers)]
        first, last = self._start(wanted[0]), wanted[-1]
        for number in range(first, last + 1):
            layers = self.model.moe_layers[number]
            here = [index for index in layers if index in todo]
            missing = [index for index in here if not self.calibration.finished(index)]
            onward = number < last
            if self.calibration.sequential:
                if missing:
                    self._pass(number, missing, onward=False)
                yield from here
                if onward:
                    self._pass(number, [], onward=True, compressed={index: compressed(index) for index in layers})
            else:
                if missing or onward:
                    self._pass(number, missing, onward=onward)
                yield from here
            progress(number - first + 1, last - first + 1)
        self._file(last).unlink(missing_ok=True)

    @torch.inference_mode()
    def _pass(
        self,
        number: int,
        collect: list[int],
        *,
        onward: bool,
        compressed: Mapping[int, Parameters] | None = None,
    ) -> None:
        """Run all batches through one decoder layer.

        Args:
            collect: MoE layers in it whose matrices are collected and written.
            onward: whether the outputs are kept, as inputs of the next layer.
            compressed: what to run its MoE layers with instead of the original experts.
        """
        block = self.model.layer(number)
        modules = self.model.experts(block, number)
        for index, parameters in (compressed or {}).items():
            _put(modules[index], self.experts[index], parameters)
        device, counts_only = self.model.device, self.calibration.counts_only
        sums = {index: LayerGrams.zeros(self.experts[index], device, counts_only=counts_only) for index in collect}
        with collect_into({modules[index]: layer for index, layer in sums.items()}, modules.values()):
            outputs = self._outputs(block, number)
            if onward:
                self._write(number + 1, outputs)
            else:
                for _ in outputs:
                    pass
        for index, layer in sums.items():
            self.calibration.write(index, layer)
        if onward:
            self._file(number).unlink(missing_ok=True)

    def _outputs(self, block: nn.Module, number: int) -> Iterator[Tensor]:
        entries = read_header(self._file(number)).entries if number else {}
        for batch, input_ids in enumerate(self.calibration.batches):
            call = self.model.call(number, input_ids)
            hidden_states = read_tensor(entries[_name(batch)]) if number else call.hidden_states
            yield call.run(block, hidden_states.to(self.model.device))

    def _write(self, number: int, outputs: Iterator[Tensor]) -> None:
        """Write the inputs of a decoder layer as they are computed, so that one batch at a time is in memory."""
        first = next(outputs)

        def chunks(batch: int) -> Iterator[bytearray | memoryview]:
            output = first if batch == 0 else next(outputs)
            yield from tensor_source(output).chunks()

        pattern = tensor_source(first[:1])
        sources = {
            _name(batch): Source(
                pattern.dtype,
                (len(input_ids), *pattern.shape[1:]),
                len(input_ids) * pattern.nbytes,
                partial(chunks, batch),
            )
            for batch, input_ids in enumerate(self.calibration.batches)
        }
        write_shard(self._file(number), sources, {"fingerprint": self._key(number)})

    def _start(self, number: int) -> int:
        """The decoder layer to begin with so that `number` is reached: the last one whose inputs are on disk."""
        for candidate in range(number, 0, -1):
            file = self._file(candidate)
            try:
                if file.exists() and read_header(file).metadata.get("fingerprint") == self._key(candidate):
                    return candidate
            except UserError:  # cut short: make it again
                continue
        return 0

    def _key(self, number: int) -> str:
        """What decides the inputs of a decoder layer: for a sequential calibration, also the layers before it."""
        before = [index for layers in self.model.moe_layers[:number] for index in layers]
        nearest = max(before, default=-1) + 1  # the MoE layer that comes next, which follows those before
        return fingerprint([self.calibration.key(nearest), number])

    def _file(self, number: int) -> Path:
        return self.calibration.directory / f"inputs-{number:05d}.safetensors"


def _name(batch: int) -> str:
    return f"batch-{batch:06d}"


def _put(module: nn.Module, experts: ExpertsModule, parameters: Parameters) -> None:
    """Write the product of factors into an experts module of the original class, with the biases."""
    factors, biases = parameters
    for name, bias in biases.items():
        getattr(module, name).copy_(bias)
    weights = {}
    for projection in experts.projections:
        own, device = factors[projection], getattr(module, projection).device
        moved = {name: tensor.to(device) for name, tensor in vars(own).items() if tensor is not None}
        weights[projection] = replace(own, **moved).materialize()
    set_expert_weights(module, weights)
