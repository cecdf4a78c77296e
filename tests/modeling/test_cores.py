"""Several cores per projection: the forward pass, storing, loading, training, exporting and counting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_compress.errors import UserError
from moe_compress.factorization.factors import DeltaFactors, Factors, WrapperFactors
from moe_compress.modeling import (
    SharedCoreConfig,
    compress_in_memory,
    count_parameters,
    export_dense,
    find_experts,
    find_shared_cores,
    fold_in_memory,
)
from moe_compress.modeling.experts import SharedCoreExperts
from tests.modeling.test_experts import EXPERTS, KINDS, PATHS, assert_same, force, gradients, original, route, shared

GROUPS = [0, 2, 1, 2, 0]  # of the five experts of `original`


def grouped(module: Any, parameterization: str = "delta", up: list[int] = GROUPS, down: list[int] = GROUPS) -> Any:
    one = shared(module, parameterization)
    layout = one.layout
    for projection, groups in zip(one.projections, (up, down), strict=True):
        layout[projection] |= {"cores": max(groups) + 1, "groups": groups}
    replacement = SharedCoreExperts(module, layout, parameterization)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for parameter in replacement.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5).to(
            parameter.dtype
        )
    return replacement


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("top_k", [2, 3, EXPERTS])  # fewer experts per token than cores, as many, more
@pytest.mark.parametrize("kind", KINDS)
def test_equals_materialized_experts(kind: str, top_k: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(path, monkeypatch)
    module = original(kind)
    assert_same(module, grouped(module), route(7, top_k))


@pytest.mark.parametrize("top_k", [2, 4])
def test_each_projection_has_its_own_groups(top_k: int) -> None:
    module = original("gpt_oss")
    assert_same(module, grouped(module, up=[1, 0, 0, 1, 0], down=[3, 2, 1, 0, 3]), route(9, top_k))


def test_a_wrapper_with_groups_folds_exactly() -> None:
    module = original("gated")
    replacement = grouped(module, "wrapper")
    inputs = route(7, 3)
    assert_same(module, replacement, inputs, 1e-4)
    expected, layout = replacement(*inputs), replacement.layout
    folded = replacement.fold_()
    torch.testing.assert_close(folded(*inputs), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert folded.layout == layout and folded.parameterization == "delta"


@pytest.mark.parametrize("top_k", [2, 3])
def test_padding_reaches_no_core(top_k: int) -> None:
    replacement = grouped(original("gated"))
    hidden, index, weights = route(6, top_k)
    index[0], index[2, 0], hidden[0] = EXPERTS, EXPERTS, float("nan")
    out, found = gradients(replacement, replacement, (hidden, index, weights))
    assert not out[0].any() and out[1:].isfinite().all()
    assert all(gradient.isfinite().all() for gradient in found.values() if gradient is not None)
    weights[2, 0] = 5.0  # of the padding, so that it must not matter
    torch.testing.assert_close(replacement(hidden, index, weights)[2], out[2])


def test_bf16_stays_close_to_fp32() -> None:
    exact = grouped(original("gated"))
    hidden, index, weights = route(8, 3)
    expected = exact(hidden, index, weights)
    rounded = exact.to(torch.bfloat16)
    out = rounded(hidden.bfloat16(), index, weights.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.linalg.vector_norm(out.float() - expected) <= 5e-2 * torch.linalg.vector_norm(expected)


def compress(model: Any, variant: str = "delta") -> Any:
    generator = torch.Generator().manual_seed(0)

    def factors(shape: tuple[int, int, int], groups: list[int] | None) -> Factors:
        experts, rows, columns = shape

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator) * columns**-0.5

        core = normal((max(groups) + 1 if groups else 1) * rows, columns)
        index = torch.tensor(groups) if groups else None
        if variant == "wrapper":
            return WrapperFactors(core, *(normal(experts, n, 4) for n in (rows, rows, columns, columns)), index)
        return DeltaFactors(core, normal(experts, rows, 8), normal(experts, 8, columns), index)

    groups = {"down_proj": [1, 0, 2, 1]}  # three cores for two experts per token; gate_up_proj of layer 0 has two
    return compress_in_memory(
        model,
        {
            facts.name: {
                projection: factors(shape, groups.get(projection, None if layer else [0, 1, 1, 0]))
                for projection, shape in facts.projections.items()
            }
            for layer, facts in enumerate(find_experts(model))
        },
    )


@pytest.mark.parametrize(("architecture", "variant"), [("mixtral", "wrapper"), ("gpt_oss", "delta")])
def test_is_saved_loaded_trained_and_exported(
    tiny_model: Callable[..., Any], architecture: str, variant: str, ids: Tensor, tmp_path: Path
) -> None:
    model = compress(tiny_model(architecture), variant)
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "student")
    written = json.loads((tmp_path / "student" / "config.json").read_text())["quantization_config"]
    assert written["format_version"] == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=0)
    layouts = {name: module.layout for name, module in find_shared_cores(loaded).items()}
    assert layouts == written["layers"]
    assert next(iter(layouts.values()))["down_proj"]["groups"] == [1, 0, 2, 1]
    export_dense(tmp_path / "student", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(dense(ids).logits, expected, rtol=1e-4, atol=1e-4)
    if variant == "wrapper":
        torch.testing.assert_close(fold_in_memory(loaded)(ids).logits, expected, rtol=1e-4, atol=1e-4)
    loss = loaded.train()(ids, labels=ids).loss
    loss.backward()
    core = next(iter(find_shared_cores(loaded).values())).down_proj
    assert core.grad.view(3, -1).norm(dim=1).gt(0).all()


def test_counts_the_cores_that_a_token_can_use(tiny_model: Callable[..., Any]) -> None:
    model = compress(tiny_model("mixtral"))
    hidden, inner, deltas = 32, 16, 8 * (32 + 2 * 16) + 8 * (16 + 32)
    up, down = 2 * inner * hidden, hidden * inner
    count = count_parameters(model)
    assert count.expert == (2 + 1) * up + 2 * 3 * down + 2 * 4 * deltas
    # Two experts per token: of three cores two at most.
    assert count.total - count.active == 2 * down + 2 * 2 * deltas


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cores": 2}, "its groups must give each expert"),
        ({"cores": 2, "groups": [0, 0, 2, 1]}, "its groups must give each expert"),
        ({"cores": 2, "groups": [0, 0, 0, 0]}, "its groups must give each expert"),
        ({"cores": 1, "groups": [0, 0, 0, 0]}, "has groups, but not several cores"),
        ({"cores": -1}, "must be a whole number"),
    ],
)
def test_a_damaged_config_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SharedCoreConfig(layers={"experts": {"down_proj": {"delta_rank": 4, "cores": 1} | change}})  # type: ignore


def test_versions() -> None:
    layers: Any = {"e": {"down_proj": {"delta_rank": 4, "cores": 2, "groups": [1, 0]}}}
    assert SharedCoreConfig(layers=layers).to_dict() == {
        "quant_method": "shared_core", "format_version": 2, "parameterization": "delta", "layers": layers,
    }  # fmt: skip
    for version in (1, 3):
        with pytest.raises(UserError, match=f"has format version {version}"):
            SharedCoreConfig(layers=layers, format_version=version)


def test_groups_of_another_number_of_experts_are_refused() -> None:
    with pytest.raises(UserError, match="4 experts are given a core, there are 5"):
        grouped(original("gated"), up=[0, 1, 1, 0])


def test_factors_in_other_groups_are_refused() -> None:
    replacement = grouped(original("gated"))
    other = DeltaFactors(**vars(replacement.factors("down_proj")) | {"groups": torch.tensor([0, 1, 2, 2, 0])})
    with pytest.raises(UserError, match="grouped in another way"):
        replacement.load_factors("down_proj", other)
