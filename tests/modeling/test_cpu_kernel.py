"""The CPU kernel of compressed layers: the same as the materialized experts, taken where it should be, built once."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moe_compress.modeling import cpu_kernel
from moe_compress.modeling.cpu_kernel import build
from moe_compress.modeling.experts import SharedCoreExperts
from tests.modeling.one_layer import EXPERTS, KINDS, original, reference, route, shared
from tests.modeling.test_cores import grouped

needs_kernel = pytest.mark.skipif(cpu_kernel.multiplied_type(torch.float32) is None, reason="no kernel here")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of the kernel, whether it computed the gate."""
    seen: list[bool] = []
    forward = cpu_kernel.forward

    def spy(*given: Any) -> Tensor:
        seen.append(given[-1] is None)
        return forward(*given)

    monkeypatch.setattr(cpu_kernel, "forward", spy)
    return seen


@pytest.fixture(params=[1, 2, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Numbers of threads, also more than there are experts."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def layer(
    cores: int, rank: int, basis: int = 0, hidden: int = 40, intermediate: int = 24, experts: int = EXPERTS
) -> tuple[nn.Module, SharedCoreExperts]:
    """A gated layer with SiLU, and one in place of it whose up projection may read a basis."""
    config = OlmoeConfig(hidden_size=hidden, intermediate_size=intermediate, num_experts=experts)
    config._experts_implementation = "eager"
    module = OlmoeExperts(config)
    layout: Any = {
        "gate_up_proj": {"delta_rank": rank, "cores": cores} | ({"basis": basis} if basis else {}),
        "down_proj": {"delta_rank": rank + 1, "cores": cores},
    }
    replacement = SharedCoreExperts(module, layout)
    generator = torch.Generator().manual_seed(0)
    for parameter in replacement.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * max(1, parameter.shape[-1]) ** -0.5
    return module, replacement


def routed(
    tokens: int, top_k: int, hidden: int, experts: int = EXPERTS, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    _, index, weights = route(tokens, top_k, experts, seed)
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)), index, weights


def assert_kernel_is_exact(
    module: nn.Module,
    replacement: SharedCoreExperts,
    inputs: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    slack: float = 1.0,
) -> None:
    """Against the materialized weights, in fp64 and of the values that are rounded to the type."""
    hidden, index, weights = inputs
    hidden, weights = hidden.to(dtype), weights.to(dtype)
    with torch.no_grad():
        rounded = replacement.to(dtype)
        found = rounded(hidden, index, weights)
        padding = index >= EXPERTS  # which the eager original does not know
        index, weights = index.masked_fill(padding, 0), weights.masked_fill(padding, 0.0)
        exact = reference(module.double(), rounded.double(), hidden.double(), index, weights.double())
    assert found.dtype == dtype
    info = torch.finfo(dtype)
    least = 2 * info.tiny * info.eps * found.numel()  # what values below the smallest normal one are rounded to
    assert torch.linalg.vector_norm(found - exact) <= slack * TOLERANCE[dtype] * torch.linalg.vector_norm(exact) + least


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 2, 9, 150])
@pytest.mark.parametrize(("cores", "basis"), [(0, 0), (1, 0), (0, 17), (1, 17)])
def test_equals_materialized_experts(
    cores: int, basis: int, tokens: int, dtype: torch.dtype, threads: int, calls: list[bool]
) -> None:
    module, replacement = layer(cores, 7, basis)
    assert_kernel_is_exact(module, replacement, routed(tokens, 2, 40), dtype)
    assert calls == [True]


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [3, 120])
@pytest.mark.parametrize("cores", [0, 1])
@pytest.mark.parametrize("kind", ["gated", "no_gate", "transposed"])
def test_any_gate(kind: str, cores: int, tokens: int, dtype: torch.dtype, calls: list[bool]) -> None:
    module = original(kind)
    if kind == "gated":
        module.act_fn = nn.GELU()
    replacement = shared(module, cores=cores)
    assert_kernel_is_exact(module, replacement, route(tokens, 3), dtype)
    assert calls == [kind == "transposed"]


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sizes_beyond_every_block(dtype: torch.dtype, threads: int) -> None:
    """More rows of an expert, columns, values of a matrix and sums than are taken at a time."""
    module, replacement = layer(1, 150, 530, hidden=600, intermediate=300, experts=3)
    hidden, index, weights = routed(700, 2, 600, experts=3)
    index[5:600, 0], index[5:600, 1] = 1, 2
    assert_kernel_is_exact(module, replacement, (hidden, index, weights), dtype)


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 24])  # below and above 12 rows of an expert
def test_few_rows_of_wide_matrices(tokens: int, dtype: torch.dtype) -> None:
    """More columns than some rows take at a time, whole lines or not."""
    module, replacement = layer(0, 29, 75, hidden=1701, intermediate=1607, experts=3)
    hidden, index, weights = routed(tokens, 2, 1701, experts=3)
    assert_kernel_is_exact(module, replacement, (hidden, index, weights), dtype)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What the process knows of the kernel, before the test and after it."""
    kernel = (build.library, cpu_kernel.multiplied_type)
    for cached in kernel:
        cached.cache_clear()
    yield
    for cached in kernel:
        cached.cache_clear()


@pytest.fixture
def products_of_onednn(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel as it is on CPUs without AVX-512."""
    monkeypatch.setenv("CXX", f"{os.environ.get('CXX') or 'g++'} -DWITHOUT_TILES")


