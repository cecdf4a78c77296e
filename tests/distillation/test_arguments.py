"""What is checked before a training starts, balanced factors, and measures of a step."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_compress import settings
from moe_compress.config import Config, StageConfig
from moe_compress.distillation import distill
from moe_compress.distillation.arguments import check_training, deepspeed_settings
from moe_compress.distillation.balance import balance_factors
from moe_compress.distillation.measures import kind_of
from moe_compress.distillation.stages import resolve_stages
from moe_compress.errors import UserError
from moe_compress.factorization.fit import FitSpec, fit
from moe_compress.modeling import compress_in_memory, expert_weights, find_experts, find_shared_cores, load_model

from .conftest import VOCABULARY, MakeRun
from .test_training import log_of


def config_with(**training: Any) -> Config:
    config = Config()
    for name, value in training.items():
        setattr(config.distillation.training, name, value)
    return config


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "tensorboard", "trackio"):
        with pytest.raises(UserError, match=f"report_to={name} needs {name}, .* pip install {name}"):
            check_training(config_with(report_to=[name]))
    with pytest.raises(UserError, match="'mlflow' is unknown; there are: wandb, tensorboard, trackio"):
        check_training(config_with(report_to=["mlflow"]))
    with pytest.raises(UserError, match="deepspeed=zero3 needs deepspeed, .* pip install deepspeed"):
        check_training(config_with(deepspeed="zero3"))


def test_deepspeed_settings_are_shipped_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (2, 3):
        shipped = deepspeed_settings(f"zero{stage}")
        assert shipped["zero_optimization"]["stage"] == stage
        assert shipped["zero_allow_untested_optimizer"]  # the optimizer is ours, for its groups
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert deepspeed_settings(str(own))["zero_optimization"] == {"stage": 1}
    own.write_text("{")
    with pytest.raises(UserError, match="own.json is not JSON"):
        deepspeed_settings(str(own))
    with pytest.raises(UserError, match="deepspeed=zero9 is neither one of zero2, zero3 nor a file"):
        deepspeed_settings("zero9")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = config_with(deepspeed="zero2")
    check_training(config)
    config.fsdp.enabled = True
    with pytest.raises(UserError, match="both shard the student"):
        check_training(config)
    config.fsdp.enabled = False
    config.distillation.training.spikes.action = "skip"
    with pytest.raises(UserError, match="skip does not work under DeepSpeed"):
        check_training(config)


def test_stages_by_tokens_are_whole_steps() -> None:
    distillation = Config().distillation
    distillation.dataset.max_length = 100
    distillation.stages = [StageConfig(name="a", tokens=1001), StageConfig(name="b", steps=2, kind="blockwise")]
    first, second = resolve_stages(distillation, sequences=50, sequences_per_step=5)
    assert (first.steps, second.first_step, second.last_step, second.kind) == (3, 3, 5, "blockwise")
    distillation.stages[0].steps = 3
    with pytest.raises(UserError, match="'a': steps=3 and tokens=1001 are both set; keep one"):
        resolve_stages(distillation, sequences=50, sequences_per_step=5)


def test_the_presets_of_stages_resolve() -> None:
    for name in settings.presets("distillation"):
        distillation = settings.compose([f"distillation={name}"]).distillation
        distillation.training.max_steps = 10
        assert resolve_stages(distillation, sequences=100, sequences_per_step=4)
    (first, *_) = settings.compose(["distillation=blockwise_first"]).distillation.stages
    assert first.kind == "blockwise"


@pytest.mark.parametrize("parameterization", ["delta", "wrapper"])
def test_balanced_factors_are_the_same_model_with_equal_norms(teacher_dir: Path, parameterization: str) -> None:
    model = load_model(str(teacher_dir), dtype="float32")
    spec = FitSpec(parameterization=parameterization, delta_rank=4, iterations=1)
    results = {
        facts.name: {name: fit(weight, spec).factors for name, weight in expert_weights(facts.module).items()}
        for facts in find_experts(model)
    }
    compress_in_memory(model, results)
    (left, right) = ("delta_out", "delta_in") if parameterization == "delta" else ("u_in", "v_in")
    modules = find_shared_cores(model).values()
    with torch.no_grad():
        for module in modules:
            getattr(module, f"down_proj_{left}").mul_(7)
            getattr(module, f"down_proj_{right}").div_(7)
            side = getattr(module, f"gate_up_proj_{left}")[0]  # an empty side would empty the other one too
            (side.mT if parameterization == "delta" else side)[:, 0] = 0
    ids = torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        balance_factors(model)
        torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-4)
    for module in modules:
        one, other = getattr(module, f"down_proj_{left}"), getattr(module, f"down_proj_{right}")
        one = one.mT if parameterization == "delta" else one
        torch.testing.assert_close(one.norm(dim=1), other.norm(dim=1), atol=1e-5, rtol=1e-4)
        assert getattr(module, f"gate_up_proj_{right}")[0, :, 0].norm() > 1e-3


def test_factors_are_balanced_once_at_the_start(make_compressed_run: MakeRun, filled_cache: Path) -> None:
    logs = []
    for name, balanced in (("plain", False), ("balanced", True)):
        run = make_compressed_run(name, cache=filled_cache, max_steps=3, balance_factors=balanced)
        distill(run)
        logs.append(log_of(run))
    # The same function, and so the same first loss; the closed form has left its deltas balanced up to bf16.
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=1e-3)


def test_kinds_of_parameters() -> None:
    layer = "model.layers.3.mlp"
    kinds = {
        f"{layer}.experts.gate_up_proj": "cores",
        f"{layer}.experts.down_proj_delta_in": "factors",
        f"{layer}.experts.gate_up_proj_v_out": "factors",
        f"{layer}.experts.gate_up_proj_basis": "factors",
        f"{layer}.experts.gate_up_proj_bias": "others",
        f"{layer}.gate.weight": "routers",
        "model.layers.3.self_attn.q_proj.weight": "others",
    }
    assert {name: kind_of(name) for name in kinds} == kinds
