"""Greedy allocation in the pipeline: the bytes of the uniform one, ranks where they help, kept for a resumption."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from moe_compress.checks import check_values
from moe_compress.compression import allocate, compress, pipeline, walk
from moe_compress.compression.plan_table import print_plan
from moe_compress.compression.planning import make_plan
from moe_compress.compression.source import open_model
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.factorization import Choice, Form
from moe_compress.modeling import find_experts, find_shared_cores, load_model
from moe_compress.run import Run

Settings = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def uneven(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts that are all the same but for rank-1 noise in the first layer, and nothing alike in the second."""
    model = make_model("olmoe")
    first = find_experts(model)[0].module
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            noise = torch.randn(8, parameter.shape[1], 1) @ torch.randn(8, 1, parameter.shape[2])
            parameter.copy_(parameter[:1] + 0.05 * noise)
            assert name in ("gate_up_proj", "down_proj")
    path = tmp_path_factory.mktemp("uneven")
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("changes", [{"target_ratio": 0.5}, {"target_bytes": 50_000}, {"rank": 3}])
@pytest.mark.parametrize("parameterization", ["delta", "wrapper"])
def test_ranks_go_where_they_help(
    changes: dict[str, Any], parameterization: str, uneven: Path, settings: Settings, tmp_path: Path
) -> None:
    config = settings(uneven, allocation="greedy", rank_multiple=1, parameterization=parameterization, **changes)
    run = Run.create(tmp_path / "run", config)
    compress(run)
    facts = json.loads((run.path / "compression.json").read_text())
    ranks = [[p["delta_rank"] for p in layer["projections"].values()] for layer in facts["layers"].values()]
    least = 2 if parameterization == "wrapper" else 1
    assert max(ranks[0]) <= least + least  # one more may be all that the rest of the budget buys
    assert min(ranks[1]) > 4
    uniform = settings(uneven, rank_multiple=1, parameterization=parameterization, **changes)
    even = Run.create(tmp_path / "even", uniform)
    compress(even)
    even_facts = json.loads((even.path / "compression.json").read_text())

    def total_error(facts: dict[str, Any]) -> float:
        return sum(p["relative_error"] for layer in facts["layers"].values() for p in layer["projections"].values())

    assert total_error(facts) < total_error(even_facts)
    budget = make_plan(open_model(config.model), uniform).after.expert_bytes
    step = 8 * 4 * 64 * least
    assert budget - step < facts["totals"]["expert_bytes_after"] <= max(budget, changes.get("target_bytes", 0))
    stored = json.loads((run.checkpoint(0) / "config.json").read_text())["quantization_config"]["layers"]
    assert [[p["delta_rank"] for p in layer.values()] for layer in stored.values()] == ranks