@needs_kernel
@pytest.mark.usefixtures("products_of_onednn")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 9, 150, 700])
@pytest.mark.parametrize(("cores", "basis"), [(0, 0), (1, 17)])
def test_products_of_onednn(cores: int, basis: int, tokens: int, dtype: torch.dtype, calls: list[bool]) -> None:
    module, replacement = layer(cores, 7, basis)
    assert_kernel_is_exact(module, replacement, routed(tokens, 2, 40), dtype)
    assert calls == [True]


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_token_may_have_an_expert_twice(dtype: torch.dtype) -> None:
    module, replacement = layer(0, 7)
    hidden, index, weights = routed(60, 3, 40)
    index[:, 1] = index[:, 0]
    assert_kernel_is_exact(module, replacement, (hidden, index, weights), dtype)


@needs_kernel
@settings(max_examples=100, deadline=None)
@given(
    tokens=st.integers(1, 60),
    top_k=st.integers(1, EXPERTS),
    rank=st.integers(1, 40),
    basis=st.sampled_from([0, 9, 33]),
    sizes=st.tuples(st.integers(34, 90), st.integers(42, 90)),
    cores=st.integers(0, 1),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)
def test_equals_materialized_experts_always(
    tokens: int, top_k: int, rank: int, basis: int, sizes: tuple[int, int], cores: int, dtype: torch.dtype, seed: int
) -> None:
    # The values of one or two ranks may all be small sums of large terms, whose rounding to 16 bits counts.
    rank = rank if dtype == torch.float32 else max(rank, 4)
    module, replacement = layer(cores, min(rank, basis or rank), basis, *sizes)
    hidden, index, weights = routed(tokens, top_k, sizes[0], seed=seed)
    index = torch.where(torch.rand(index.shape, generator=torch.Generator().manual_seed(seed)) < 0.1, EXPERTS, index)
    # Of one row the roundings do not cancel, and the gate multiplies them.
    assert_kernel_is_exact(module, replacement, (hidden, index, weights), dtype, slack=4)


@needs_kernel
@pytest.mark.parametrize("kind", ["transposed", "no_gate"])
@pytest.mark.parametrize("cores", [0, 1])
def test_padding_adds_nothing_whatever_it_holds(cores: int, kind: str) -> None:
    replacement = shared(original(kind), cores=cores)
    hidden, index, weights = route(8, 2)
    index[0], hidden[0], weights[0] = EXPERTS, float("nan"), float("inf")
    index[1, 1], weights[1, 1] = EXPERTS + 3, float("nan")
    with torch.no_grad():
        out = replacement(hidden, index, weights)
        alone = replacement(hidden[1:2], index[1:2, :1], weights[1:2, :1])
    assert not out[0].any() and out.isfinite().all()
    torch.testing.assert_close(out[1:2], alone)


@needs_kernel
def test_nothing_but_padding() -> None:
    hidden, index, weights = route(4, 2)
    with torch.no_grad():
        assert not shared(original("transposed"))(hidden, torch.full_like(index, EXPERTS), weights).any()


@needs_kernel
def test_what_is_not_finite_stays_where_it_is() -> None:
    """NaN and infinity of one token reach that token alone, and are not hidden by the gate."""
    _, replacement = layer(0, 6)
    hidden, index, weights = routed(30, 2, 40)
    with torch.no_grad():
        before = replacement(hidden, index, weights)
        hidden[3, 0], hidden[4, 0] = float("nan"), float("inf")
        after = replacement(hidden, index, weights)
    assert after[3].isnan().all() and not after[4].isfinite().any()
    others = [token for token in range(30) if token not in (3, 4)]
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)


