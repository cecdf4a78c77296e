"""The tiny OLMoE that the tests of the quality benchmark compress."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import OlmoeConfig


@pytest.fixture(scope="session")
def tiny_olmoe() -> Callable[..., OlmoeConfig]:
    """Makes the configuration: two layers of 8 experts, top-2, hidden 32, and whatever fields are given."""

    def make(**fields: Any) -> OlmoeConfig:
        return OlmoeConfig(
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=8,
            num_experts_per_tok=2,
            pad_token_id=0,
            **fields,
        )

    return make
