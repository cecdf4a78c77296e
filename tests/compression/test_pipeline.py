"""The compress stage: the streamed checkpoint equals that of compression in memory, in every type; refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from moe_compress.compression import compress, pipeline
from moe_compress.compression.layer import LayerInput, LayerSettings, fit_layer, layer_input
from moe_compress.compression.planning import Plan, ProjectionPlan, make_plan
from moe_compress.compression.source import open_model
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.factorization import FitSpec
from moe_compress.modeling import compress_in_memory, expert_weights, find_experts
from moe_compress.run import Run
from tests.compression.runs import compressed, load, logits, tensors_of

Settings = Callable[..., Config]


def in_memory(config: Config) -> Any:
    """The same compression of the model as `from_pretrained` loads it."""
    source = open_model(config.model)
    plan = make_plan(source, config)
    model = load(source.path)
    factors, biases = {}, {}
    for index, found in enumerate(find_experts(model)):
        settings = pipeline.layer_settings(source, plan, config, index, torch.device("cpu"))
        with torch.no_grad():
            result = fit_layer(layer_input(found, dict(found.module.named_parameters())), settings)
        factors[found.name], biases[found.name] = result.factors, result.biases
    return compress_in_memory(model, factors, biases)


def test_streamed_equals_in_memory(
    family: str, model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, tokens: Tensor
) -> None:
    source = model_dir(family)
    config = settings(source)
    run = compressed(config, tmp_path / "run")
    model = load(run.checkpoint(0))
    streamed = logits(model, tokens)
    assert torch.equal(streamed, logits(in_memory(config), tokens))
    assert (streamed - logits(load(source), tokens)).abs().max() > 1e-3  # it was compressed

    # Everything that is not an expert is the source's, bit for bit; what is an expert is not there any more.
    before, after = tensors_of(source), tensors_of(run.checkpoint(0))
    mapped = open_model(config.model).map
    experts = {name for layer in mapped.layers for name in layer.disk_names}
    assert mapped.passthrough
    for name in set(before) - experts:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name])
    inside = tuple(f"{layer.name}." for layer in mapped.layers)
    assert {name for name in after if not name.startswith(inside)} == set(before) - experts

    # It is a whole model directory.
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "NOTICE.txt"):
        assert (run.checkpoint(0) / name).read_bytes() == (source / name).read_bytes()
    assert not (run.checkpoint(0) / "pytorch_model.bin").exists()
    index = json.loads((run.checkpoint(0) / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert [step for step, _ in run.checkpoints()] == [0]
    assert not list(run.checkpoint(0).glob(".*"))
    assert run.finished("compress")


def test_saved_again_it_is_the_same_model(
    family: str, model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, tokens: Tensor
) -> None:
    run = compressed(settings(model_dir(family)), tmp_path / "run")
    model = load(run.checkpoint(0))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), tokens), logits(model, tokens))


def test_fused_and_separate_layouts_give_the_same_factors(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path
) -> None:
    source = model_dir("mixtral")
    model = load(source)
    tensors = {name: tensor for name, tensor in tensors_of(source).items() if ".experts." not in name}
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            tensors[name] = parameter.detach().clone()
    fused = tmp_path / "fused"
    fused.mkdir()
    shutil.copy(source / "config.json", fused)
    save_file(tensors, fused / "model.safetensors", {"format": "pt"})
    left = tensors_of(compressed(settings(source), tmp_path / "left").checkpoint(0))
    right = tensors_of(compressed(settings(fused), tmp_path / "right").checkpoint(0))
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("parameterization", ["delta", "wrapper"])
@pytest.mark.parametrize("method", ["closed_form", "adam"])
def test_methods_and_parameterizations(
    method: str,
    parameterization: str,
    model_dir: Callable[[str], Path],
    settings: Settings,
    tmp_path: Path,
    tokens: Tensor,
) -> None:
    config = settings(model_dir("olmoe"), method=method, parameterization=parameterization, num_steps=30, lr=1e-2)
    run = compressed(config, tmp_path / "run")
    stored = json.loads((run.checkpoint(0) / "config.json").read_text())["quantization_config"]
    assert stored["parameterization"] == parameterization
    assert torch.equal(logits(load(run.checkpoint(0)), tokens), logits(in_memory(config), tokens))
    facts = json.loads((run.path / "compression.json").read_text())
    for layer in facts["layers"].values():
        for projection in layer["projections"].values():
            assert 0 < projection["relative_error"] < 1


def test_no_core(model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, tokens: Tensor) -> None:
    config = settings(model_dir("olmoe"), cores=0, alignment="none")
    run = compressed(config, tmp_path / "run")
    assert torch.equal(logits(load(run.checkpoint(0)), tokens), logits(in_memory(config), tokens))
    tensors = tensors_of(run.checkpoint(0))
    assert tensors["model.layers.0.mlp.experts.gate_up_proj"].shape == (0, 32)


def at_full_rank(plan: Plan) -> Plan:
    """A plan whose deltas can hold every weight. It saves nothing, so no setting leads to it."""

    def widest(projection: ProjectionPlan) -> ProjectionPlan:
        wide = replace(projection, delta_rank=min(projection.rows, projection.columns))
        return replace(wide, bytes_after=4 * wide.parameters_after)

    layers = [replace(layer, projections=[widest(p) for p in layer.projections]) for layer in plan.layers]
    size = plan.before.bytes - plan.before.expert_bytes + sum(layer.bytes_after for layer in layers)
    return replace(plan, layers=layers, after=replace(plan.after, bytes=size))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_full_rank_is_the_original(
    family: str, model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, tokens: Tensor
) -> None:
    config = settings(model_dir(family))
    source = open_model(config.model)
    plan = at_full_rank(make_plan(source, config))
    pipeline.compress_model(source, plan, config, tmp_path / "out", None, Console())
    original = logits(load(source.path), tokens)
    torch.testing.assert_close(logits(load(tmp_path / "out"), tokens), original, rtol=1e-3, atol=1e-3)


def test_planted_structure_is_recovered(
    make_model: Callable[..., Any], tokenizer: Any, settings: Settings, tmp_path: Path, tokens: Tensor
) -> None:
    """Experts that are a core plus low-rank deltas, with their neurons shuffled, keep their logits."""
    model = make_model("mixtral")
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for found in find_experts(model):
            for name, (experts, rows, columns) in found.projections.items():
                delta = randn(experts, rows, 2) @ randn(experts, 2, columns)
                getattr(found.module, name).copy_(0.3 * randn(rows, columns) + 0.02 * delta)
            for expert in range(found.num_experts):
                order = torch.randperm(found.intermediate_size, generator=generator)
                rows = torch.cat([order, order + found.intermediate_size])
                found.module.gate_up_proj[expert] = found.module.gate_up_proj[expert][rows]
                found.module.down_proj[expert] = found.module.down_proj[expert][:, order]
    model.save_pretrained(tmp_path / "model")
    run = compressed(settings(tmp_path / "model", rank=1, iterations=60), tmp_path / "run")
    torch.testing.assert_close(
        logits(load(run.checkpoint(0)), tokens), logits(load(tmp_path / "model"), tokens), rtol=1e-2, atol=1e-2
    )
    unaligned = compressed(
        settings(tmp_path / "model", rank=1, iterations=60, alignment="none"), tmp_path / "unaligned"
    )
    errors = [
        json.loads((path / "compression.json").read_text())["layers"]["model.layers.0.mlp.experts"]["projections"]
        for path in (run.path, unaligned.path)
    ]
    assert errors[0]["gate_up_proj"]["relative_error"] < 1e-4 < errors[1]["gate_up_proj"]["relative_error"]


def test_calibration_lowers_the_error_on_data(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path
) -> None:
    source = model_dir("olmoe")
    runs = {
        calibrate: compressed(settings(source, calibrate=calibrate, rank=1), tmp_path / f"run-{calibrate}")
        for calibrate in (True, False)
    }
    facts = json.loads((runs[True].path / "compression.json").read_text())
    assert facts["calibrated"] and not (runs[True].path / "calibration").exists()
    tokens = 10 * 32 * 2
    for name, layer in facts["layers"].items():
        assert sum(layer["load"]) == tokens, name
    plain = json.loads((runs[False].path / "compression.json").read_text())
    for name, layer in plain["layers"].items():
        assert layer["load"] is None
        for projection, values in layer["projections"].items():
            assert values["data_error"] is None
            # On the weights alone, the uncalibrated fit is the better one.
            calibrated = facts["layers"][name]["projections"][projection]
            assert values["relative_error"] < calibrated["relative_error"]
    # Measured on the same activations, the calibrated layer is nearer to the original.
    assert output_error(source, runs[True].checkpoint(0)) < 0.9 * output_error(source, runs[False].checkpoint(0))


def output_error(original: Path, student: Path) -> float:
    """Squared error of the first MoE layer's output, its inputs being those of the original model."""
    teacher, other = load(original), load(student)
    tokens = torch.tensor([list(range(3, 33))] * 2)
    calls: list[Any] = []
    experts = teacher.model.layers[0].mlp.experts
    hook = experts.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    logits(teacher, tokens)
    hook.remove()
    with torch.no_grad():
        expected, found = experts(*calls[0]), other.model.layers[0].mlp.experts(*calls[0])
    return float((expected - found).square().sum())


