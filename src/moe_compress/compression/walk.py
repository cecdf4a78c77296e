"""The calibration text's way through the model, one decoder layer in memory at a time.

The hidden states between two layers lie on disk, one file at a time, so that a killed run goes on where it was and the
text may be larger than memory. Every pass runs the experts by the same code, whether it collects or not: what comes
out of a layer does not depend on where a run was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor, nn

from moe_compress.compression.calibrate import Calibration
from moe_compress.compression.collect import LayerGrams, collect_into
from moe_compress.compression.layerwise import LayerCall, LayerwiseModel
from moe_compress.compression.states import StateFile
from moe_compress.factorization import Factors
from moe_compress.factorization.grams import chunks
from moe_compress.files import fingerprint
from moe_compress.modeling import ExpertsModule
from moe_compress.modeling.find import to_native

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
        """Yield the index of each MoE layer that is not `done`, in the order of `Calibration.order`, once its matrices
        are on disk.

        With `calibration.sequential`, the caller has to compress the layer before it asks for the next one.

        Args:
            done: whether a MoE layer needs no matrices (any more).
            compressed: the factors and biases of a compressed MoE layer; asked for only with `calibration.sequential`.
            progress: called with the decoder layers done and those to do.
        """
        self.calibration.directory.mkdir(parents=True, exist_ok=True)
        todo = [index for index in self.calibration.order(len(self.experts)) if not done(index)]
        if not self.calibration.sequential:  # what an interrupted walk has left can be used before going on
            ready = list(takewhile(self.calibration.finished, todo))
            yield from ready
            todo = todo[len(ready) :]
        if todo:
            yield from self._through(todo, compressed, progress)

    def _through(
        self, todo: list[int], compressed: Callable[[int], Parameters], progress: Callable[[int, int], None]
    ) -> Iterator[int]:
        """Run the text and yield the MoE layers `todo`, of which there are some, as `run` does."""
        last = self._holding(todo[-1])
        first = self._reached(self._holding(todo[0]))
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
        self._inputs(last).remove()

    def _pass(
        self,
        number: int,
        collect: list[int],
        *,
        onward: bool,
        keep: bool = False,
        compressed: Mapping[int, Parameters] | None = None,
    ) -> None:
        """Run all batches forward through one decoder layer.

        Args:
            collect: MoE layers in it whose matrices are collected and written.
            onward: whether the outputs are kept, as inputs of the next layer.
            keep: whether its own inputs are kept even then.
            compressed: what to run its MoE layers with instead of the original experts.
        """
        self._collect(number, collect, self._outputs, self._inputs(number + 1) if onward else None, compressed)
        if onward and not keep:
            self._inputs(number).remove()

    @torch.no_grad()
    def _collect(
        self,
        number: int,
        collect: list[int],
        run: Callable[[nn.Module, int], Iterator[Tensor]],
        results: StateFile | None,
        compressed: Mapping[int, Parameters] | None = None,
    ) -> None:
        """Read a decoder layer, `run` it on all batches, keep the results if a file is given, and write the matrices of
        the MoE layers `collect` in it."""
        block = self.model.layer(number)
        modules = self.model.experts(block, number)
        for index, parameters in (compressed or {}).items():
            put_experts(modules[index], self.experts[index], parameters)
        options = {"fisher": self.calibration.fisher_seed is not None, "counts_only": self.calibration.counts_only}
        sums = {index: LayerGrams.zeros(self.experts[index], self.model.device, **options) for index in collect}
        with collect_into({modules[index]: layer for index, layer in sums.items()}, modules.values()):
            states = run(block, number)
            if results is not None:
                results.write(states, len(self.calibration.rows))
            else:
                for _ in states:
                    pass
        for index, layer in sums.items():
            self.calibration.write(index, layer)

    def _outputs(self, block: nn.Module, number: int) -> Iterator[Tensor]:
        for _, call, hidden_states in self._calls(number):
            yield call.run(block, hidden_states)

    def _calls(self, number: int) -> Iterator[tuple[slice, LayerCall, Tensor]]:
        """What a decoder layer is called with, batch by batch: which sequences these are, and its inputs [B, L, H]."""
        return layer_calls(self.model, number, self.calibration.batches, self._inputs(number))

    def _holding(self, index: int) -> int:
        """The decoder layer that holds a MoE layer."""
        return next(number for number, layers in enumerate(self.model.moe_layers) if index in layers)

    def _reached(self, number: int) -> int:
        """The last decoder layer up to `number` whose inputs are at hand; those of the first one always are."""
        return next((candidate for candidate in range(number, 0, -1) if self._inputs(candidate).exists()), 0)

    def _inputs(self, number: int) -> StateFile:
        """The inputs of a decoder layer, or, for the number of layers, what the last one puts out."""
        return StateFile(self.calibration.directory / f"inputs-{number:05d}.safetensors", self._key(number))

    def _key(self, number: int) -> str:
        """What decides the inputs of a decoder layer: for a sequential calibration, also the layers before it."""
        before = [index for layers in self.model.moe_layers[:number] for index in layers]
        nearest = max(before, default=-1) + 1  # the MoE layer that comes next, which follows those before
        return fingerprint([self.calibration.key(nearest), number])


def layer_calls(
    model: LayerwiseModel, number: int, batches: Iterable[Tensor], inputs: StateFile
) -> Iterator[tuple[slice, LayerCall, Tensor]]:
    """What a decoder layer is called with for batches of token ids [B, L]: which sequences these are of all, the call,
    and the layer's inputs [B, L, H]; the first layer's are the embedding's, the others' lie in a file."""
    done = 0
    for input_ids in batches:
        rows = slice(done, done + len(input_ids))
        call = model.call(number, input_ids)
        hidden_states = inputs.read(rows.start, rows.stop) if number else call.hidden_states
        yield rows, call, hidden_states.to(model.device)
        done = rows.stop


def put_experts(module: nn.Module, experts: ExpertsModule, parameters: Parameters) -> None:
    """Write the product of factors into an experts module of the original class, with the biases."""
    factors, biases = parameters
    for name, bias in biases.items():
        getattr(module, name).copy_(bias)
    for projection, (count, *sides) in experts.projections.items():
        own, target = factors[projection], getattr(module, projection)
        moved = {name: tensor.to(target.device) for name, tensor in vars(own).items() if tensor is not None}
        whole = replace(own, **moved)
        for part in chunks(count, 4 * math.prod(sides)):
            target[part].copy_(to_native(whole.materialize(part), experts.is_transposed))
