"""One decoder layer at a time gives what the whole model gives; a sequential calibration sees compressed layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from moe_compress.compression import compress, pipeline, walk
from moe_compress.compression.calibrate import Calibration
from moe_compress.compression.collect import collect_grams
from moe_compress.compression.layerwise import DoesNotFit, LayerwiseModel
from moe_compress.compression.source import SourceModel, open_model
from moe_compress.compression.walk import CalibrationWalk
from moe_compress.config import Config, ModelConfig
from moe_compress.errors import UserError
from moe_compress.modeling import compress_in_memory, find_experts
from moe_compress.modeling.tensors import factors_from_tensors
from moe_compress.run import Run
from tests.compression.runs import load

Settings = Callable[..., Config]
CPU = torch.device("cpu")


def opened(path: Path) -> tuple[SourceModel, LayerwiseModel]:
    settings = ModelConfig(name=str(path))
    source = open_model(settings)
    return source, LayerwiseModel(source, settings, CPU)


@torch.inference_mode()
def test_layer_after_layer_is_the_model(family: str, model_dir: Callable[[str], Path], tokens: Tensor) -> None:
    source, layerwise = opened(model_dir(family))
    whole = load(model_dir(family))
    path = next(name for name, module in whole.named_modules() if isinstance(module, nn.ModuleList))
    expected: list[Tensor] = []
    for layer in whole.get_submodule(path):
        layer.register_forward_hook(
            lambda module, inputs, output: expected.append(output[0] if isinstance(output, tuple) else output)
        )
    whole.base_model(tokens)
    assert [index for layers in layerwise.moe_layers for index in layers] == list(range(len(source.map.layers)))
    hidden = layerwise.call(0, tokens).hidden_states
    for number in range(len(layerwise.layers)):
        block = layerwise.layer(number)
        hidden = layerwise.call(number, tokens).run(block, hidden)
        assert torch.equal(hidden, expected[number]), number
    # What is not running lies on disk.
    assert all(parameter.is_meta for layer in layerwise.layers for parameter in layer.parameters())


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_the_walk_collects_what_the_whole_model_gives(
    family: str, model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path
) -> None:
    path = model_dir(family)
    source, layerwise = opened(path)
    calibration = Calibration(settings(path, calibrate=True), path, "source", tmp_path)
    experts = [layer.experts for layer in source.map.layers]
    walked = list(CalibrationWalk(layerwise, calibration, experts).run(lambda index: False, lambda index: {}))
    assert walked == list(range(len(experts)))
    assert not list(tmp_path.glob("inputs-*"))
    model = load(path)
    whole = collect_grams(model, find_experts(model), calibration.batches)
    for index, found in enumerate(experts):
        layer = calibration.load(index)
        assert torch.equal(layer.tokens, whole[found.name].tokens)
        for name, gram in layer.grams.items():
            torch.testing.assert_close(gram, whole[found.name].grams[name], rtol=1e-4, atol=1e-5)


def test_an_interrupted_walk_goes_on(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_dir("nemotron_h")  # layers 0 and 2 of 4 hold experts
    source, layerwise = opened(path)
    experts = [layer.experts for layer in source.map.layers]
    config = settings(path, calibrate=True)

    def walk_in(directory: Path) -> tuple[Calibration, CalibrationWalk]:
        calibration = Calibration(config, path, "source", directory)
        return calibration, CalibrationWalk(layerwise, calibration, experts)

    whole, uninterrupted = walk_in(tmp_path / "whole")
    list(uninterrupted.run(lambda index: False, lambda index: {}))
    calibration, interrupted = walk_in(tmp_path / "parts")
    real = LayerwiseModel.layer

    def killed(self: LayerwiseModel, number: int) -> nn.Module:
        if number == 2:
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(LayerwiseModel, "layer", killed)
    with pytest.raises(KeyboardInterrupt):
        list(interrupted.run(lambda index: False, lambda index: {}))
    assert [file.name for file in (tmp_path / "parts").glob("inputs-*")] == ["inputs-00002.safetensors"]
    numbers: list[int] = []

    def watched(self: LayerwiseModel, number: int) -> nn.Module:
        numbers.append(number)
        return real(self, number)

    monkeypatch.setattr(LayerwiseModel, "layer", watched)
    calibration, again = walk_in(tmp_path / "parts")
    assert list(again.run(lambda index: False, lambda index: {})) == [0, 1]
    assert numbers == [2]
    for index in range(2):
        assert calibration.file(index).read_bytes() == whole.file(index).read_bytes()


def test_sequential_sees_the_layers_before_compressed(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_dir("gpt_oss")  # transposed, interleaved, with biases
    seen: dict[int, dict[str, Tensor]] = {}
    real = walk.Calibration.write

    def write(self: Calibration, index: int, layer: Any) -> None:
        seen[index] = {name: gram.clone() for name, gram in layer.grams.items()}
        real(self, index, layer)

    monkeypatch.setattr(walk.Calibration, "write", write)
    config = settings(path, calibrate=True, rank=1)
    config.compression.calibration.sequential = True
    run = Run.create(tmp_path / "run", config)
    compress(run)

    model = load(path)
    names = [found.name for found in find_experts(model)]
    before = collect_grams(model, find_experts(model), Calibration(config, path, "", tmp_path).batches)
    stored: dict[str, Tensor] = {}
    for file in run.checkpoint(0).glob("*.safetensors"):
        stored.update(load_file(file))
    factors, biases = {}, {}
    for name in names:
        tensors = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        factors[name] = {key: factors_from_tensors(key, tensors) for key in ("gate_up_proj", "down_proj")}
        biases[name] = {key: value for key, value in tensors.items() if key.endswith("_bias")}
    inputs: list[Tensor] = []
    compressed = compress_in_memory(load(path), factors, biases)
    second = compressed.get_submodule(names[1])
    second.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        for batch in Calibration(config, path, "", tmp_path).batches:
            compressed.base_model(batch)
    # The first layer saw the original model, the second one what the first, compressed, makes of it.
    torch.testing.assert_close(seen[0]["gate_up_proj"], before[names[0]].grams["gate_up_proj"], rtol=1e-3, atol=1e-4)
    assert relative(seen[1]["gate_up_proj"], before[names[1]].grams["gate_up_proj"]) > 1e-2
    hidden = torch.cat([states.reshape(-1, states.shape[-1]) for states in inputs])
    trace = seen[1]["gate_up_proj"].diagonal(dim1=1, dim2=2).sum()
    weights = routing_weights_of(compressed, names[1], Calibration(config, path, "", tmp_path).batches)
    torch.testing.assert_close(trace, (hidden.square().sum(1) * weights.square().sum(1)).sum(), rtol=1e-3, atol=1e-4)


def relative(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())


@torch.no_grad()
def routing_weights_of(model: Any, name: str, batches: tuple[Tensor, ...]) -> Tensor:
    weights: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: weights.append(inputs[2]))
    for batch in batches:
        model.base_model(batch)
    hook.remove()
    return torch.cat(weights)


def test_what_does_not_fit_says_so(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here because something happens to the hidden states between the layers."""
    path = model_dir("olmoe")
    real = LayerwiseModel._on_layer

    def changed(self: LayerwiseModel, number: int, call: Any) -> Any:
        output = real(self, number, call)
        return (output[0] + 0,) if isinstance(output, tuple) else output + 0

    monkeypatch.setattr(LayerwiseModel, "_on_layer", changed)
    with pytest.raises(DoesNotFit, match="more than hidden states|something happens"):
        opened(path)
    config = settings(path, calibrate=True)
    console = Console(record=True, width=200)
    monkeypatch.setattr(pipeline, "Console", lambda: console)
    run = Run.create(tmp_path / "run", config)
    compress(run)  # with the whole model in memory
    assert "OlmoeForCausalLM cannot be run layer by layer (" in console.export_text()
    facts = json.loads((run.path / "compression.json").read_text())
    assert all(sum(layer["load"]) == 10 * 32 * 2 for layer in facts["layers"].values())
    config.compression.calibration.sequential = True
    with pytest.raises(UserError, match=r"cannot be calibrated layer by layer .*sequential=false"):
        compress(Run.create(tmp_path / "sequential", config))
