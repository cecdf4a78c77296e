"""Gram matrices: equal to a direct computation on every kind of experts, cached, and kept in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compress.compression import calibrate, collect
from moe_compress.compression.calibrate import Calibration
from moe_compress.compression.collect import LayerGrams, collect_grams
from moe_compress.compression.layer import LayerSettings, fit_layer, layer_input
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.factorization import FitSpec, shrink_grams
from moe_compress.modeling import find_experts

Call = tuple[Tensor, Tensor, Tensor]


def calls_of(model: Any, tokens: Tensor) -> dict[str, Call]:
    """What each experts module was called with in an ordinary forward pass."""
    calls: dict[str, Call] = {}
    hooks = [
        found.module.register_forward_pre_hook(lambda module, inputs, name=found.name: calls.update({name: inputs}))
        for found in find_experts(model)
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return calls


def direct_grams(module: Any, call: Call) -> dict[str, Tensor]:
    """The definition, one token at a time, in fp64."""
    hidden_states, indices, weights = call
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    first, second = (getattr(module, name) for name in (up_name, "down_proj"))
    if module.is_transposed:
        first, second = first.mT, second.mT
    inner = second.shape[2]
    experts, _, hidden_size = first.shape
    grams = {up_name: torch.zeros(experts, hidden_size, hidden_size), "down_proj": torch.zeros(experts, inner, inner)}
    grams = {name: gram.double() for name, gram in grams.items()}
    for state, chosen, weight in zip(hidden_states, indices, weights, strict=True):
        for expert, g in zip(chosen.tolist(), weight.tolist(), strict=True):
            outer = first[expert] @ state
            if module.has_bias:
                outer = outer + getattr(module, f"{up_name}_bias")[expert]
            neuron = module._apply_gate(outer[None])[0] if module.has_gate else module.act_fn(outer)
            grams[up_name][expert] += g * g * torch.outer(state.double(), state.double())
            grams["down_proj"][expert] += g * g * torch.outer(neuron.double(), neuron.double())
    return grams


@torch.no_grad()
def test_grams_equal_the_definition(family: str, make_model: Callable[..., Any], tokens: Tensor) -> None:
    model = make_model(family)
    experts = find_experts(model)
    calls = calls_of(model, tokens)
    sums = collect_grams(model, experts, tokens.split(1))
    assert list(sums) == [found.name for found in experts]
    for found in experts:
        direct = direct_grams(found.module, calls[found.name])
        for name, gram in sums[found.name].grams.items():
            assert gram.dtype == torch.float32
            torch.testing.assert_close(gram.double(), direct[name], rtol=1e-4, atol=1e-6)
        counts = torch.bincount(calls[found.name][1].reshape(-1), minlength=found.num_experts)
        assert torch.equal(sums[found.name].tokens, counts)


def test_the_forward_pass_is_the_ordinary_one(
    family: str, make_model: Callable[..., Any], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    before = model.get_experts_implementation()
    seen: list[Tensor] = []
    with torch.no_grad():
        expected = model.base_model(tokens).last_hidden_state
    hook = model.base_model.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state))
    collect_grams(model, find_experts(model), [tokens])
    hook.remove()
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    assert model.get_experts_implementation() == before
    assert not collect._collecting

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_grams(model, find_experts(model), [tokens], fail)
    assert model.get_experts_implementation() == before
    assert not collect._collecting


def test_padding_and_unused_experts(make_model: Callable[..., Any]) -> None:
    found = find_experts(make_model("olmoe"))[0]
    sums = LayerGrams.zeros(found, "cpu")
    states, weights = torch.randn(3, 32), torch.full((3, 2), 0.5)
    padding = found.num_experts
    index = torch.tensor([[1, padding], [4, 1], [padding, padding]])
    with torch.no_grad(), collect.collect_into({found.module: sums}, [found.module]):
        output = found.module(states, index, weights)
        assert torch.equal(output[2], torch.zeros(32))
        alone = found.module(states[:1], index[:1, :1], weights[:1, :1])
    torch.testing.assert_close(output[0], alone[0])
    assert sums.tokens.tolist() == [0, 3, 0, 0, 1, 0, 0, 0]  # the padded one was counted once in each call
    assert sums.grams["gate_up_proj"][[0, 2, 3, 5, 6, 7]].abs().sum() == 0


@torch.no_grad()
def test_bf16_models_are_summed_in_fp32(make_model: Callable[..., Any], tokens: Tensor) -> None:
    model = make_model("olmoe", dtype=torch.bfloat16)
    experts = find_experts(model)
    calls = calls_of(model, tokens)
    sums = collect_grams(model, experts[:1], [tokens] * 50)
    direct = direct_grams(experts[0].module, calls[experts[0].name])["gate_up_proj"]
    torch.testing.assert_close(sums[experts[0].name].grams["gate_up_proj"].double() / 50, direct, rtol=1e-4, atol=1e-7)


def calibration(config: Config, path: Path, directory: Path) -> Calibration:
    return Calibration(config, path, "source", directory)


def test_cache_continues_where_it_was_killed(
    model_dir: Callable[[str], Path],
    settings: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = model_dir("olmoe")
    config = settings(path, calibrate=True)
    whole = calibration(config, path, tmp_path / "whole")
    steps: list[tuple[int, int]] = []
    whole.run([0, 1], torch.device("cpu"), lambda done, total: steps.append((done, total)))
    assert steps == [(number, 4) for number in range(1, 5)]  # 10 rows in batches of 3
    assert int(whole.load(0).tokens.sum()) == 10 * 32 * 2

    monkeypatch.setattr(calibrate, "GRAM_BYTES_AT_ONCE", 1)
    parts = calibration(config, path, tmp_path / "parts")

    def killed(done: int, total: int) -> None:
        assert total == 8  # now one pass per layer
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.run([0, 1], torch.device("cpu"), killed)
    assert [parts.finished(index) for index in (0, 1)] == [True, False]
    parts.run([1], torch.device("cpu"), lambda done, total: None)
    for index in (0, 1):
        assert parts.file(index).read_bytes() == whole.file(index).read_bytes()
        for name, gram in whole.load(index).grams.items():
            assert gram.shape[0] == 8 and gram.abs().sum() > 0, name


def test_cache_of_other_text_or_damaged_is_not_taken(
    model_dir: Callable[[str], Path], settings: Callable[..., Config], tmp_path: Path
) -> None:
    path = model_dir("olmoe")
    config = settings(path, calibrate=True)
    first = calibration(config, path, tmp_path)
    first.run([0], torch.device("cpu"), lambda done, total: None)
    assert first.finished(0)
    first.file(0).write_bytes(first.file(0).read_bytes()[:-1])
    assert not first.finished(0)
    first.run([0], torch.device("cpu"), lambda done, total: None)
    config.compression.calibration.dataset.max_samples = 9
    assert not calibration(config, path, tmp_path).finished(0)
    config.compression.calibration.dataset.max_samples = 10
    assert calibration(config, path, tmp_path).finished(0)


def test_overflow_is_told(
    make_model: Callable[..., Any],
    model_dir: Callable[[str], Path],
    settings: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("olmoe")
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.fill_(1e30)
    monkeypatch.setattr(calibrate, "load_model", lambda *args, **kwargs: model)
    path = model_dir("olmoe")
    with pytest.raises(UserError, match="calibration met NaN or infinity at the input of gate_up_proj in MoE layer 0"):
        calibration(settings(path, calibrate=True), path, tmp_path).run([0], torch.device("cpu"), lambda *_: None)


def test_experts_of_few_tokens_are_moved_further_to_the_mean_of_the_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([1000, 1000, 20, 0])
    inputs = [torch.randn(int(count), 8, generator=generator) * torch.linspace(0.1, 2, 8) for count in counts]
    inputs = [rows.roll(expert, 1) for expert, rows in enumerate(inputs)]
    grams = torch.stack([rows.mT @ rows for rows in inputs])
    shrunk = shrink_grams(grams, 0.1, counts)
    mean = grams[:3].mean(0)

    def turned(expert: int) -> float:
        """How far from its own shape towards the mean's, from 0 to 1."""
        own, now, target = (gram / gram.trace() for gram in (grams[expert], shrunk[expert], mean))
        return float((now - own).norm() / (target - own).norm())

    assert turned(0) < 0.2 and turned(1) < 0.2 < 0.7 < turned(2)
    assert torch.equal(shrunk[3], mean)


