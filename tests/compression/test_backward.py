"""Fisher information layer by layer: the matrices of the whole model's backward pass, resumable, in little memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_compress.compression import allocate, backward, compress
from moe_compress.compression.backward import FisherWalk
from moe_compress.compression.calibrate import Calibration
from moe_compress.compression.collect import collect_grams
from moe_compress.compression.layerwise import DoesNotFit, LayerwiseModel
from moe_compress.compression.source import SourceModel, open_model
from moe_compress.compression.walk import CalibrationWalk
from moe_compress.config import Config, ModelConfig
from moe_compress.errors import UserError
from moe_compress.modeling import find_experts, load_model
from moe_compress.run import Run
from tests.compression.runs import saved

Settings = Callable[..., Config]
CPU = torch.device("cpu")


def fisher(config: Config) -> Config:
    config.compression.calibration.fisher = True
    return config


def opened(path: Path) -> tuple[SourceModel, LayerwiseModel]:
    settings = ModelConfig(name=str(path))
    source = open_model(settings)
    return source, LayerwiseModel(source, settings, CPU)


def walk_in(directory: Path, path: Path, config: Config) -> tuple[Calibration, FisherWalk]:
    source, layerwise = opened(path)
    calibration = Calibration(config, path, "source", directory)
    return calibration, FisherWalk(layerwise, calibration, [layer.experts for layer in source.map.layers])


def never(index: int) -> Any:
    raise AssertionError(index)


def walked(walk: CalibrationWalk) -> list[int]:
    return list(walk.run(lambda index: False, never))


def states_in(directory: Path) -> list[str]:
    return sorted(file.name for pattern in ("inputs-*", "gradients-*") for file in directory.glob(pattern))


# With biases and interleaved rows, tied embeddings, layers without experts between others, a dense first layer.
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_the_walk_collects_what_the_whole_model_gives(
    family: str,
    make_model: Callable[..., Any],
    tokenizer: Any,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = saved(make_model(family), tokenizer, tmp_path / "model")
    monkeypatch.setattr(backward, "LOGITS_BYTES", 4 * 64 * 5)  # some positions at a time
    calibration, walk = walk_in(tmp_path / "grams", path, fisher(settings(path, calibrate=True)))
    alive: list[weakref.ref[nn.Module]] = []
    real = LayerwiseModel.layer

    def watched(self: LayerwiseModel, number: int) -> nn.Module:
        assert all(block() is None for block in alive)  # one decoder layer at a time
        block = real(self, number)
        alive.append(weakref.ref(block))
        return block

    monkeypatch.setattr(LayerwiseModel, "layer", watched)
    count = len(walk.experts)
    assert walked(walk) == list(reversed(range(count)))
    assert states_in(tmp_path / "grams") == []
    first = walk._holding(0)
    depth = len(walk.model.layers)
    assert len(alive) == depth + depth - first  # forward through all, back to the first with experts
    assert all(parameter.is_meta for layer in walk.model.layers for parameter in layer.parameters())
    assert walk.model.model.lm_head.weight.is_meta
    model = load_model(str(path), dtype="auto")
    whole = collect_grams(model, find_experts(model), calibration.batches, fisher_seed=calibration.fisher_seed)
    for index, found in enumerate(walk.experts):
        layer, expected = calibration.load(index), whole[found.name]
        assert torch.equal(layer.tokens, expected.tokens)
        for ours, theirs in ((layer.grams, expected.grams), (layer.out_grams, expected.out_grams)):
            assert set(ours) == set(theirs) == set(found.projections)
            for name, gram in ours.items():
                assert gram.abs().max() > 0
                torch.testing.assert_close(gram / theirs[name].abs().max(), theirs[name] / theirs[name].abs().max())


def test_a_killed_walk_goes_on(
    make_model: Callable[..., Any], tokenizer: Any, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(make_model("olmoe", num_hidden_layers=3), tokenizer, tmp_path / "model")
    config = fisher(settings(path, calibrate=True))
    whole, uninterrupted = walk_in(tmp_path / "whole", path, config)
    assert walked(uninterrupted) == [2, 1, 0]
    real, write = LayerwiseModel.layer, Calibration.write
    numbers: list[int] = []
    kill_at: int | None = None

    def watched(self: LayerwiseModel, number: int) -> nn.Module:
        if len(numbers) == kill_at:
            raise KeyboardInterrupt
        numbers.append(number)
        return real(self, number)

    monkeypatch.setattr(LayerwiseModel, "layer", watched)

    def resumed(directory: str, kill: int | None) -> tuple[list[int], list[int]]:
        """The MoE layers that came and the decoder layers that were run."""
        nonlocal kill_at
        numbers.clear()
        kill_at = kill
        calibration, walk = walk_in(tmp_path / directory, path, config)
        came: list[int] = []
        try:
            came.extend(walk.run(lambda index: False, never))
        except KeyboardInterrupt:
            return [index for index in range(3) if calibration.finished(index)], list(numbers)
        for index in range(3):
            assert calibration.file(index).read_bytes() == whole.file(index).read_bytes()
        assert states_in(tmp_path / directory) == []
        return came, list(numbers)

    assert resumed("forward", 2) == ([], [0, 1])
    assert states_in(tmp_path / "forward") == ["inputs-00001.safetensors", "inputs-00002.safetensors"]
    assert resumed("forward", None) == ([2, 1, 0], [2, 2, 1, 0])
    assert resumed("backward", 4) == ([2], [0, 1, 2, 2])
    assert states_in(tmp_path / "backward") == ["gradients-00002.safetensors", "inputs-00001.safetensors"]
    assert resumed("backward", None) == ([2, 1, 0], [1, 0])
    # Between the gradients of a layer's inputs and its matrices: the layer is run again, from the gradients above.
    with monkeypatch.context() as patch:

        def killed(self: Calibration, index: int, layer: Any) -> None:
            if index == 1:
                raise KeyboardInterrupt
            write(self, index, layer)

        patch.setattr(Calibration, "write", killed)
        assert resumed("between", None) == ([2], [0, 1, 2, 2, 1])
    assert states_in(tmp_path / "between") == [
        "gradients-00001.safetensors", "gradients-00002.safetensors", "inputs-00001.safetensors"
    ]  # fmt: skip
    assert resumed("between", None) == ([2, 1, 0], [1, 0])


def test_only_as_far_back_as_something_is_wanted(
    make_model: Callable[..., Any], tokenizer: Any, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(make_model("olmoe", num_hidden_layers=3), tokenizer, tmp_path / "model")
    calibration, walk = walk_in(tmp_path / "grams", path, fisher(settings(path, calibrate=True)))
    passes: list[int] = []
    real = FisherWalk._gradients_of_layer

    def watched(self: FisherWalk, block: nn.Module, number: int) -> Any:
        passes.append(number)
        return real(self, block, number)

    monkeypatch.setattr(FisherWalk, "_gradients_of_layer", watched)
    assert list(walk.run(lambda index: index != 1, never)) == [1]
    assert passes == [2, 1] and not calibration.finished(0) and not calibration.finished(2)


def test_calls_keep_no_states(model_dir: Callable[[str], Path], tokens: Tensor) -> None:
    _, layerwise = opened(model_dir("olmoe"))
    states = weakref.ref(layerwise.call(1, tokens).hidden_states)
    assert states() is None


def test_the_head_by_itself_is_that_of_the_model(
    family: str, model_dir: Callable[[str], Path], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, layerwise = opened(model_dir(family))
    model = load_model(str(model_dir(family)), dtype="auto")
    layerwise.check_head()
    with torch.no_grad():
        hidden = layerwise.call(0, tokens).hidden_states
        for number in range(len(layerwise.layers)):
            hidden = layerwise.call(number, tokens).run(layerwise.layer(number), hidden)
        expected = model(tokens, use_cache=False).logits
        for picks in (True, False):
            monkeypatch.setattr(layerwise, "picks", picks)
            with layerwise.head():
                torch.testing.assert_close(layerwise.logits(tokens, hidden, 3, 9), expected[:, 3:9])


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_are_there_once(
    stored: str, make_model: Callable[..., Any], tmp_path: Path, tokens: Tensor
) -> None:
    """Whichever of the two names they have on disk."""
    from safetensors.torch import load_file, save_file

    model = make_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[stored] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    _, layerwise = opened(tmp_path)
    with layerwise.head():
        head, embedding = layerwise.model.lm_head.weight, layerwise.model.get_input_embeddings().weight
        assert torch.equal(head, model.lm_head.weight) and torch.equal(embedding, head)
        if stored == "model.embed_tokens.weight":
            assert head.data_ptr() == embedding.data_ptr()


def test_matrices_that_are_many_are_collected_twice(
    make_model: Callable[..., Any], tokenizer: Any, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy ranks measure all layers before the first is fitted; what is on disk meanwhile is bounded."""
    path = saved(make_model("olmoe"), tokenizer, tmp_path / "model")
    config = fisher(settings(path, calibrate=True, allocation="greedy", target_ratio=0.5, rank_multiple=1, cores=0))
    most: list[int] = []
    real = Calibration.write

    def counted(self: Calibration, index: int, layer: Any) -> None:
        real(self, index, layer)
        most.append(len(list(self.directory.glob("layer-*"))))

    monkeypatch.setattr(Calibration, "write", counted)
    compress(Run.create(tmp_path / "kept", config))
    assert most == [1, 2]
    # With Fisher information the matrices are larger: the ones of the inputs alone would fit.
    monkeypatch.setattr(allocate, "GRAM_BYTES_AT_ONCE", 2 * 4 * 8 * (32 * 32 + 16 * 16))
    compress(Run.create(tmp_path / "again", config))
    assert most == [1, 2, 1, 1, 1, 1]
    left, right = ((tmp_path / name / "compression.json").read_bytes() for name in ("kept", "again"))
    assert left == right


