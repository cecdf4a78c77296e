"""A checkpoint that does not fit must raise: without the plug-in, and with it when anything is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_compress.errors import UserError
from moe_compress.modeling import SharedCoreConfig, load_model

_PLAIN = """
import sys
sys.modules["moe_compress"] = None  # it must not be there, installed or not
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
        print("LOADED", path)
    except RuntimeError as error:
        print("RAISED", "ignore_mismatched_sizes" in str(error), path)
"""


def test_plain_transformers_raises_on_every_compressed_checkpoint(all_saved: dict[tuple[str, str], Path]) -> None:
    paths = [str(path) for path in all_saved.values()]
    result = subprocess.run([sys.executable, "-c", _PLAIN, *paths], capture_output=True, text=True, check=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith(("LOADED", "RAISED"))]
    assert lines == [f"RAISED True {path}" for path in paths]


Edit = Callable[[dict[str, Any], dict[str, Any]], None]


def _drop(ending: str) -> Edit:
    def edit(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        doomed = [name for name in tensors if name.endswith(ending)]
        assert doomed
        del tensors[doomed[-1]]

    return edit


def _drop_layer(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".1." in name and ".experts." in name]:
        del tensors[name]


def _forget_layer(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    del config["quantization_config"]["layers"]["model.layers.1.mlp.experts"]


def _invent_layer(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    layers = config["quantization_config"]["layers"]
    layers["model.layers.2.mlp.experts"] = layers["model.layers.1.mlp.experts"]


def _shrink(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    name = next(name for name in tensors if name.endswith("down_proj_delta_in"))
    tensors[name] = tensors[name][:, :4].contiguous()


def _set(**values: Any) -> Edit:
    return lambda tensors, config: config["quantization_config"].update(values)


def _layout(key: str, value: Any) -> Edit:
    def edit(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        config["quantization_config"]["layers"]["model.layers.0.mlp.experts"]["down_proj"][key] = value

    return edit


EDITS: dict[str, tuple[Edit, str]] = {
    "no delta_in": (_drop("gate_up_proj_delta_in"), "gate_up_proj_delta_in"),
    "no delta_out": (_drop("down_proj_delta_out"), "down_proj_delta_out"),
    "no core": (_drop("experts.down_proj"), "experts.down_proj"),
    "no layer": (_drop_layer, "layers.1"),
    "layer not in the config": (_forget_layer, "lacks model.layers.1.mlp.experts"),
    "layer not in the model": (_invent_layer, "names model.layers.2.mlp.experts"),
    "factor of another rank": (_shrink, "ignore_mismatched_sizes"),
    "config of another rank": (_layout("delta_rank", 4), "ignore_mismatched_sizes"),
    "config without the core": (_layout("cores", 0), "ignore_mismatched_sizes"),
    "config of the wrapper": (_set(parameterization="wrapper"), "_u_"),
    "unknown parameterization": (_set(parameterization="other"), "'other' is not delta or wrapper"),
    "newer format": (_set(format_version=3), "format version 3"),
    "older format": (_set(format_version=1), "format version 1"),
    "newer field": (_set(codebook=3), "unknown fields \\['codebook'\\]"),
    "no layers": (_set(layers={}), "names no layers"),
    "rank of nothing": (_layout("delta_rank", 0), "positive whole number"),
    "two cores": (_layout("cores", 2), "its groups must give each expert"),
}


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
@pytest.mark.parametrize("edit", EDITS)
def test_whatever_is_missing_raises(
    all_saved: dict[tuple[str, str], Path], tmp_path: Path, name: str, edit: str
) -> None:
    path = damaged(all_saved[name, "delta"], tmp_path / "damaged", EDITS[edit][0])
    with pytest.raises((UserError, RuntimeError), match=EDITS[edit][1]):
        AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(UserError):  # and as one line from our own loader
        load_model(path)


@pytest.mark.parametrize("edit", ["no delta_in", "no core", "factor of another rank", "config of another rank"])
def test_ignoring_sizes_does_not_help(all_saved: dict[tuple[str, str], Path], tmp_path: Path, edit: str) -> None:
    path = damaged(all_saved["olmoe", "delta"], tmp_path / "damaged", EDITS[edit][0])
    with pytest.raises(UserError, match="missing from the checkpoint or have another shape"):
        AutoModelForCausalLM.from_pretrained(path, ignore_mismatched_sizes=True)


def test_a_bias_that_is_missing_raises(all_saved: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    path = damaged(all_saved["gpt_oss", "delta"], tmp_path / "damaged", _drop("down_proj_bias"))
    with pytest.raises(UserError, match="down_proj_bias"):
        AutoModelForCausalLM.from_pretrained(path)


def test_a_wrapper_side_that_is_missing_raises(all_saved: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    path = damaged(all_saved["qwen3_moe", "wrapper"], tmp_path / "damaged", _drop("gate_up_proj_v_in"))
    with pytest.raises(UserError, match="gate_up_proj_v_in"):
        AutoModelForCausalLM.from_pretrained(path)


def test_the_undamaged_copy_loads(all_saved: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """So that the cases above fail for what was edited, not for the editing."""
    load_model(damaged(all_saved["mixtral", "delta"], tmp_path / "copy", lambda tensors, config: None))


def test_an_original_model_is_not_compressed_by_loading_it(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)
    layers = {"model.layers.0.mlp.experts": {"down_proj": {"delta_rank": 2, "cores": 1}}}
    with pytest.raises(UserError, match="no option for loading an original model"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SharedCoreConfig(layers=layers))


@pytest.mark.parametrize("size", ["tp_size", "ep_size"])
def test_sharding_over_features_or_experts_is_refused(
    all_saved: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    from types import SimpleNamespace

    from moe_compress.modeling.quantizer import SharedCoreQuantizer

    model = SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(**{size: 2})))
    config = json.loads((all_saved["olmoe", "delta"] / "config.json").read_text())["quantization_config"]
    quantizer = SharedCoreQuantizer(SharedCoreConfig.from_dict(config), pre_quantized=True)
    with pytest.raises(UserError, match=f"{size} > 1"):
        quantizer._process_model_before_weight_loading(model)


def damaged(source: Path, target: Path, edit: Edit) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    edit(tensors, config)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target
