"""Fisher information layer by layer: the calibration text forward, the log-likelihood of samples, and backward again.

On the way forward the inputs of every decoder layer stay on disk. The head then gives the gradient of its own inputs,
and each layer, from the last one up, is run once more with its stored inputs, for the gradients of its experts and of
these inputs, which the layer before it goes on from. So one decoder layer and the activations of one batch are in
memory, whatever the model's depth (the recomputation of Chen et al., arXiv 1604.06174, layer by layer and from disk).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_compress.compression.layerwise import LayerwiseModel
from moe_compress.compression.predictions import draws_for, surprise_of_samples
from moe_compress.compression.states import StateFile
from moe_compress.compression.walk import CalibrationWalk, Parameters
from moe_compress.errors import UserError, first_line
from moe_compress.files import fingerprint

LOGITS_BYTES = 64 << 20  # logits in fp32 that are looked at together


def stretches(model: LayerwiseModel, length: int) -> Iterator[tuple[int, int]]:
    """First position and end of parts of a sequence whose logits are looked at together; the whole of it, where the
    head cannot be run at some positions only."""
    step = min(length, max(1, LOGITS_BYTES // (4 * model.vocabulary))) if model.picks else length
    return ((first, min(first + step, length)) for first in range(0, length, step))


class FisherWalk(CalibrationWalk):
    """Collects the matrices of a calibration with Fisher information, from the last MoE layer to the first."""

    def _through(
        self, todo: list[int], compressed: Callable[[int], Parameters], progress: Callable[[int, int], None]
    ) -> Iterator[int]:
        lowest, depth = self._holding(todo[-1]), len(self.model.layers)
        above = self._resumed(lowest, self._holding(todo[0]))
        steps = list(range(lowest, depth if above is None else above))
        done, total = 0, len(steps)
        if above is None:
            forward = range(self._forward_from(lowest), depth)
            total += len(forward) + 1
            for number in forward:
                self._pass(number, [], onward=True, keep=number >= lowest)
                progress(done := done + 1, total)
            self._begin_backward()
            progress(done := done + 1, total)
        for number in reversed(steps):
            here = [index for index in todo if index in self.model.moe_layers[number]]
            results = self._gradients(number) if number > lowest else None
            self._collect(number, here, self._gradients_of_layer, results)
            self._inputs(number).remove()
            self._gradients(number + 1).remove()
            yield from here
            progress(done := done + 1, total)
        for number in range(depth + 1):  # left by runs that were killed
            self._inputs(number).remove()
            self._gradients(number).remove()

    def _resumed(self, lowest: int, highest: int) -> int | None:
        """The decoder layer above `highest` from which the way back to `lowest` is on disk; None if there is none."""
        for number in range(highest + 1, len(self.model.layers) + 1):
            below = range(max(lowest, 1), number)  # the inputs of the first layer are always at hand
            if self._gradients(number).exists() and all(self._inputs(each).exists() for each in below):
                return number
        return None

    def _forward_from(self, lowest: int) -> int:
        """The decoder layer to begin with, so that the inputs of all from `lowest` on are on disk in the end."""
        number, depth = self._reached(lowest), len(self.model.layers)
        while lowest <= number < depth and self._inputs(number + 1).exists():
            number += 1
        return number

    @torch.no_grad()
    def _begin_backward(self) -> None:
        """Write the gradients of what the last decoder layer has put out."""
        depth = len(self.model.layers)
        with self.model.head():
            self._gradients(depth).write(self._gradients_of_predictions(), len(self.calibration.rows))
        self._inputs(depth).remove()

    def _gradients_of_predictions(self) -> Iterator[Tensor]:
        assert self.calibration.fisher_seed is not None
        generator = torch.Generator().manual_seed(self.calibration.fisher_seed)
        states, done = self._inputs(len(self.model.layers)), 0
        for input_ids in self.calibration.batches:
            draws = draws_for(input_ids, generator)
            rows = range(len(input_ids))
            yield torch.cat(
                [
                    self._gradient_of_predictions(
                        input_ids[row : row + 1], states.read(done + row, done + row + 1), draws[row : row + 1]
                    )
                    for row in rows
                ]
            )
            done += len(rows)

    def _gradient_of_predictions(self, input_ids: Tensor, hidden_states: Tensor, draws: Tensor) -> Tensor:
        """The gradient of minus the log-likelihood of samples, for one sequence: [1, L, H], as `hidden_states`."""
        start = hidden_states.to(self.model.device).requires_grad_()
        with self._differentiated("the head"):
            for first, stop in stretches(self.model, draws.shape[1]):
                logits = self.model.logits(input_ids, start, first, stop)
                surprise_of_samples(logits, draws[:, first:stop]).backward()
        assert start.grad is not None
        return start.grad

    def _gradients_of_layer(self, block: nn.Module, number: int) -> Iterator[Tensor]:
        above = self._gradients(number + 1)
        for rows, call, hidden_states in self._calls(number):
            start = hidden_states.detach().requires_grad_()
            with self._differentiated(f"decoder layer {number}"):
                # A copy, because a layer may change in place what it is given.
                output = call.run(block, start.clone())
                output.backward(above.read(rows.start, rows.stop).to(output.device))
            del output
            assert start.grad is not None
            yield start.grad

    @contextmanager
    def _differentiated(self, what: str) -> Iterator[None]:
        try:
            with torch.enable_grad():
                yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"{what} of {type(self.model.model).__name__} cannot be run backward ({first_line(error)}); "
                "set compression.calibration.fisher=false"
            ) from error

    def _gradients(self, number: int) -> StateFile:
        """The gradients of what `_inputs` names."""
        key = fingerprint([self._key(number), "gradients"])
        return StateFile(self.calibration.directory / f"gradients-{number:05d}.safetensors", key)
