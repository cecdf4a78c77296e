"""The folded forward pass equals the original experts with materialized weights, in values and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compress.errors import UserError
from moe_compress.factorization.factors import DeltaFactors, WrapperFactors
from moe_compress.modeling import cpu_kernel, expert_mm, experts, grouped_mm, onednn
from moe_compress.modeling.experts import SharedCoreExperts
from tests.modeling.one_layer import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    KINDS,
    PATHS,
    assert_same,
    gradients,
    original,
    reference,
    route,
    shared,
)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways through the factors; by row, that is by bags without a gradient and by gathering with one."""
    force(request.param, monkeypatch)
    return request.param


def force(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernel, "takes", lambda *_: False)
    monkeypatch.setattr(experts, "by_row", lambda *_: path == "by row")
    monkeypatch.setattr(experts, "rows_per_gemm", lambda *_: 2 if path == "batched" else 0)
    if path == "by row":
        monkeypatch.setattr(expert_mm, "grouped_mm", lambda *_: pytest.fail("grouped_mm was used"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("parameterization", "cores"), [("delta", 1), ("delta", 0), ("wrapper", 1)])
def test_equals_materialized_experts(kind: str, parameterization: str, cores: int, path: str) -> None:
    module = original(kind)
    assert_same(module, shared(module, parameterization, cores), route(7, 2))


@pytest.mark.parametrize("top_k", [1, EXPERTS])
@pytest.mark.parametrize("tokens", [1, 6])
def test_one_expert_and_all_experts(tokens: int, top_k: int, path: str) -> None:
    module = original("gpt_oss")
    assert_same(module, shared(module), route(tokens, top_k))


def test_an_expert_without_a_token(path: str) -> None:
    module = original("gated")
    replacement = shared(module)
    inputs = route(6, 2, experts=EXPERTS - 2)
    assert_same(module, replacement, inputs)
    replacement(*inputs).sum().backward()
    assert not replacement.down_proj_delta_in.grad[EXPERTS - 2 :].any()


def test_no_token(path: str) -> None:
    hidden, index, weights = route(3, 2)
    assert shared(original("gated"))(hidden[:0], index[:0], weights[:0]).shape == (0, HIDDEN)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    parameterization=st.sampled_from(["delta", "wrapper"]),
    path=st.sampled_from(PATHS),
    tokens=st.integers(1, 9),
    top_k=st.integers(1, EXPERTS),
    rank=st.sampled_from([2, 4, 6, 8, 10]),
    seed=st.integers(0, 1000),
)
def test_equals_materialized_experts_always(
    kind: str, parameterization: str, path: str, tokens: int, top_k: int, rank: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        force(path, monkeypatch)
        module = original(kind)
        assert_same(module, shared(module, parameterization, 1, rank, seed), route(tokens, top_k, seed=seed), 1e-4)


@pytest.mark.parametrize("rank", [3, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_rank_and_dtype(dtype: torch.dtype, rank: int, path: str) -> None:
    module = original("gated", torch.float64)
    exact = shared(module, rank=rank)
    hidden, index, weights = route(8, 3)
    inputs = (hidden.to(dtype), index, weights.to(dtype))
    expected_out, expected = gradients(exact, exact, (inputs[0].double(), index, inputs[2].double()))
    rounded = shared(original("gated", dtype), rank=rank)
    for name, parameter in rounded.named_parameters():
        parameter.data = exact.get_parameter(name).data.to(dtype)
    out, found = gradients(rounded, rounded, inputs)
    with torch.no_grad():
        found["quiet"], expected["quiet"] = rounded(*inputs), expected_out
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for value, wanted in [(out, expected_out), *((found[name], expected[name]) for name in found)]:
        assert value.dtype == dtype
        assert torch.linalg.vector_norm(value.double() - wanted) <= tolerance * torch.linalg.vector_norm(wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parameterization", ["delta", "wrapper"])
def test_autocast_computes_in_bf16_and_differentiates_in_fp32(kind: str, parameterization: str, path: str) -> None:
    replacement = shared(original(kind), parameterization)
    inputs = route(8, 2)
    expected_out, expected = gradients(replacement, replacement, inputs)

    def run(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return replacement(*given)

    out, found = gradients(run, replacement, inputs)
    assert not torch.equal(out, expected_out)  # it did compute in bf16
    for name, value in {"out": out, **found}.items():
        wanted = expected_out if name == "out" else expected[name]
        assert value.dtype == torch.float32
        assert torch.linalg.vector_norm(value - wanted) <= 6e-2 * torch.linalg.vector_norm(wanted), name


def test_autocast_reaches_the_grouped_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not among the operations that autocast casts by itself."""
    force("grouped", monkeypatch)
    seen = set()

    def spy(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        seen.update({rows.dtype, weight.dtype})
        return grouped_mm(rows, weight, offsets)

    grouped_mm = expert_mm.grouped_mm
    monkeypatch.setattr(expert_mm, "grouped_mm", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shared(original("gated"))(*route(4, 2))
    assert seen == {torch.bfloat16}


def test_a_gate_that_autocast_leaves_in_fp32(path: str) -> None:
    """On a GPU autocast computes powers in fp32, such as the square in Nemotron's activation."""

    class Squared(torch.nn.Module):
        def forward(self, inner: Tensor) -> Tensor:
            return inner.float().relu() ** 2

    replacement = shared(original("no_gate"))
    inputs = route(4, 2)
    expected = replacement(*inputs).detach()
    replacement.act_fn = Squared()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        replacement(*inputs).sum().backward()
        with torch.no_grad():
            out = replacement(*inputs)
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


def test_autocast_accepts_16_bit_activations(path: str) -> None:
    hidden, index, weights = route(4, 2)
    replacement = shared(original("gated"))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = replacement(hidden.bfloat16(), index, weights.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), replacement(hidden, index, weights).detach(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("parameterization", "cores"), [("delta", 1), ("delta", 0), ("wrapper", 1)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_no_grad_gives_the_same_values(kind: str, parameterization: str, cores: int, tokens: int, path: str) -> None:
    replacement = shared(original(kind), parameterization, cores, rank=6)
    hidden, index, weights = route(tokens, 3)
    index[0, 1] = EXPERTS  # padding
    inputs = hidden, index, weights
    with torch.no_grad():
        quiet = replacement(*inputs)
    assert not quiet.requires_grad
    loud = replacement(*inputs).detach()
    torch.testing.assert_close(quiet, loud, rtol=1e-4, atol=1e-5 * loud.abs().max().item())


def test_weights_in_fp32_keep_the_dtype_of_the_activations(path: str) -> None:
    hidden, index, weights = route(5, 2)
    out = shared(original("gated", torch.bfloat16))(hidden.bfloat16(), index, weights)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_padding_adds_nothing(kind: str, path: str) -> None:
    module = original(kind)
    replacement = shared(module)
    hidden, index, weights = route(6, 3)
    padded = torch.zeros(6, 3, dtype=torch.bool)
    padded[0, 1] = padded[3, 0] = padded[3, 2] = True
    out, found = gradients(replacement, replacement, (hidden, index.masked_fill(padded, EXPERTS), weights))
    # The eager original stands for padding by a weight of zero (that of GPT-OSS knows no padding index).
    expected_out, expected = gradients(
        lambda *given: reference(module, replacement, *given),
        replacement,
        (hidden, index, weights.masked_fill(padded, 0)),
    )
    torch.testing.assert_close(out, expected_out, rtol=1e-4, atol=1e-4)
    assert not found.pop("weights")[padded].any()
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-4), name


def test_a_padding_token_may_hold_nan(path: str) -> None:
    replacement = shared(original("gpt_oss"))
    hidden, index, weights = route(5, 2)
    hidden[2] = float("nan")
    index[2] = EXPERTS
    out, found = gradients(replacement, replacement, (hidden, index, weights))
    assert not out[2].any()
    assert out.isfinite().all()
    for name, value in found.items():
        assert value.isfinite().all(), name


def test_padding_is_not_sent_through_an_expert(path: str) -> None:
    """Here any expert that the token was not routed to would overflow, and infinity times zero is not a number."""
    replacement = shared(original("gated", torch.float16))
    with torch.no_grad():
        for name in ("gate_up_proj_delta_in", "gate_up_proj_delta_out"):
            replacement.get_parameter(name)[1:] = 6e4
    hidden, _, weights = route(4, 2)
    index = torch.tensor([[0, EXPERTS]] * 4)
    out, found = gradients(replacement, replacement, (hidden.half(), index, weights.half()))
    assert out.isfinite().all()
    for name, value in found.items():
        assert value.isfinite().all(), name


def test_the_forward_pass_never_waits_for_the_device() -> None:
    """On the meta device reading a value raises; so would a loop over experts or a synchronization."""
    module = original("gpt_oss", torch.bfloat16).to("meta")
    for parameterization in ("delta", "wrapper"):
        layout = {name: {"delta_rank": 8, "cores": 1} for name in ("gate_up_proj", "down_proj")}
        replacement = SharedCoreExperts(module, layout, parameterization)  # type: ignore[arg-type]
        hidden = torch.empty(7, HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True)
        index = torch.empty(7, 2, dtype=torch.long, device="meta")
        for path in ("grouped", "by row"):
            with pytest.MonkeyPatch.context() as monkeypatch:
                force(path, monkeypatch)
                out = replacement(hidden, index, torch.empty(7, 2, dtype=torch.bfloat16, device="meta"))
            assert out.shape == (7, HIDDEN)


def test_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    force("grouped", monkeypatch)
    replacement = shared(original("gpt_oss", torch.bfloat16), "wrapper", rank=8)
    hidden, index, weights = route(6, 2)
    inputs = (hidden.bfloat16(), index, weights.bfloat16())
    torch._dynamo.reset()
    compiled = torch.compile(replacement, backend="eager", fullgraph=True)
    out, found = gradients(compiled, replacement, inputs)
    expected_out, expected = gradients(replacement, replacement, inputs)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(found, expected)


def test_the_core_multiplies_each_token_once() -> None:
    """The point of the folded form: the multiplications of the cores do not grow with k."""
    replacement = shared(original("gated"))
    from torch.utils.flop_counter import FlopCounterMode

    def core_flops(top_k: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            replacement(*route(4, top_k))
        return counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    cores = sum(replacement.get_parameter(name).numel() for name in replacement.projections)
    assert core_flops(1) == core_flops(EXPERTS) == 2 * 4 * cores


def test_few_rows_are_multiplied_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(4, 16, 8)
    # Where GEMMs of few rows are slow: the larger the matrices, the fewer. Elsewhere (MKL on its maker's CPUs, 16-bit
    # types that AMX multiplies): up to two for each expert.
    sizes = [torch.zeros(8, 1, 1).expand(-1, side, side) for side in (16, 512, 1024, 4096)]
    with torch.no_grad():
        for slow, expected in ((True, [32, 16, 8, 2]), (False, [2, 2, 2, 2])):
            monkeypatch.setattr(onednn, "MKL_AT_HOME", not slow)
            assert expert_mm.by_row(4, weight) and not expert_mm.by_row(400, weight)
            most = [max(rows for rows in range(40) if expert_mm.by_row(8 * rows, size)) for size in sizes]
            assert most == expected
        monkeypatch.setattr(onednn, "_SUPPORTED", {torch.float16: False})
        for amx, expected in ((True, [2, 2, 2, 2]), (False, [32, 16, 8, 2])):
            monkeypatch.setattr(expert_mm, "_AMX", amx)
            halves = {dtype: [size.to(dtype) for size in sizes] for dtype in (torch.bfloat16, torch.float16)}
            most = {
                dtype: [max(rows for rows in range(40) if expert_mm.by_row(8 * rows, size)) for size in of_dtype]
                for dtype, of_dtype in halves.items()
            }
            assert most == {torch.bfloat16: expected, torch.float16: [32, 16, 8, 2]}
    assert not expert_mm.by_row(4, weight)  # with a gradient, on a CPU
    assert expert_mm.by_row(4, weight.to("meta"))
    assert not expert_mm.by_row(2**20, weight.to("meta"))


def test_decoding_reads_only_the_chosen_experts(path: str) -> None:
    replacement = shared(original("gated"))
    hidden, index, weights = route(1, 2, experts=EXPERTS - 2)
    with torch.no_grad():
        expected = replacement(hidden, index, weights)
        for name, parameter in replacement.named_parameters():
            if "delta" in name:
                parameter[EXPERTS - 2 :] = float("nan")
        torch.testing.assert_close(replacement(hidden, index, weights), expected)


def test_grouped_mm_takes_an_expanded_gradient() -> None:
    rows, weight = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, 4, requires_grad=True)
    grouped_mm.grouped_mm(rows, weight, torch.tensor([1, 4], dtype=torch.int32)).sum().backward()
    torch.testing.assert_close(rows.grad, weight.detach().sum(2)[[0, 1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_fold_keeps_the_function(kind: str, dtype: torch.dtype) -> None:
    replacement = shared(original(kind, dtype), "wrapper")
    hidden, index, weights = route(6, 2)
    inputs = (hidden.to(dtype), index, weights.to(dtype))
    before = replacement(*inputs).detach()
    dense = {name: replacement.materialize(name) for name in replacement.projections}
    assert replacement.fold_() is replacement
    assert replacement.parameterization == "delta"
    assert isinstance(replacement.factors("down_proj"), DeltaFactors)
    assert not any("_u_" in name or "_v_" in name for name, _ in replacement.named_parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    scale = before.abs().max().item()
    torch.testing.assert_close(replacement(*inputs).detach(), before, rtol=tolerance, atol=tolerance * scale)
    for name, weight in dense.items():
        torch.testing.assert_close(
            replacement.materialize(name), weight, rtol=tolerance, atol=tolerance * weight.abs().max().item()
        )
    replacement(*inputs).sum().backward()
    assert replacement.down_proj_delta_in.grad.any()


def test_empty_cores_survive_training() -> None:
    replacement = shared(original("gated"), cores=0).requires_grad_(True)
    optimizer = torch.optim.AdamW(replacement.parameters(), lr=0.1)
    before = replacement.down_proj_delta_in.detach().clone()
    replacement(*route(4, 2)).sum().backward()
    assert {name for name, parameter in replacement.named_parameters() if parameter.grad is None} == {
        "gate_up_proj",
        "down_proj",
    }
    assert torch.nn.utils.clip_grad_norm_(replacement.parameters(), 1.0).isfinite()
    optimizer.step()
    assert replacement.down_proj.shape == (0, INTERMEDIATE)
    assert not torch.equal(before, replacement.down_proj_delta_in)


def test_a_deep_copy_is_independent() -> None:
    replacement = shared(original("gpt_oss"))
    twin = copy.deepcopy(replacement)
    inputs = route(3, 2)
    expected = replacement(*inputs)
    with torch.no_grad():
        replacement.down_proj.zero_()
    assert torch.equal(twin(*inputs), expected)


@pytest.mark.parametrize(("parameterization", "cores"), [("delta", 1), ("delta", 0), ("wrapper", 1)])
def test_parameters_may_be_kept_elsewhere(parameterization: str, cores: int) -> None:
    """`DataParallel`, which the Trainer uses on several GPUs without torchrun, has plain tensors in its replicas; PEFT
    computes a parameter that it adapts from two."""
    replacement = shared(original("gpt_oss"), parameterization, cores)
    inputs = route(3, 2)
    expected, shown = replacement(*inputs), replacement.extra_repr()
    replica: Any = replacement._replicate_for_data_parallel()
    for name, parameter in replacement.named_parameters():
        setattr(replica, name, parameter * 1)
    assert torch.equal(replica(*inputs), expected)
    for name, _ in list(replacement.named_parameters()):
        torch.nn.utils.parametrize.register_parametrization(replacement, name, torch.nn.Identity())
    assert torch.equal(replacement(*inputs), expected)
    assert replacement.extra_repr() == shown


def test_factors_of_other_shapes_are_refused() -> None:
    replacement = shared(original("gated"))
    good = replacement.factors("down_proj")
    with pytest.raises(UserError, match="down_proj_delta_out: factors of shape"):
        replacement.load_factors("down_proj", DeltaFactors(good.core, good.delta_out[:, :, :2], good.delta_in[:, :2]))
    sides = [torch.zeros(EXPERTS, size, 2) for size in (HIDDEN, HIDDEN, INTERMEDIATE, INTERMEDIATE)]
    with pytest.raises(UserError, match="none expected"):
        replacement.load_factors("down_proj", WrapperFactors(torch.zeros(HIDDEN, INTERMEDIATE), *sides))
    with pytest.raises(UserError, match="has the projections"):
        SharedCoreExperts(original("no_gate"), {"gate_up_proj": {"delta_rank": 2, "cores": 1}})
