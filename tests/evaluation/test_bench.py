"""What `bench` makes of a model it is given: an original in any storage, custom code, a checkpoint anywhere."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

from moe_compress.config import Config, ModelConfig
from moe_compress.evaluation import bench as bench_module
from moe_compress.evaluation import roofline, timing
from moe_compress.evaluation import speed as speed_module
from moe_compress.evaluation.bench import bench_model
from moe_compress.evaluation.speed import layer_speed
from moe_compress.evaluation.variants import OURS

from .conftest import make_model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_MOST_CALLS", 1)
    monkeypatch.setattr(speed_module, "_MOST_COPIES", 2)
    monkeypatch.setattr(roofline, "_COPIED_BYTES", 2**10)
    monkeypatch.setattr(roofline, "_GEMM_SIZE", 16)
    monkeypatch.setattr(bench_module, "layer_speed", partial(layer_speed, seconds=0))


def write_config(path: Path, **extra: object) -> Config:
    """Write the configuration of a tiny model, and give the settings that bench it at rank 4."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**make_model().config.to_dict(), **extra}))
    config = Config(model=ModelConfig(name=str(path)))
    config.compression.rank = 4
    return config


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_quantized_original_is_an_original(tmp_path, capsys, method):
    config = write_config(tmp_path / "model", quantization_config={"quant_method": method})
    (layer,) = bench_model(config)["layers"]
    assert OURS in layer["layouts"] and layer["count"] == 2
    assert "whole model is not timed" in capsys.readouterr().out


def test_custom_code_runs_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench_module, "_whole_models", lambda *_, **__: None)
    config = write_config(tmp_path / "model", model_type="ours", auto_map={
        "AutoConfig": "code.OurConfig", "AutoModelForCausalLM": "code.OurModel",
    })  # fmt: skip
    (tmp_path / "model" / "code.py").write_text(
        "from transformers import OlmoeConfig, OlmoeForCausalLM\n\n"
        "class OurConfig(OlmoeConfig):\n    model_type = 'ours'\n\n"
        "class OurModel(OlmoeForCausalLM):\n    config_class = OurConfig\n"
    )
    config.model.trust_remote_code = True
    assert bench_model(config)["layers"][0]["count"] == 2


def test_a_checkpoint_at_the_root_has_no_run():
    assert bench_module._teacher_of(Path("/model")) is None
