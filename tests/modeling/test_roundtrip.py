"""Compress, save, load, train, save again: over seven architectures and three forms of the factors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from moe_compress.modeling import (
    SharedCoreConfig,
    SharedCoreExperts,
    compress_in_memory,
    find_experts,
    find_shared_cores,
    fold_in_memory,
)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_full_rank_without_a_core_is_the_original(
    tiny_model: Callable[..., Any], exact_factors: Callable[..., Any], architecture: str, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    expected = logits(model, ids)
    compress_in_memory(model, exact_factors(model))
    assert find_shared_cores(model)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=1e-4, atol=1e-4)


def test_loads_bit_identically(
    saved: Path,
    tiny_model: Callable[..., Any],
    compressed: Callable[..., Any],
    architecture: str,
    variant: str,
    ids: Tensor,
) -> None:
    model = compressed(tiny_model(architecture), variant)
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    # MKL's last bit depends on how tensors are aligned: those of a file are not.
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert not torch.allclose(logits(loaded, ids), logits(tiny_model(architecture), ids), atol=1e-2)
    modules = find_shared_cores(loaded)
    assert list(modules) == [facts.name for facts in find_experts(tiny_model(architecture))]
    assert all(type(module) is SharedCoreExperts for module in modules.values())
    assert {module.parameterization for module in modules.values()} == {"wrapper" if variant == "wrapper" else "delta"}


def test_every_other_tensor_is_the_original_s(saved: Path, tiny_model: Callable[..., Any], architecture: str) -> None:
    original = tiny_model(architecture)
    experts = tuple(facts.name for facts in find_experts(original))
    loaded = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    others = {name: tensor for name, tensor in original.state_dict().items() if not name.startswith(experts)}
    assert len(others) > 10
    for name, tensor in others.items():
        assert torch.equal(loaded[name], tensor), name


def test_stored_tensors_have_the_documented_names(saved: Path, architecture: str, variant: str) -> None:
    stored = {name.partition(".experts.")[2]: tensor for name, tensor in tensors(saved).items() if ".experts." in name}
    suffixes = ("u_out", "v_out", "u_in", "v_in") if variant == "wrapper" else ("delta_out", "delta_in")
    suffixes += ("basis",) if variant == "basis" else ()
    expected = {f"{p}{s}" for p in ("gate_up_proj", "down_proj") for s in ("", *(f"_{suffix}" for suffix in suffixes))}
    if architecture == "gpt_oss":
        expected |= {"gate_up_proj_bias", "down_proj_bias"}
    assert set(stored) == expected
    assert stored["gate_up_proj"].shape == ((0 if variant in ("no_core", "basis") else 32), 32)
    assert stored["down_proj"].shape == ((0 if variant in ("no_core", "basis") else 32), 16)


def test_saves_the_same_again(saved: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    loaded.save_pretrained(tmp_path / "again")
    assert_equal_tensors(tensors(tmp_path / "again"), tensors(saved))
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads((saved / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "third", max_shard_size="20KB")
    assert (tmp_path / "third/model.safetensors.index.json").exists()
    assert_equal_tensors(tensors(tmp_path / "third"), tensors(saved))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "third")
    assert_equal_tensors(reloaded.state_dict(), loaded.state_dict())


def test_an_explicit_state_dict_is_what_is_saved(saved: Path, tmp_path: Path, variant: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    changed = {name: tensor + 1 for name, tensor in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path, state_dict=dict(changed))
    assert_equal_tensors(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), changed)


def test_bf16_round_trip(
    tiny_model: Callable[..., Any],
    compressed: Callable[..., Any],
    architecture: str,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    model = compressed(tiny_model(architecture, torch.bfloat16), "delta", rank=6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_loads_in_another_dtype(all_saved: dict[tuple[str, str], Path]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(all_saved["olmoe", "wrapper"], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_the_loaded_model_is_an_ordinary_one(saved: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded, "quantization_method")
    assert not loaded.is_quantized
    assert isinstance(loaded.config.quantization_config, SharedCoreConfig)
    assert all(parameter.requires_grad == (parameter.numel() > 0) for parameter in loaded.parameters())
    assert "_is_quantized" not in vars(loaded.config)


@pytest.mark.parametrize("case", [*(("olmoe", kind) for kind in ("delta", "no_core", "wrapper")), ("gpt_oss", "delta")])
def test_the_trainer_trains_and_saves_it(
    all_saved: dict[tuple[str, str], Path], case: tuple[str, str], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(all_saved[case])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    row = {"input_ids": torch.arange(3, 19), "labels": torch.arange(3, 19)}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        warmup_steps=0,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[row] * 4)
    trainer.train()
    unchanged = {name for name, value in model.named_parameters() if value.numel() and torch.equal(value, before[name])}
    assert not {name for name in unchanged if "experts" in name}
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_equal_tensors(loaded.state_dict(), model.state_dict())


def test_the_base_model_loads_too(saved: Path, ids: Tensor) -> None:
    full = AutoModelForCausalLM.from_pretrained(saved)
    base = AutoModel.from_pretrained(saved)
    with torch.no_grad():
        expected = full.base_model(ids).last_hidden_state
        assert torch.equal(base(ids).last_hidden_state, expected)


def test_generates_alike_with_and_without_cache(
    all_saved: dict[tuple[str, str], Path], architecture: str, ids: Tensor
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(all_saved[architecture, "delta"])
    arguments: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = loaded.generate(ids[:1], use_cache=True, **arguments)
    assert cached.shape == (1, ids.shape[1] + 5)
    assert torch.equal(cached, loaded.generate(ids[:1], use_cache=False, **arguments))


def test_folding_a_model_keeps_its_function_and_is_saved(
    all_saved: dict[tuple[str, str], Path], architecture: str, ids: Tensor, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(all_saved[architecture, "wrapper"])
    expected = logits(model, ids)
    fold_in_memory(model)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.parameterization == "delta"
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_names_on_disk_may_be_those_of_the_module(
    all_saved: dict[tuple[str, str], Path], ids: Tensor, tmp_path: Path
) -> None:
    """Mixtral's checkpoints say `block_sparse_moe` where the module is `mlp`; a streamed one may say either."""
    source = all_saved["mixtral", "delta"]
    model = AutoModelForCausalLM.from_pretrained(source)
    assert any("block_sparse_moe.experts.gate_up_proj" in name for name in tensors(source))
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any("mlp.experts.gate_up_proj" in name for name in tensors(tmp_path))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))


def test_a_model_loaded_from_one_matrix_per_expert_is_saved_as_shared_cores(
    tiny_model: Callable[..., Any], compressed: Callable[..., Any], architecture: str, ids: Tensor, tmp_path: Path
) -> None:
    tiny_model(architecture).save_pretrained(tmp_path / "original")
    model = compressed(AutoModelForCausalLM.from_pretrained(tmp_path / "original"), "delta")
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded, ids), logits(model, ids))
