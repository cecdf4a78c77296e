"""Decoding in fixed shapes: one graph, static caches, as CUDA graphs need it; run on a CPU, without code generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

from tests.modeling.test_experts import original, route, shared


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_compile_into_one_graph(tokens: int, dtype: torch.dtype) -> None:
    replacement = shared(original("gpt_oss", dtype))
    hidden, index, weights = route(tokens, 2)
    inputs = hidden.to(dtype), index, weights.to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(replacement, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), replacement(*inputs))


def test_generates_with_a_compiled_static_cache(
    tiny_model: Callable[..., Any], compressed: Callable[..., Any], ids: Tensor
) -> None:
    model = compressed(tiny_model("olmoe"), "delta").eval()
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids[:1], **arguments)
    compiling = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True  # Transformers compiles generation on GPUs only, unless told
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    static = model.generate(ids[:1], cache_implementation="static", compile_config=compiling, **arguments)
    assert torch.equal(static, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