def test_a_head_that_asks_for_more_is_run_with_the_whole_model(
    make_model: Callable[..., Any], tokenizer: Any, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(make_model("olmoe"), tokenizer, tmp_path / "model")

    def logits(*_: Any) -> Tensor:
        raise TypeError("a head without hidden states")

    monkeypatch.setattr(LayerwiseModel, "logits", logits)
    with pytest.raises(DoesNotFit, match="head cannot be run by itself .a head without hidden states"):
        opened(path)[1].check_head()
    run = Run.create(tmp_path / "run", fisher(settings(path, calibrate=True)))
    monkeypatch.setattr(backward.FisherWalk, "run", never)
    compress(run)
    facts = json.loads((run.path / "compression.json").read_text())
    assert all(sum(layer["load"]) == 10 * 32 * 2 for layer in facts["layers"].values())


def test_a_layer_that_cannot_be_run_backward_is_told(
    make_model: Callable[..., Any], tokenizer: Any, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(make_model("olmoe"), tokenizer, tmp_path / "model")
    _, walk = walk_in(tmp_path / "grams", path, fisher(settings(path, calibrate=True)))
    real = LayerwiseModel.layer

    def change(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        inputs[0].mul_(2.0)

    def in_place(self: LayerwiseModel, number: int) -> nn.Module:
        block = real(self, number)
        block.post_attention_layernorm.register_forward_hook(change)
        return block

    monkeypatch.setattr(LayerwiseModel, "layer", in_place)
    with pytest.raises(UserError, match=r"decoder layer 1 of OlmoeForCausalLM cannot be run backward .*fisher=false"):
        walked(walk)