def test_measured_once(uneven: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(uneven, allocation="greedy", target_ratio=0.5, rank_multiple=1)
    source = open_model(config.model)
    file = tmp_path / "allocation.json"
    done: list[tuple[int, int]] = []
    ranks = allocate.allocate(source, config, file, CPU, lambda *counts: done.append(counts))
    assert done == [(1, 2), (2, 2)]
    facts = json.loads(file.read_text())["projections"]
    assert [entry["delta_rank"] for entry in facts.values()] == [choice.delta_rank for choice in ranks.values()]
    errors = ([entry["expected_error"] for entry in (one, one["uniform"])] for one in facts.values())
    found, uniform = zip(*errors, strict=True)
    assert sum(found) < sum(uniform)
    with monkeypatch.context() as patch:
        patch.setattr(allocate, "_layer_curves", lambda *_: pytest.fail("measured again"))
        assert allocate.allocate(source, config, file, CPU) == ranks
    config.compression.target_ratio = 0.6
    assert allocate.allocate(source, config, file, CPU) != ranks  # another budget is measured
    file.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        allocate.allocate(source, config, file, CPU)


def test_what_cannot_be_done_is_refused_before_anything_is_measured(
    uneven: Path, tokenizer: Any, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(uneven)
    monkeypatch.setattr(pipeline, "allocate", lambda *_: pytest.fail("measured"))
    wide = Run.create(tmp_path / "wide", settings(uneven, calibrate=True, allocation="greedy", rank=64))
    with pytest.raises(UserError, match="delta rank 128 is above the dimensions .* or set compression.target_ratio"):
        compress(wide)
    monkeypatch.setattr("moe_compress.compression.planning.shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    full = Run.create(tmp_path / "full", settings(uneven, calibrate=True, allocation="greedy"))
    with pytest.raises(UserError, match="0.0 GB free"):
        compress(full)
    assert not (full.path / "calibration").exists()


def test_the_plan_says_that_ranks_are_not_final(uneven: Path, settings: Settings) -> None:
    config = settings(uneven, allocation="greedy", target_ratio=0.5, rank_multiple=1)
    source = open_model(config.model)
    stream = io.StringIO()
    print_plan(make_plan(source, config), Console(file=stream, width=200))
    assert "greedy: the bytes are an upper limit" in stream.getvalue()
    final = io.StringIO()
    chosen = {(layer.name, p): Choice(Form(1), 2) for layer in source.map.layers for p in layer.experts.projections}
    print_plan(make_plan(source, config, chosen), Console(file=final, width=200))
    assert "upper limit" not in final.getvalue()


def test_with_fisher_information_or_trials_ranks_go_where_the_predictions_need_them(
    make_model: Callable[..., Any], tokenizer: Any, settings: Settings, tmp_path: Path
) -> None:
    model = make_model("olmoe")
    first, second = (found.module for found in find_experts(model))
    with torch.no_grad():
        first.down_proj.mul_(1e-3)  # as hard to approximate as ever, but of no account for the predictions
        second.down_proj.mul_(4.0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    changes = {"target_ratio": 0.4, "rank_multiple": 1, "cores": 0, "alignment": "none"}
    found = {}
    for name, fisher, allocation, trials in (
        ("even", True, "uniform", 16),
        ("outputs", False, "greedy", 0),
        ("trials", False, "greedy", 16),
        ("fisher", True, "greedy", 0),
    ):
        config = settings(tmp_path / "model", calibrate=True, allocation=allocation, **changes)
        config.compression.calibration.fisher, config.compression.calibration.trials = fisher, trials
        run = Run.create(tmp_path / name, config)
        compress(run)
        facts = json.loads((run.path / "compression.json").read_text())
        assert facts["totals"]["ratio"] <= 0.4 and not (run.path / "calibration").exists()
        found[name] = [
            [projection["delta_rank"] for projection in layer["projections"].values()]
            for layer in facts["layers"].values()
        ]
    assert abs(sum(found["outputs"][0]) - sum(found["outputs"][1])) <= 6
    for name in ("fisher", "trials"):
        assert max(found[name][0]) < min(found[name][1]) and found["even"] != found[name]
    config.compression.calibration.sequential = True
    with pytest.raises(UserError, match="sequential=false"):
        check_values(config)


def test_with_a_calibration_the_errors_are_those_of_the_outputs(
    uneven: Path, tokenizer: Any, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curves are those of the fit's own norm, and a killed run keeps what it has measured."""
    tokenizer.save_pretrained(uneven)
    config = settings(uneven, calibrate=True, allocation="greedy", target_ratio=0.5, rank_multiple=1, iterations=1)
    run = Run.create(tmp_path / "run", config)
    real = allocate._layer_curves
    done: list[int] = []

    def once(source: Any, config: Config, device: Any, index: int, *rest: Any) -> Any:
        if done == [0]:
            done.append(-1)
            raise KeyboardInterrupt
        done.append(index)
        return real(source, config, device, index, *rest)

    monkeypatch.setattr(allocate, "_layer_curves", once)
    with pytest.raises(KeyboardInterrupt):
        compress(run)
    compress(Run.open(run.path))
    assert done == [0, -1, 1]
    allocation = json.loads((run.path / "allocation.json").read_text())
    assert allocation["error_of"] == "outputs"
    facts = json.loads((run.path / "compression.json").read_text())
    for module, layer in facts["layers"].items():
        for name, values in layer["projections"].items():
            expected = allocation["projections"][f"{module}.{name}"]
            assert values["delta_rank"] == expected["delta_rank"]
            # One iteration of the fit is what the curve says, but for the damping of the Gram matrices.
            assert values["data_error"] == pytest.approx(expected["expected_error"], rel=0.5, abs=1e-3)
    assert not (run.path / "calibration").exists()
    whole = Run.create(tmp_path / "whole", config)
    compress(whole)
    assert (whole.path / "allocation.json").read_bytes() == (run.path / "allocation.json").read_bytes()
    assert (whole.path / "compression.json").read_bytes() == (run.path / "compression.json").read_bytes()


def test_matrices_that_are_many_are_not_kept(
    uneven: Path, tokenizer: Any, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then they are collected once more for the fit, with the same result."""
    tokenizer.save_pretrained(uneven)
    config = settings(uneven, calibrate=True, allocation="greedy", target_ratio=0.5, rank_multiple=1)
    compress(Run.create(tmp_path / "kept", config))
    monkeypatch.setattr(allocate, "GRAM_BYTES_AT_ONCE", 0)
    passes: list[tuple[int, ...]] = []
    real = walk.CalibrationWalk._pass

    def count(self: Any, number: int, collect: list[int], **rest: Any) -> None:
        passes.append(tuple(collect))
        real(self, number, collect, **rest)

    monkeypatch.setattr(walk.CalibrationWalk, "_pass", count)
    compress(Run.create(tmp_path / "again", config))
    assert passes == [(0,), (1,)] * 2
    left, right = ((tmp_path / name / "compression.json").read_bytes() for name in ("kept", "again"))
    assert left == right


@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_a_basis_is_chosen_where_the_experts_share_one(
    allocation: str, make_model: Callable[..., Any], settings: Settings, tmp_path: Path
) -> None:
    """In the first layer all experts read the same ten directions; in the second they read everything."""
    model = make_model("olmoe")
    first, second = (found.module for found in find_experts(model))
    with torch.no_grad():
        directions = torch.randn(10, 32)
        first.gate_up_proj.copy_(0.3 * torch.randn(8, 32, 10) @ directions)
        second.gate_up_proj.normal_()
    model.save_pretrained(tmp_path / "model")
    changes = {"cores": 0, "alignment": "none", "rank_multiple": 1, "target_ratio": 0.6}
    config = settings(tmp_path / "model", allocation=allocation, input_basis="auto", **changes)
    run = Run.create(tmp_path / "run", config)
    compress(run)
    facts = json.loads((run.path / "compression.json").read_text())
    bases = [[p["basis"] for p in layer["projections"].values()] for layer in facts["layers"].values()]
    assert bases[0][0] in (8, 11, 16, 21) and bases[0][1] == bases[1][1] == 0
    assert facts["totals"]["ratio"] <= 0.6
    stored = json.loads((run.checkpoint(0) / "config.json").read_text())["quantization_config"]["layers"]
    assert [layer["gate_up_proj"].get("basis", 0) for layer in stored.values()] == [each[0] for each in bases]
    loaded = load_model(run.checkpoint(0))
    weight = find_shared_cores(loaded)["model.layers.0.mlp.experts"].materialize("gate_up_proj")
    error = float((weight - first.gate_up_proj).square().sum() / first.gate_up_proj.square().sum())
    found = facts["layers"]["model.layers.0.mlp.experts"]["projections"]["gate_up_proj"]["relative_error"]
    assert error == pytest.approx(found, rel=1e-3, abs=1e-6) and error < 0.1
    fixed = settings(tmp_path / "model", input_basis=0.5, **changes)
    plan = make_plan(open_model(fixed.model), fixed)
    assert {p.form.basis for layer in plan.layers for p in layer.projections} == {0, 16} and not plan.provisional
