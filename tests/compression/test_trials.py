"""Trials: what compressing a layer alone does to the predictions, however the model is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_compress.compression import compress, pipeline, trials
from moe_compress.compression.allocate import allocate
from moe_compress.compression.calibrate import Calibration
from moe_compress.compression.job import calibration_walk
from moe_compress.compression.layerwise import DoesNotFit, LayerwiseModel
from moe_compress.compression.source import open_model
from moe_compress.compression.trials import Trials, divergence, spread_between
from moe_compress.config import Config
from moe_compress.modeling import find_experts, load_model
from moe_compress.modeling.find import set_expert_weights
from moe_compress.run import Run
from tests.compression.runs import saved

Settings = Callable[..., Config]
CPU = torch.device("cpu")


class Tried:
    """A model whose curves and trials were made, and are still on disk."""

    def __init__(self, path: Path, config: Config, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.source = open_model(config.model)
        fingerprint = self.source.checkpoint.fingerprint
        self.calibration = Calibration(config, path, fingerprint, directory / "calibration")
        self.config = config
        made: list[Trials] = []
        real = Trials.effects
        monkeypatch.setattr(Trials, "effects", lambda own, *rest: (made.append(own), real(own, *rest))[1])
        self.file = directory / "allocation.json"
        self.choices = allocate(self.source, config, self.file, CPU, calibration=self.calibration, make_walk=self.walk)
        (self.trials,) = made

    def walk(self) -> Any:
        from rich.console import Console

        return calibration_walk(self.config, self.source, self.calibration, CPU, Console(quiet=True))

    def divergences(self) -> dict[int, float]:
        """By hand: KL per token of the model with each layer replaced by what its factors stand for."""
        rows = torch.from_numpy(self.calibration.rows)
        model: Any = load_model(str(self.source.path), dtype="float32").eval()
        found = {}
        for index in self.trials.indices:
            factors, biases = self.trials.parameters(index)
            changed: Any = load_model(str(self.source.path), dtype="float32").eval()
            module: Any = find_experts(changed)[index].module
            with torch.no_grad():
                set_expert_weights(module, {name: own.materialize() for name, own in factors.items()})
                for name, bias in biases.items():
                    getattr(module, name).copy_(bias)
                found[index] = divergence(model(rows).logits, changed(rows).logits) / rows.numel()
        return found


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_both_ways_measure_the_divergence_of_each_layer_alone(
    family: str,
    make_model: Callable[..., Any],
    tokenizer: Any,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.mul_(4.0)  # what is left of them shows in the predictions
    path = saved(model, tokenizer, tmp_path / "model")
    config = settings(path, calibrate=True, allocation="greedy", target_ratio=0.4, rank_multiple=1, cores="auto")
    config.compression.calibration.fisher = True
    tried = Tried(path, config, tmp_path, monkeypatch)
    expected = tried.divergences()
    assert len(expected) == 2 and min(expected.values()) > 1e-5
    tokens = tried.calibration.rows.size
    for walk in (tried.walk(), None):
        effects = tried.trials.effects(walk, CPU, lambda done, total: None)
        for index, kl in expected.items():
            estimate = tried.trials.estimate(index) / (2 * tokens)
            assert effects[index] == pytest.approx(kl / estimate, rel=3e-2)
    written = json.loads(tried.file.read_text())["effects"]
    assert written == pytest.approx(effects, rel=3e-2)
    assert not list(tried.calibration.directory.glob("trial-*-*"))  # the states of the ways are gone


def test_the_effects_decide_the_ranks(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        model_dir("olmoe"), calibrate=True, allocation="greedy", target_ratio=0.5, rank_multiple=1, cores=0
    )
    ranks = {}
    for name, effects in (("first", [8.0, 1.0]), ("last", [1.0, 8.0])):
        monkeypatch.setattr(Trials, "effects", lambda *_, effects=effects: effects)
        run = Run.create(tmp_path / name, config)
        compress(run)
        layers = json.loads((run.path / "compression.json").read_text())["layers"].values()
        ranks[name] = [sum(p["delta_rank"] for p in layer["projections"].values()) for layer in layers]
    assert ranks["first"][0] > ranks["last"][0] + 3 and ranks["first"][1] < ranks["last"][1] - 3


def test_a_run_killed_in_the_trials_goes_on_with_what_it_has(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(model_dir("olmoe"), calibrate=True, allocation="greedy", target_ratio=0.5, cores="auto")
    run, whole = Run.create(tmp_path / "run", config), Run.create(tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "divergence", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress(run)
    with monkeypatch.context() as patch:
        patch.setattr(Trials, "make", lambda *_: pytest.fail("tried again"))
        compress(Run.open(run.path))
    compress(whole)
    for file in ("allocation.json", "compression.json"):
        assert (run.path / file).read_bytes() == (whole.path / file).read_bytes()


def test_the_factors_of_trials_are_gone_once_the_ranks_are_known(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(model_dir("olmoe"), calibrate=True, allocation="greedy", target_ratio=0.5, cores="auto")
    run, kept = Run.create(tmp_path / "run", config), tmp_path / "kept"
    allocated = pipeline.allocate

    def killed(*arguments: Any) -> None:
        allocated(*arguments)
        shutil.copytree(run.path / "calibration", kept)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "allocate", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(run)
    assert len(list(kept.glob("trial-*"))) == 2
    monkeypatch.setattr(pipeline, "allocate", allocated)
    monkeypatch.setattr(Trials, "make", lambda *_: pytest.fail("tried again"))
    real = pipeline.compress_model

    def fit(*arguments: Any) -> Any:
        assert (run.path / "calibration").exists() and not list((run.path / "calibration").glob("trial-*"))
        return real(*arguments)

    monkeypatch.setattr(pipeline, "compress_model", fit)
    compress(Run.open(run.path))
    assert run.finished("compress")


def test_few_layers_of_many_are_tried_and_the_others_take_what_lies_between() -> None:
    assert spread_between({}, 3) == [1.0] * 3
    assert spread_between({0: 1.0, 2: 4.0, 3: 2.0}, 5) == pytest.approx([1.0, 2.0, 4.0, 2.0, 2.0])
    assert spread_between({1: 3.0}, 3) == pytest.approx([3.0] * 3)
    wild = spread_between({0: 1.0, 1: 1.0, 2: 1.0, 3: 1e9}, 4)
    assert wild[0] < wild[3] < 1e9 and wild[3] == pytest.approx(8 * (1e9 ** (1 / 4)))


def test_a_layer_that_cannot_be_as_small_alone_is_left_out(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_dir("olmoe")
    config = settings(path, calibrate=True, allocation="greedy", target_ratio=0.5, rank_multiple=1, cores=0)

    def refuse(own: Trials, index: int) -> Any:
        budget = real(own, index)
        return budget if index else type(budget)(**{**vars(budget), "total": 1})

    real = Trials._share
    monkeypatch.setattr(Trials, "_share", refuse)
    tried = Tried(path, config, tmp_path, monkeypatch)
    assert tried.trials.estimate(0) == 0 < tried.trials.estimate(1)
    effects = json.loads(tried.file.read_text())["effects"]
    assert effects[0] == effects[1]


def test_a_head_that_cannot_be_run_leaves_the_errors_as_they_are(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise DoesNotFit("its head wants more")

    monkeypatch.setattr(LayerwiseModel, "check_head", refuse)
    config = settings(model_dir("olmoe"), calibrate=True, allocation="greedy", target_ratio=0.5, cores=0)
    run = Run.create(tmp_path / "run", config)
    compress(run)
    assert json.loads((run.path / "allocation.json").read_text())["effects"] == [1.0, 1.0]