@needs_kernel
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_the_gate_saturates(scale: float) -> None:
    module, replacement = layer(1, 6)
    hidden, index, weights = routed(40, 2, 40)
    assert_kernel_is_exact(module, replacement, (hidden * scale, index, weights), torch.float32)


@needs_kernel
def test_any_strides(calls: list[bool]) -> None:
    _, replacement = layer(0, 6)
    hidden, index, weights = routed(20, 2, 40)
    with torch.no_grad():
        expected = replacement(hidden, index, weights)
        found = replacement(hidden.T.contiguous().T, index.T.contiguous().T, weights.T.contiguous().T)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(calls) == 2


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [20, 200])
def test_the_sum_does_not_depend_on_the_threads(tokens: int, dtype: torch.dtype) -> None:
    _, replacement = layer(0, 13)
    replacement.to(dtype)
    hidden, index, weights = routed(tokens, 2, 40)
    inputs = hidden.to(dtype), index, weights.to(dtype)
    before, found = torch.get_num_threads(), []
    with torch.no_grad():
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(replacement(*inputs))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_kernel
def test_not_where_pytorch_is_needed(calls: list[bool]) -> None:
    replacement = shared(original("transposed"))
    inputs = route(6, 2)
    replacement(*inputs)  # a gradient may be wanted
    with torch.no_grad():
        torch.compile(replacement, fullgraph=True, backend="eager")(*inputs)
        replacement.double()(inputs[0].double(), *inputs[1:])
        shared(original("gpt_oss"))(*inputs)  # has biases
        grouped(original("transposed"))(*inputs)  # has two cores
        assert not calls
        with torch.autocast("cpu", dtype=torch.bfloat16):
            replacement.float()(*inputs)
    assert calls


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapper_is_folded(kind: str) -> None:
    module = original(kind)
    replacement = shared(module, "wrapper")
    inputs = route(9, 2)
    with torch.no_grad():
        expected = reference(module, replacement, *inputs)
        torch.testing.assert_close(replacement(*inputs), expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())


@pytest.fixture
def fresh(forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that has not asked for the kernel yet."""
    if not build._written_for_this():
        pytest.skip("another system or CPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MOE_COMPRESS_CPU_KERNEL", raising=False)
    return tmp_path / "moe-compress" / "cpu_kernel"


def test_where_there_is_a_compiler_there_is_a_kernel(fresh: Path) -> None:
    """Without which a kernel that does not compile would only skip the tests above."""
    if shutil.which(os.environ.get("CXX") or "g++") is None:
        pytest.skip("no compiler")
    assert build.library() is not None and cpu_kernel.multiplied_type(torch.float32) == torch.float32


@needs_kernel
def test_is_built_once_and_found_again(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(build.library(), ctypes.CDLL)
    (kept,) = fresh.iterdir()
    made = kept.stat().st_mtime_ns
    build.library.cache_clear()
    assert isinstance(build.library(), ctypes.CDLL)
    assert [kept] == list(fresh.iterdir()) and kept.stat().st_mtime_ns == made
    build.library.cache_clear()
    monkeypatch.setattr(build, "_COMPILE", (*build._COMPILE, "-DOTHER"))
    build.library()
    assert len(list(fresh.iterdir())) == 2


@pytest.mark.parametrize("reason", ["not wanted", "no compiler"])
def test_without_it_pytorch_computes(reason: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv(
        *{"not wanted": ("MOE_COMPRESS_CPU_KERNEL", "0"), "no compiler": ("CXX", "/nowhere/g++")}[reason]
    )
    module = original("transposed")
    replacement, inputs = shared(module), route(5, 2)
    with torch.no_grad():
        torch.testing.assert_close(replacement(*inputs), reference(module, replacement, *inputs), rtol=1e-4, atol=1e-4)
    assert build.library() is None and not fresh.exists() and not caplog.records


@pytest.mark.parametrize("script", ["echo 'no such flag' >&2; exit 1", "touch ${@: -1}"])
def test_a_compiler_that_fails_is_named_once(
    script: str, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text(f'#!/bin/bash\n[ "$1" = --version ] && exit 0\n{script}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    replacement, inputs = shared(original("transposed")), route(5, 2)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        replacement(*inputs)
        replacement(*inputs)
    (record,) = caplog.records
    assert "could not be built" in record.message and "MOE_COMPRESS_CPU_KERNEL=0" in record.message
    assert "no such flag" in record.message or "file too short" in record.message