@pytest.mark.parametrize(
    ("stored", "source_dtype", "loaded"),
    [
        ("auto", torch.bfloat16, "bfloat16"),
        ("float32", torch.bfloat16, "float32"),
        ("bfloat16", torch.float32, "float32"),
    ],
)
def test_types(
    stored: str,
    source_dtype: torch.dtype,
    loaded: str,
    make_model: Callable[..., Any],
    settings: Settings,
    tmp_path: Path,
    tokens: Tensor,
) -> None:
    """Factors are stored in the type asked for, other tensors stay; loading rounds neither."""
    make_model("gpt_oss", dtype=source_dtype).save_pretrained(tmp_path / "model")
    run = compressed(settings(tmp_path / "model", dtype=stored), tmp_path / "run")
    config = json.loads((run.checkpoint(0) / "config.json").read_text())
    assert config["dtype"] == loaded and "torch_dtype" not in config
    factor = source_dtype if stored == "auto" else getattr(torch, stored)
    model = load(run.checkpoint(0))
    loaded_tensors = model.state_dict()
    for name, tensor in tensors_of(run.checkpoint(0)).items():
        assert tensor.dtype == (factor if ".experts." in name else source_dtype), name
        assert torch.equal(loaded_tensors[name].float(), tensor.float())
    facts = json.loads((run.path / "compression.json").read_text())
    assert facts["totals"]["bytes_after"] == sum(tensor.nbytes for tensor in tensors_of(run.checkpoint(0)).values())