def test_fisher_sums_equal_the_definition(family: str, make_model: Callable[..., Any], tokens: Tensor) -> None:
    model = make_model(family)
    experts = find_experts(model)
    calls: dict[str, Any] = {}
    gradients: dict[str, Tensor] = {}

    def watch(name: str, module: Any) -> None:
        def after(_: Any, inputs: Any, output: Tensor) -> None:
            calls[name] = [each.detach() for each in inputs]
            output.register_hook(lambda gradient: gradients.update({name: gradient.detach()}))

        module.register_forward_hook(after)

    for found in experts:
        watch(found.name, found.module)
    sums = collect_grams(model, experts, [tokens], fisher_seed=3)
    again = collect_grams(model, experts, [tokens], fisher_seed=4)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    for found in experts:
        module, layer = found.module, sums[found.name]
        states, indices, weights = calls[found.name]
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        for expert in range(found.num_experts):
            rows, slots = (indices == expert).nonzero(as_tuple=True)
            below = gradients[found.name][rows] * weights[rows, slots][:, None]
            first, second = (getattr(module, name)[expert].detach() for name in (up_name, "down_proj"))
            if module.is_transposed:
                first, second = first.mT, second.mT
            inner = states[rows] @ first.mT
            if module.has_bias:
                inner = inner + getattr(module, f"{up_name}_bias")[expert].detach()
            inner.requires_grad_()
            neurons = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
            (above,) = torch.autograd.grad(neurons, inner, below @ second)
            for name, inputs, gradient in ((up_name, states[rows], above), ("down_proj", neurons.detach(), below)):
                scaled = inputs * gradient.norm(dim=1, keepdim=True)
                for kept, expected in ((layer.grams, scaled), (layer.out_grams, gradient)):
                    # Of the second run's samples; the first run's have another seed.
                    other = (again[found.name].grams if kept is layer.grams else again[found.name].out_grams)[name]
                    torch.testing.assert_close(other[expert], expected.mT @ expected, rtol=1e-3, atol=1e-9)
        assert not torch.equal(layer.out_grams["down_proj"], again[found.name].out_grams["down_proj"])
        assert torch.equal(layer.tokens, again[found.name].tokens)


def test_a_layer_fitted_by_fisher_does_not_depend_on_the_order_of_its_neurons(make_model: Callable[..., Any]) -> None:
    model = make_model("olmoe")
    (found, *_) = find_experts(model)
    generator = torch.Generator().manual_seed(0)
    sums = LayerGrams.zeros(found, "cpu", fisher=True)
    for gram in (*sums.grams.values(), *sums.out_grams.values()):
        root = torch.randn(gram.shape, generator=generator)
        gram += root @ root.mT
    sums.tokens += 10
    tensors = {name: parameter.detach() for name, parameter in found.module.named_parameters()}
    settings = LayerSettings(
        specs=dict.fromkeys(found.projections, FitSpec(delta_rank=4, cores=0)),
        dtypes=dict.fromkeys(found.projections, torch.float32),
        alignment="none",
        shrinkage=0.0,
    )
    plain = fit_layer(layer_input(found, tensors, sums), settings)
    aligned = fit_layer(layer_input(found, tensors, sums), replace(settings, alignment="weights"))
    for name in found.projections:
        expected = plain.errors[name]["data_error"]
        assert expected and aligned.errors[name]["data_error"] == pytest.approx(expected, rel=1e-3)
