"""Training memory: what the forward pass keeps for the backward pass, and that the rest is computed again rightly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_compress.modeling import experts
from moe_compress.modeling.experts import SharedCoreExperts
from tests.modeling.test_cores import grouped
from tests.modeling.test_experts import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    gradients,
    original,
    route,
    shared,
)

TOKENS, TOP_K = 40, 3


def kept_bytes(module: nn.Module) -> int:
    """Bytes that a forward pass saves, each storage once, without parameters and inputs."""
    _, index, weights = route(TOKENS, TOP_K)
    hidden = torch.randn(TOKENS, module.hidden_dim, requires_grad=True)
    weights.requires_grad_()
    known = {tensor.untyped_storage().data_ptr() for tensor in (hidden, index, weights, *module.parameters())}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(hidden, index, weights)
    return sum(size for size, _ in saved.values())


def with_basis(module: nn.Module, cores: int = 0) -> SharedCoreExperts:
    """Deltas of the up projection that read 8 directions of the input."""
    layout = shared(module, cores=cores).layout
    layout["gate_up_proj"]["basis"] = 8
    replacement = SharedCoreExperts(module, layout)
    generator = torch.Generator().manual_seed(5)
    for parameter in replacement.parameters():
        values = torch.randn(parameter.shape, generator=generator) * max(1, parameter.shape[-1]) ** -0.5
        parameter.data = values.to(parameter.dtype)
    return replacement


def variants(module: nn.Module) -> dict[str, nn.Module]:
    return {
        "one core": shared(module),
        "no core": shared(module, cores=0),
        "three cores": grouped(module),
        "basis": with_basis(module),
        "core and basis": with_basis(module, cores=1),
    }


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_less_is_kept_than_by_the_original(implementation: str) -> None:
    config = Qwen3MoeConfig(num_experts=EXPERTS, hidden_size=32, moe_intermediate_size=16)  # grouped_mm wants 16 bytes
    config._experts_implementation = implementation
    module = Qwen3MoeExperts(config)
    most = kept_bytes(module)
    for name, replacement in variants(module).items():
        assert kept_bytes(replacement) < most, name


def test_only_the_gate_sees_its_rows_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept are [S, 2I], what the gate reads, three times the inner values, and less than that per token."""
    replacement = shared(original("gated"))
    monkeypatch.setattr(experts, "rows_per_gemm", lambda *_: 0)  # no rows that fill up a batch
    rows = TOKENS * TOP_K
    rank = replacement.layout["down_proj"]["delta_rank"]
    small = TOKENS * HIDDEN + rows * 6  # tokens; order, weights and padding of the rows
    assert kept_bytes(replacement) <= 4 * (rows * (2 * INTERMEDIATE + 3 * rank) + small)


@pytest.mark.parametrize("nested", [None, False, True])
def test_gradients_are_those_of_keeping_everything(nested: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within activation checkpointing of a whole layer, reentrant or not."""
    module = original("gpt_oss")
    inputs = route(TOKENS, TOP_K)
    # A reentrant checkpoint's forward pass is without gradient, where few rows would go another way.
    monkeypatch.setattr(experts, "by_row", lambda *_: False)
    for name, replacement in variants(module).items():

        def run(*given: Tensor, replacement: nn.Module = replacement) -> Tensor:
            return replacement(*given) if nested is None else checkpoint(replacement, *given, use_reentrant=nested)

        out, found = gradients(run, replacement, inputs)
        with monkeypatch.context() as patched:
            patched.setattr(experts, "recomputed", lambda function, values: function(values))
            expected_out, expected = gradients(replacement, replacement, inputs)
        assert torch.equal(out, expected_out), name
        for parameter, gradient in expected.items():
            assert (gradient is None) == (found[parameter] is None), (name, parameter)
            assert gradient is None or torch.equal(found[parameter], gradient), (name, parameter)


def test_a_basis_meets_each_token_once_and_not_again_in_the_backward_pass() -> None:
    replacement = with_basis(original("gated"))
    hidden, index, weights = route(TOKENS, TOP_K)

    def products(train: bool) -> int:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
            out = replacement(hidden.clone().requires_grad_(train), index, weights)
            out.sum().backward() if train else None
        return counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    once = 2 * TOKENS * replacement.get_parameter("gate_up_proj_basis").numel()
    assert products(train=False) == once
    assert products(train=True) == 3 * once


@pytest.mark.parametrize("make", [lambda module: shared(module, rank=8), with_basis], ids=["core", "basis"])
def test_training_compiles_into_one_graph_with_its_backward_pass(make: Callable[..., nn.Module]) -> None:
    replacement = make(original("gated", torch.bfloat16))
    hidden, index, weights = route(6, 2)
    inputs = (hidden.bfloat16(), index, weights.bfloat16())
    torch._dynamo.reset()
    out, found = gradients(torch.compile(replacement, backend="aot_eager", fullgraph=True), replacement, inputs)
    expected_out, expected = gradients(replacement, replacement, inputs)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(found, expected)
