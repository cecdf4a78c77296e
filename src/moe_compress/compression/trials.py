"""What compressing a layer really does to the predictions: some layers are compressed on trial, each alone.

Error curves estimate it from Fisher information: to second order, as if the inputs and the gradients of an expert had
nothing to do with each other, nor the experts of a token. That falls short by a factor which differs from layer to
layer (on the reference MoE from 1.2 in the last to 3.1 in the first), so that ranks chosen by it starve some. A trial
measures the factor: the KL divergence of a model with one layer compressed from the original, on some of the
calibration text, over the estimate. Layers that were not tried take what lies between those that were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_compress.compression.backward import stretches
from moe_compress.compression.calibrate import Calibration
from moe_compress.compression.checkpoint import made_by, read_header, read_tensor
from moe_compress.compression.collect import collect_into
from moe_compress.compression.layer import LayerWork
from moe_compress.compression.layerwise import DoesNotFit, LayerwiseModel
from moe_compress.compression.ranks import full_name
from moe_compress.compression.shards import tensor_source, write_shard
from moe_compress.compression.states import StateFile
from moe_compress.compression.walk import CalibrationWalk, Parameters, layer_calls, put_experts
from moe_compress.errors import UserError
from moe_compress.factorization import Budget, DeltaFactors, FitSpec, Form, greedy_choices
from moe_compress.files import fingerprint
from moe_compress.modeling import ExpertsModule, find_experts
from moe_compress.modeling.find import expert_weights, set_expert_weights

TOKENS = 8192  # of the calibration text that trials are measured on
# KL divergence per token that rounding alone may cause: a trial below it says nothing. Between the test models in bf16
# and in fp32 it is 0.0003 to 0.0011.
_NOISE = {torch.float32: 1e-6}
_NOISE_OF_16_BITS = 1e-3
_RANGE = 8.0  # of factors, both ways from their geometric mean: what lies beyond is an accident
_ESTIMATE = "estimate"


class Trials:
    """The layers of a model that are compressed on trial, whose factors wait on disk for being measured.

    Attributes:
        indices: of the MoE layers to try, spread over the depth.
    """

    def __init__(self, calibration: Calibration, names: list[str], budget: Budget, key: str, number: int) -> None:
        """Choose `number` layers (at most), of those whose experts have `names`; `key` is what decides their curves."""
        self.calibration, self.names, self.budget, self._key = calibration, names, budget, key
        places = np.linspace(0, len(names) - 1, min(number, len(names)))
        self.indices = sorted({round(place) for place in places})

    def file(self, index: int) -> Path:
        return self.calibration.directory / f"trial-{index:05d}.safetensors"

    def made(self, index: int) -> bool:
        """Whether the layer was compressed on trial, or found to be impossible, or is not to be tried."""
        return index not in self.indices or made_by(self.file(index), self._made_by(index))

    def make(self, index: int, work: LayerWork, curves: Mapping[str, Mapping[Form, list[float]]]) -> None:
        """Compress a layer to its share of the budget and keep that, if it is to be tried.

        Args:
            work: the layer as the curves were measured on it.
            curves: of each projection, its error in each form at every delta rank.
        """
        if index not in self.indices:
            return
        tensors: dict[str, Tensor] = {}
        estimate = 0.0
        try:
            choices = greedy_choices(curves, self._share(index))
        except UserError:  # a layer alone cannot be as small as the model may be on average
            choices = {}
        for projection, choice in choices.items():
            form, rank = choice.form, choice.delta_rank
            spec = FitSpec(delta_rank=rank, cores=form.cores, basis=form.basis, iterations=1)  # as the curves have it
            factors = work.fit(projection, spec, work.groups(projection, spec)).factors
            tensors |= {f"{projection}.{name}": part for name, part in vars(factors).items() if part is not None}
            estimate += curves[projection][form][rank]
        tensors |= {f"{projection}_bias": bias for projection, bias in work.biases.items()} if choices else {}
        tensors[_ESTIMATE] = torch.tensor([estimate], dtype=torch.float64)
        sources = {name: tensor_source(tensor) for name, tensor in tensors.items()}
        write_shard(self.file(index), sources, {"fingerprint": self._made_by(index)})

    def estimate(self, index: int) -> float:
        """The error that is expected of a layer; 0 where it could not be tried."""
        return float(read_tensor(read_header(self.file(index)).entries[_ESTIMATE]))

    def parameters(self, index: int) -> Parameters:
        """The factors and biases of a layer."""
        parts: dict[str, dict[str, Tensor]] = {}
        biases = {}
        for name, entry in read_header(self.file(index)).entries.items():
            projection, _, part = name.partition(".")
            if part:
                parts.setdefault(projection, {})[part] = read_tensor(entry)
            elif name != _ESTIMATE:
                biases[name] = read_tensor(entry)
        factors = {
            name: DeltaFactors(own.get("core"), own["delta_out"], own["delta_in"], own.get("groups"), own.get("basis"))
            for name, own in parts.items()
        }
        return factors, biases

    def effects(
        self, walk: CalibrationWalk | None, device: torch.device, progress: Callable[[int, int], None]
    ) -> list[float]:
        """By what the curves of each MoE layer are to be multiplied; 1 for all if no trial says anything, or if the
        model's head cannot be run by itself.

        Args:
            walk: takes text through the model; None if only the whole of it can run.
            device: where the whole runs.
            progress: called with what is done and what is to do.
        """
        estimates = {index: self.estimate(index) for index in self.indices}
        tried = [index for index in self.indices if estimates[index] > 0]
        rows = torch.from_numpy(self.calibration.rows[: rows_on_trial(self.calibration.rows.shape[1])])
        try:
            if walk is not None:
                walk.model.check_head()
        except DoesNotFit:  # with Fisher information there would be no walk
            return [1.0] * len(self.names)
        if walk is None:
            found, dtype = _of_whole_model(self, tried, rows, device, progress)
        else:
            found, dtype = _LayerwiseTrials(self, tried, rows, walk).run(progress), walk.model.dtype
        noise = _NOISE.get(dtype, _NOISE_OF_16_BITS)
        # With Fisher information twice the nats over the whole text, else without a unit.
        unit = 1.0 if self.calibration.fisher_seed is None else 1 / (2 * self.calibration.rows.size)
        ratios = {index: kl / (unit * estimates[index]) for index, kl in found.items() if kl > noise}
        return spread_between(ratios, len(self.names))

    def _share(self, index: int) -> Budget:
        """The budget of one layer, whose projections are called without the layer's name."""
        whole, prefix = self.budget, full_name((self.names[index], ""))
        shapes = {name.removeprefix(prefix): shape for name, shape in whole.shapes.items() if name.startswith(prefix)}
        values, all_values = (sum(map(math.prod, each.values())) for each in (shapes, whole.shapes))
        return replace(whole, shapes=shapes, total=math.floor(Fraction(whole.total * values, all_values)))

    def _made_by(self, index: int) -> str:
        return fingerprint([self._key, asdict(self.budget), index])


