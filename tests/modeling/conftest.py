"""Tiny random models of seven architectures, and factors for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moe_compress  # noqa: F401
from moe_compress.factorization.factors import DeltaFactors, Factors, WrapperFactors
from moe_compress.modeling import compress_in_memory, cpu_kernel, expert_weights, find_experts

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 32, 16, 4, 2
_COMMON = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": TOP_K,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS},
    "qwen2_moe": {
        "intermediate_size": 24,
        "moe_intermediate_size": INTERMEDIATE,
        "shared_expert_intermediate_size": 24,
        "num_experts": EXPERTS,
    },
    "qwen3_moe": {"intermediate_size": 24, "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS},
    "olmoe": {"intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "tie_word_embeddings": True},
    "deepseek_v3": {
        "intermediate_size": 24,
        "moe_intermediate_size": INTERMEDIATE,
        "n_routed_experts": EXPERTS,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "head_dim": 4,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {
        "intermediate_size": INTERMEDIATE,
        "num_local_experts": EXPERTS,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "granitemoe": {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS},
}
VARIANTS = ("delta", "no_core", "basis", "wrapper")  # and "grouped", with two cores, where a test asks for it


def _tiny_model(architecture: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    config = AutoConfig.for_model(architecture, **(_COMMON | ARCHITECTURES[architecture] | overrides))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # routers start at zero and biases may: every part must matter
            parameter.normal_(std=0.3) if parameter.dim() == 1 else parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def _random_factors(shape: tuple[int, int, int], variant: str, rank: int = 8, seed: int = 0) -> Factors:
    experts, out_features, in_features = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * in_features**-0.5

    if variant == "wrapper":
        sides = [normal(experts, size, rank // 2) for size in (out_features, out_features, in_features, in_features)]
        return WrapperFactors(normal(out_features, in_features), *sides)
    cores = {"delta": 1, "no_core": 0, "grouped": 2, "basis": 0}[variant]
    core = normal(cores * out_features, in_features) if cores else None
    groups = torch.arange(experts) % 2 if variant == "grouped" else None
    if variant == "basis":
        size = max(rank, in_features // 2)
        deltas = normal(experts, out_features, rank), 3 * normal(experts, rank, size)
        return DeltaFactors(core, *deltas, basis=normal(size, in_features))
    return DeltaFactors(core, normal(experts, out_features, rank), normal(experts, rank, in_features), groups)


def _compressed(model: Any, variant: str, rank: int = 8) -> Any:
    results = {
        facts.name: {
            projection: _random_factors(shape, variant, rank, seed=layer)
            for projection, shape in facts.projections.items()
        }
        for layer, facts in enumerate(find_experts(model))
    }
    return compress_in_memory(model, results)


def _exact_factors(model: Any) -> dict[str, dict[str, Factors]]:
    results: dict[str, dict[str, Factors]] = {}
    for facts in find_experts(model):
        results[facts.name] = {}
        for projection, weight in expert_weights(facts.module).items():
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            results[facts.name][projection] = DeltaFactors(None, left * values.unsqueeze(1), right)
    return results


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """`tiny_model(architecture, dtype, **config)`: a seeded random model in evaluation mode."""
    return _tiny_model


@pytest.fixture(scope="session")
def random_factors() -> Callable[..., Factors]:
    """`random_factors((E, out, in), variant, rank, seed)`."""
    return _random_factors


@pytest.fixture(scope="session")
def compressed() -> Callable[..., Any]:
    """`compressed(model, variant, rank)`: the model with random factors in place of its experts."""
    return _compressed


@pytest.fixture(scope="session")
def exact_factors() -> Callable[[Any], dict[str, dict[str, Factors]]]:
    """`exact_factors(model)`: full-rank factors without a core, which equal the model's experts."""
    return _exact_factors


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return request.param


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """Each form of the factors in turn."""
    return request.param


@pytest.fixture(scope="session")
def all_saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A compressed checkpoint of every architecture and variant; not to be changed, copy it first."""
    root = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for name in ARCHITECTURES:
        for kind in VARIANTS:
            paths[name, kind] = root / f"{name}-{kind}"
            _compressed(_tiny_model(name), kind).save_pretrained(paths[name, kind])
    return paths


@pytest.fixture
def saved(all_saved: dict[tuple[str, str], Path], architecture: str, variant: str) -> Path:
    """The compressed checkpoint of this architecture and variant."""
    return all_saved[architecture, variant]


@pytest.fixture
def by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways of PyTorch's operations, also where the CPU kernel would be taken."""
    monkeypatch.setattr(cpu_kernel, "takes", lambda *_: False)


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Token ids [2, 7], some of them repeated."""
    return torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
