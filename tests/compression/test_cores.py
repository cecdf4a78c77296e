"""Several cores, and the choice of their number, through the whole pipeline."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from moe_compress.compression import compress, job
from moe_compress.compression.allocate import allocate
from moe_compress.compression.plan_table import print_plan
from moe_compress.compression.planning import make_plan
from moe_compress.compression.ranks import budget_of, choose, forms_of
from moe_compress.compression.source import open_model
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.factorization import Form, projection_bytes
from moe_compress.modeling import find_experts, load_model
from moe_compress.run import Run
from tests.compression.runs import tensors_of

Settings = Callable[..., Config]
EXPERTS = 16


@pytest.fixture(scope="module")
def planted(make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 experts: gate_up_proj in four groups in layer 0, around one core in layer 1; down_proj has no core at all."""
    model = make_model("olmoe", num_experts=EXPERTS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer, found in enumerate(find_experts(model)):
            for name, parameter in found.module.named_parameters():
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                groups = torch.arange(EXPERTS) % 4 if layer == 0 else torch.zeros(EXPERTS, dtype=torch.int64)
                cores = 0.3 * torch.randn(4, *parameter.shape[1:], generator=generator)
                low_rank = noise[:, :, :2] @ torch.randn(EXPERTS, 2, parameter.shape[2], generator=generator)
                parameter.copy_(low_rank if name == "down_proj" else cores[groups] + 0.05 * noise)
    path = tmp_path_factory.mktemp("planted")
    model.save_pretrained(path, max_shard_size="40KB")
    tokenizer.save_pretrained(path)
    return path


def compressed(config: Config, path: Path) -> tuple[Run, dict[str, Any]]:
    run = Run.create(path, config)
    compress(run)
    return run, json.loads((run.path / "compression.json").read_text())


def layers_of(run: Run) -> list[dict[str, Any]]:
    stored = json.loads((run.checkpoint(0) / "config.json").read_text())["quantization_config"]
    return list(stored["layers"].values())


@pytest.mark.parametrize("changes", [{"calibrate": True}, {"parameterization": "wrapper"}, {"target_ratio": 0.5}])
def test_four_cores(changes: dict[str, Any], planted: Path, settings: Settings, tmp_path: Path, tokens: Tensor) -> None:
    config = settings(planted, **({"cores": 4, "rank": 2, "rank_multiple": 1} | changes))
    expected = make_plan(open_model(config.model), config)
    run, facts = compressed(config, tmp_path / "run")
    layer = layers_of(run)[0]
    assert layer["gate_up_proj"]["groups"] == [expert % 4 for expert in range(EXPERTS)]
    tensors = tensors_of(run.checkpoint(0))
    assert tensors["model.layers.0.mlp.experts.gate_up_proj"].shape == (4 * 32, 32)
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    assert facts["totals"]["expert_bytes_after"] == expected.after.expert_bytes == experts
    projections = facts["layers"]["model.layers.0.mlp.experts"]["projections"]
    assert projections["gate_up_proj"]["cores"] == 4 and projections["gate_up_proj"]["relative_error"] < 0.05
    _, single = compressed(settings(planted, **({"rank": 2} | changes)), tmp_path / "one")
    same = single["layers"]["model.layers.0.mlp.experts"]["projections"]["gate_up_proj"]
    assert projections["gate_up_proj"]["relative_error"] < 0.5 * same["relative_error"]
    assert load_model(run.checkpoint(0))(tokens).logits.isfinite().all()


def test_alignment_within_the_groups(planted: Path, settings: Settings, tmp_path: Path) -> None:
    """Neurons that were shuffled come back in the order of their group."""
    model = load_model(planted)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for found in find_experts(model):
            for expert in range(EXPERTS):
                order = torch.randperm(16, generator=generator)
                found.module.gate_up_proj[expert] = found.module.gate_up_proj[expert][torch.cat([order, order + 16])]
                found.module.down_proj[expert] = found.module.down_proj[expert][:, order]
    model.save_pretrained(tmp_path / "shuffled")
    errors = []
    for alignment in ("weights", "none"):
        _, facts = compressed(
            settings(tmp_path / "shuffled", cores=4, rank=2, alignment=alignment), tmp_path / alignment
        )
        layer = facts["layers"]["model.layers.0.mlp.experts"]["projections"]
        errors.append(layer["gate_up_proj"]["relative_error"])
    assert errors[0] < 0.5 * errors[1]


def test_auto_takes_what_fits(planted: Path, settings: Settings, tmp_path: Path, tokens: Tensor) -> None:
    config = settings(planted, cores="groups", target_ratio=0.5, rank_multiple=1)
    plan = make_plan(open_model(config.model), config)
    run, facts = compressed(config, tmp_path / "run")
    layers = layers_of(run)
    assert [layer["gate_up_proj"]["cores"] for layer in layers] == [4, 1]
    assert [layer["down_proj"]["cores"] for layer in layers] == [0, 0]
    assert "groups" in layers[0]["gate_up_proj"] and "groups" not in layers[1]["gate_up_proj"]
    for stored, layer in zip(layers, facts["layers"].values(), strict=True):
        for projection, values in layer["projections"].items():
            assert (values["cores"], values["delta_rank"]) == tuple(
                stored[projection][k] for k in ("cores", "delta_rank")
            )
    experts = sum(tensor.nbytes for name, tensor in tensors_of(run.checkpoint(0)).items() if ".experts." in name)
    assert facts["totals"]["expert_bytes_after"] == experts
    # What rounding leaves of one projection's share is spent on another.
    step = projection_bytes((16, 32, 16), 1, Form(0), 4) * facts["totals"]["ratio"] / experts
    assert 0.5 - step < facts["totals"]["ratio"] <= 0.5 and plan.ratio <= 0.5
    assert load_model(run.checkpoint(0))(tokens).logits.isfinite().all()


def test_auto_takes_one_core_or_none(planted: Path, settings: Settings, tmp_path: Path) -> None:
    """One core in the layer whose experts share it; never more, even where they have four."""
    config = settings(planted, cores="auto", target_ratio=0.5, rank_multiple=1)
    for layer in open_model(config.model).map.layers:
        for name, shape in layer.experts.projections.items():
            assert forms_of(name, shape, config.compression) == (Form(0), Form(1))
    layers = layers_of(compressed(config, tmp_path / "run")[0])
    assert layers[1]["gate_up_proj"]["cores"] == 1
    assert [layer["down_proj"]["cores"] for layer in layers] == [0, 0]


def test_auto_reaches_budgets_that_one_core_exceeds(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path
) -> None:
    """One of 8 experts' bytes for the core alone would be an eighth."""
    size = {"target_ratio": 0.12, "rank_multiple": 1}
    with pytest.raises(UserError, match="the nearest feasible compression.target_ratio"):
        compressed(settings(model_dir("olmoe"), cores=1, **size), tmp_path / "one")
    run, facts = compressed(settings(model_dir("olmoe"), cores="auto", **size), tmp_path / "auto")
    assert facts["totals"]["ratio"] <= 0.12
    assert all(own["cores"] == 0 for layer in layers_of(run) for own in layer.values())


def test_the_default_measures_cores_and_basis() -> None:
    defaults = Config().compression
    assert (defaults.cores, defaults.input_basis, defaults.allocation) == ("auto", "auto", "greedy")


@pytest.mark.parametrize("changes", [{"target_ratio": 0.4}, {"target_bytes": 100_000}, {"rank": 3}])
@pytest.mark.parametrize("parameterization", ["delta", "wrapper"])
@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_the_choice_stays_within_the_budget(
    changes: dict[str, Any], parameterization: str, allocation: str, planted: Path, settings: Settings, tmp_path: Path
) -> None:
    config = settings(
        planted,
        cores="groups",
        rank_multiple=1,
        parameterization=parameterization,
        allocation=allocation,
        **changes,
    )
    source = open_model(config.model)
    layers = source.map.layers
    budget = budget_of(layers, config, choose(layers, config))
    found = allocate(source, config, tmp_path / "allocation.json", torch.device("cpu"))
    spent = sum(budget.cost(".".join(key), choice) for key, choice in found.items())
    unit = 2 if parameterization == "wrapper" else 1
    step = max(
        projection_bytes(shape, unit, Form(0), 4) for layer in layers for shape in layer.experts.projections.values()
    )
    assert budget.total - step < spent <= budget.total
    assert budget.total == changes.get("target_bytes", budget.total)
    if parameterization == "wrapper":
        assert all(choice.form.cores for choice in found.values())


def test_few_experts_get_no_groups(model_dir: Callable[[str], Path], settings: Settings) -> None:
    config = settings(model_dir("olmoe"), cores="groups", target_ratio=0.5)
    for layer in open_model(config.model).map.layers:
        for name, shape in layer.experts.projections.items():
            assert forms_of(name, shape, config.compression) == (Form(0), Form(1))


def test_the_plan_says_what_is_open(planted: Path, settings: Settings) -> None:
    config = settings(planted, cores="groups", target_ratio=0.5)
    stream = io.StringIO()
    print_plan(make_plan(open_model(config.model), config), Console(file=stream, width=200))
    assert "compression.cores=groups: the bytes are an upper limit" in stream.getvalue()


def test_a_share_that_buys_nothing_is_refused(planted: Path, settings: Settings) -> None:
    config = settings(planted, cores="groups", target_ratio=0.01)
    with pytest.raises(UserError, match="the nearest feasible compression.target_ratio"):
        choose(open_model(config.model).map.layers, config)


@pytest.mark.parametrize("sequential", [False, True])
def test_interrupted_and_resumed_gives_the_same_choice(
    sequential: bool, planted: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(planted, calibrate=True, cores="groups", target_ratio=0.5, rank_multiple=1)
    config.compression.calibration.sequential = sequential
    whole, facts = compressed(config, tmp_path / "whole")
    assert any(p["cores"] == 4 for layer in facts["layers"].values() for p in layer["projections"].values())
    real = job.fit_layer

    def fit(layer: Any, *arguments: Any) -> Any:
        if layer.name.startswith("model.layers.1."):
            raise KeyboardInterrupt
        return real(layer, *arguments)

    run = Run.create(tmp_path / "run", config)
    with monkeypatch.context() as patch:
        patch.setattr(job, "fit_layer", fit)
        with pytest.raises(KeyboardInterrupt):
            compress(run)
    compress(Run.open(run.path))
    left, right = (
        {file.name: file.read_bytes() for file in each.checkpoint(0).iterdir() if file.is_file()}
        for each in (run, whole)
    )
    assert left == right
    assert (run.path / "compression.json").read_bytes() == (whole.path / "compression.json").read_bytes()
