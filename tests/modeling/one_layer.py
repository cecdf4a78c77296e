"""One MoE layer, original and compressed, and what tests compare of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AriaTextConfig, GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_compress.modeling.experts import SharedCoreExperts
from moe_compress.modeling.find import describe_experts, to_native

EXPERTS, HIDDEN, INTERMEDIATE = 5, 12, 6
KINDS = ("gated", "gpt_oss", "no_gate", "transposed")
PATHS = ("grouped", "batched", "by row")


def original(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE}
    if kind == "gated":
        module: nn.Module = Qwen3MoeExperts(Qwen3MoeConfig(num_experts=EXPERTS, **sizes))
    elif kind == "gpt_oss":
        module = GptOssExperts(
            GptOssConfig(num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)
        )
    elif kind == "no_gate":
        module = NemotronHExperts(NemotronHConfig(n_routed_experts=EXPERTS, **sizes))
    else:
        module = AriaExperts(
            AriaTextConfig(
                moe_num_experts=EXPERTS,
                hidden_size=HIDDEN,
                intermediate_size=INTERMEDIATE,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        )
    module.config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module.to(dtype)


def shared(
    module: nn.Module, parameterization: str = "delta", cores: int = 1, rank: int = 4, seed: int = 0
) -> SharedCoreExperts:
    layout = {name: {"delta_rank": rank, "cores": cores} for name in describe_experts("experts", module).projections}
    replacement = SharedCoreExperts(module, layout, parameterization)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for parameter in replacement.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.numel() else 1.0
        parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)
    return replacement


def route(tokens: int, top_k: int, experts: int = EXPERTS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator)
    return hidden, index, weights


def reference(module: nn.Module, replacement: SharedCoreExperts, *inputs: Tensor) -> Tensor:
    """The original, eager, with the differentiable materialized weights."""
    parameters = {}
    for projection in replacement.projections:
        parameters[projection] = to_native(replacement.factors(projection).materialize(), module.is_transposed)
        bias = replacement.bias(projection)
        if bias is not None:
            parameters[f"{projection}_bias"] = bias
    return torch.func.functional_call(module, parameters, inputs)


def gradients(run: Callable[..., Tensor], replacement: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> Any:
    hidden, index, weights = inputs
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    replacement.zero_grad()
    out = run(hidden, index, weights)
    coefficients = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    (out * coefficients).sum().backward()
    found = {name: parameter.grad for name, parameter in replacement.named_parameters()}
    return out.detach(), found | {"hidden": hidden.grad, "weights": weights.grad}


def assert_same(module: nn.Module, replacement: SharedCoreExperts, inputs: Any, tolerance: float = 2e-5) -> None:
    out, found = gradients(replacement, replacement, inputs)
    expected_out, expected = gradients(lambda *given: reference(module, replacement, *given), replacement, inputs)
    torch.testing.assert_close(out, expected_out, rtol=tolerance, atol=tolerance * expected_out.abs().max().item())
    largest = max(value.abs().max().item() for value in expected.values() if value is not None and value.numel())
    for name, gradient in found.items():
        wanted = expected[name]
        if wanted is None:  # what the original never touched, such as an empty core
            assert gradient is None or not gradient.any(), name
            continue
        scale = max(wanted.abs().max().item(), 1e-2 * largest) if wanted.numel() else 1.0
        close = torch.isclose(gradient, wanted, rtol=tolerance, atol=tolerance * scale)
        assert close.all(), f"gradient of {name}: off by {(gradient - wanted).abs().max()}"