def test_nothing_is_left_by_what_cannot_be_done(
    model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_dir("olmoe")
    for number, (changes, message) in enumerate(
        [
            ({"rank": 100}, "is above the dimensions"),
            ({"device": "cuda:77"}, "compression.device=cuda:77 cannot be used"),
            ({"cores": 0, "parameterization": "wrapper"}, "wrapper needs a core"),
        ]
    ):
        run = Run.create(tmp_path / f"run{number}", settings(source, **changes))
        with pytest.raises(UserError, match=message):
            compress(run)
        assert not run.checkpoint(0).exists() and not run.has_run("compress")
    monkeypatch.setattr("moe_compress.compression.planning.shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    run = Run.create(tmp_path / "full", settings(source))
    with pytest.raises(UserError, match="0.0 GB free"):
        compress(run)
    assert not run.checkpoint(0).exists()


def test_compressing_a_student_is_refused(model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path) -> None:
    run = compressed(settings(model_dir("olmoe")), tmp_path / "run")
    with pytest.raises(UserError, match="compressed already"):
        compressed(settings(run.checkpoint(0)), tmp_path / "twice")


def test_nan_outside_the_experts_is_named(model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path) -> None:
    tensors = tensors_of(model_dir("olmoe"))
    tensors["model.norm.weight"][3] = float("nan")
    tensors["extra.buffer"] = torch.tensor([float("inf")])  # nothing loads it, so it may hold what it likes
    shutil.copytree(model_dir("olmoe"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    run = Run.create(tmp_path / "run", settings(tmp_path / "model"))
    with pytest.raises(UserError, match=r"tensor model.norm.weight in .*model.safetensors holds NaN"):
        compress(run)
    assert not run.checkpoint(0).exists() and not run.finished("compress")
    tensors["model.norm.weight"][3] = 1.0
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    compress(run)
    assert tensors_of(run.checkpoint(0))["extra.buffer"].isinf().all()


SPEC = FitSpec(delta_rank=2, iterations=2)


def test_factors_that_overflow_are_told() -> None:
    weights = {"up_proj": 1e6 * torch.randn(4, 6, 8), "down_proj": torch.randn(4, 8, 6)}
    settings = LayerSettings(dict.fromkeys(weights, SPEC), dict.fromkeys(weights, torch.float16))
    with pytest.raises(UserError, match=r"layer.up_proj overflow or hold NaN in float16"):
        fit_layer(LayerInput("layer", weights, {}, False), settings)


@torch.no_grad()
def test_fit_layer_leaves_its_input_alone(make_model: Callable[..., Any]) -> None:
    found = find_experts(make_model("gpt_oss"))[0]
    parameters = dict(found.module.named_parameters())
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    layer_settings = LayerSettings(dict.fromkeys(found.projections, SPEC), dict.fromkeys(parameters, torch.float32))
    result = fit_layer(layer_input(found, parameters), layer_settings)
    assert all(torch.equal(before[name], tensor) for name, tensor in parameters.items())
    assert set(result.tensors()) >= {f"{found.name}.{name}" for name in parameters}
    assert set(expert_weights(found.module)) == set(result.factors)