def rows_on_trial(length: int) -> int:
    """How many rows of so many tokens trials are measured on."""
    return max(1, TOKENS // length)


def spread_between(ratios: Mapping[int, float], count: int) -> list[float]:
    """Ratios of some of `count` layers, kept within a range of their geometric mean, and what lies between for others.

    Without any ratio, 1 for all.
    """
    if not ratios:
        return [1.0] * count
    logs = np.log([ratios[index] for index in sorted(ratios)])
    limit = math.log(_RANGE)
    logs = logs.mean() + np.clip(logs - logs.mean(), -limit, limit)
    return np.exp(np.interp(range(count), sorted(ratios), logs)).tolist()


class _LayerwiseTrials:
    """Takes text through the model as it is, and with each of the layers on trial, one decoder layer in memory."""

    def __init__(self, trials: Trials, tried: list[int], rows: Tensor, walk: CalibrationWalk) -> None:
        self.trials, self.tried, self.rows = trials, tried, rows
        self.model: LayerwiseModel = walk.model
        self.experts = walk.experts
        self.batches = rows.split(trials.calibration.config.compression.calibration.batch_size)

    @torch.no_grad()
    def run(self, progress: Callable[[int, int], None]) -> dict[int, float]:
        """The KL divergence per token that each trial leaves, by its index."""
        depth = len(self.model.layers)
        ways: list[int | None] = [None]  # the original, and every trial whose layer was passed
        for number in range(depth):
            block = self.model.layer(number)
            self._pass(block, number, {way: way for way in ways})
            for place, index in enumerate(index for index in self.model.moe_layers[number] if index in self.tried):
                if place:  # the one before has changed it
                    block = self.model.layer(number)
                module = self.model.experts(block, number)[index]
                put_experts(module, self.experts[index], self.trials.parameters(index))
                self._pass(block, number, {index: None})
                ways.append(index)
            for way in ways:
                self._states(way, number).remove()
            progress(number + 1, depth + 1)
        with self.model.head():
            found = self._divergences([way for way in ways if way is not None])
        for way in ways:
            self._states(way, depth).remove()
        progress(depth + 1, depth + 1)
        return found

    def _pass(self, block: nn.Module, number: int, ways: Mapping[int | None, int | None]) -> None:
        """Run a decoder layer for each of some ways, on the states that another way (or the same) comes with."""
        with collect_into({}, self.model.experts(block, number).values()):
            for way, origin in ways.items():
                self._states(way, number + 1).write(self._through(block, number, origin), len(self.rows))

    def _through(self, block: nn.Module, number: int, way: int | None) -> Iterator[Tensor]:
        for _, call, hidden_states in layer_calls(self.model, number, self.batches, self._states(way, number)):
            yield call.run(block, hidden_states)

    def _divergences(self, ways: list[int]) -> dict[int, float]:
        depth, length = len(self.model.layers), self.rows.shape[1]
        found = dict.fromkeys(ways, 0.0)

        def states(way: int | None, row: int) -> Tensor:
            return self._states(way, depth).read(row, row + 1).to(self.model.device)

        for row, input_ids in enumerate(self.rows.split(1)):
            original, trials = states(None, row), {way: states(way, row) for way in ways}
            for first, stop in stretches(self.model, length):
                expected = self.model.logits(input_ids, original, first, stop)
                for way, own in trials.items():
                    logits = self.model.logits(input_ids, own, first, stop)
                    found[way] += divergence(expected, logits) / self.rows.numel()
        return found

    def _states(self, way: int | None, number: int) -> StateFile:
        """What the decoder layer `number` is given on one way; for their number, what the last one gives."""
        name = "original" if way is None else f"{way:05d}"
        return StateFile(self.trials.calibration.directory / f"trial-{name}-{number:05d}.safetensors", "trial")


@torch.no_grad()
def _of_whole_model(
    trials: Trials, tried: list[int], rows: Tensor, device: torch.device, progress: Callable[[int, int], None]
) -> tuple[dict[int, float], torch.dtype]:
    """As `_LayerwiseTrials.run`, with the whole model in memory; and the type that it computes in."""
    model: Any = trials.calibration.load_model(device).eval()
    experts = find_experts(model)
    found = dict.fromkeys(tried, 0.0)
    for row, input_ids in enumerate(rows.to(device).split(1)):  # one at a time, for the sake of the logits
        original = model(input_ids=input_ids, use_cache=False).logits
        for index in tried:
            with _replaced(experts[index].module, experts[index], trials.parameters(index)):
                logits = model(input_ids=input_ids, use_cache=False).logits
            found[index] += divergence(original, logits) / rows.numel()
        progress(row + 1, len(rows))
    return found, model.dtype


def divergence(original: Tensor, other: Tensor) -> float:
    """KL(original || other) of logits [..., V], summed over all positions, in nats."""
    log_p, log_q = original.float().log_softmax(-1), other.float().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).sum(dtype=torch.float64))


@contextmanager
def _replaced(module: nn.Module, experts: ExpertsModule, parameters: Parameters) -> Iterator[None]:
    """A block in which an experts module has the weights that factors stand for, and their biases."""
    weights = {name: weight.clone() for name, weight in expert_weights(module).items()}
    biases = {name: getattr(module, name).clone() for name in parameters[1]}
    put_experts(module, experts, parameters)
    try:
        yield
    finally:
        set_expert_weights(module, weights)
        for name, bias in biases.items():
            getattr(module, name).copy_(bias)
