"""Compressing in memory takes exactly the layers of the model, and biases that moved with their neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compress.errors import UserError
from moe_compress.modeling import (
    compress_in_memory,
    factor_tensors,
    find_experts,
    find_shared_cores,
    fold_in_memory,
    materialize_in_memory,
)


@pytest.fixture
def results(tiny_model: Callable[..., Any], exact_factors: Callable[..., Any]) -> Any:
    """Exact factors of a tiny OLMoE."""
    return exact_factors(tiny_model("olmoe"))


def assert_refused(model: Any, results: Any, match: str) -> None:
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=match):
        compress_in_memory(model, results)
    assert [name for name, _ in model.named_parameters()] == names  # nothing half done
    assert not hasattr(model.config, "quantization_config")


def test_layers_and_projections_must_fit(
    tiny_model: Callable[..., Any], random_factors: Callable[..., Any], results: Any
) -> None:
    model = tiny_model("olmoe")
    first, last = results
    assert_refused(model, {first: results[first]}, f"missing for .*{last}")
    assert_refused(model, results | {"model.layers.9.mlp.experts": results[first]}, "unknown layers .*layers.9")
    one = {"down_proj": results[last]["down_proj"]}
    assert_refused(model, results | {last: one}, r"not \['down_proj'\]")
    wrong = results[last] | {"down_proj": random_factors((4, 32, 8), "delta")}
    assert_refused(model, results | {last: wrong}, "down_proj.* expected")
    mixed = results[last] | {"down_proj": random_factors((4, 32, 16), "wrapper")}
    assert_refused(model, results | {last: mixed}, "mixed")


def test_biases_that_moved_are_taken(
    tiny_model: Callable[..., Any], exact_factors: Callable[..., Any], ids: Tensor
) -> None:
    model = tiny_model("gpt_oss")
    facts = find_experts(model)
    kept = facts[0].module.gate_up_proj_bias.detach().clone()
    moved = {facts[1].name: {"gate_up_proj_bias": torch.full((4, 32), 0.5)}}
    compress_in_memory(model, exact_factors(model), moved)
    first, last = find_shared_cores(model).values()
    assert torch.equal(first.gate_up_proj_bias, kept)
    assert (last.gate_up_proj_bias == 0.5).all()
    assert (last.down_proj_bias != 0.5).any()


def test_training_mode_and_dtype_are_the_model_s(
    tiny_model: Callable[..., Any], compressed: Callable[..., Any]
) -> None:
    for mode in (True, False):
        model = compressed(tiny_model("olmoe", torch.bfloat16).train(mode), "delta")
        for module in find_shared_cores(model).values():
            assert module.training == mode
            assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_factor_tensors_are_contiguous_and_complete(random_factors: Callable[..., Any], variant: str) -> None:
    factors = random_factors((3, 8, 6), variant, 4)
    tensors = factor_tensors("down_proj", factors)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    shapes = {name.removeprefix("down_proj"): tuple(tensor.shape) for name, tensor in tensors.items()}
    if variant == "wrapper":
        assert shapes == {"": (8, 6), "_u_out": (3, 8, 2), "_v_out": (3, 8, 2), "_u_in": (3, 6, 2), "_v_in": (3, 6, 2)}
    else:
        core = (8, 6) if variant == "delta" else (0, 6)
        expected = {"": core, "_delta_out": (3, 4, 8), "_delta_in": (3, 6, 4)}
        if variant == "basis":
            expected |= {"_delta_in": (3, 4, 4), "_basis": (4, 6)}
        assert shapes == expected


def test_folding_an_original_model_is_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="no shared cores"):
        fold_in_memory(tiny_model("olmoe"))


def test_offloaded_experts_are_refused(
    tiny_model: Callable[..., Any], compressed: Callable[..., Any], results: Any
) -> None:
    model, student = tiny_model("olmoe"), compressed(tiny_model("olmoe"), "wrapper")
    for offloaded in (model, student):
        offloaded.model.layers[1].to("meta")  # as accelerate leaves what `device_map` puts on disk
    assert_refused(model, results, "layers.1.mlp.experts: its weights are not in memory")
    for change in (fold_in_memory, materialize_in_memory):
        with pytest.raises(UserError, match="layers.1.mlp.experts: its weights are not in memory"):
            change(student)
    assert len(find_shared_cores(student)) == 2
