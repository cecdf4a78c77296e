"""Timing machinery: who is called when, what is compared with what; never how fast anything is."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from transformers import OlmoeConfig

from moe_compress.cli import main
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.evaluation import bench as bench_module
from moe_compress.evaluation import model_speed as model_module
from moe_compress.evaluation import roofline, timing
from moe_compress.evaluation import speed as speed_module
from moe_compress.evaluation.bench import bench_layers, bench_model
from moe_compress.evaluation.layer_forms import random_layer
from moe_compress.evaluation.memory import allocated_by
from moe_compress.evaluation.model_speed import model_speed
from moe_compress.evaluation.roofline import Rates, Work, layer_work
from moe_compress.evaluation.speed import Variant, layer_inputs, layer_speed, original_variants
from moe_compress.evaluation.speed_tables import Grid, break_even_lines, conditions, layer_grid
from moe_compress.evaluation.timing import time_interleaved
from moe_compress.evaluation.variants import CORE, OURS, SVD
from moe_compress.modeling import find_experts

from .conftest import make_model, mean_core

LAYOUT = {name: {"delta_rank": 12, "cores": 1} for name in ("gate_up_proj", "down_proj")}
CPU = torch.device("cpu")
CONDITIONS = {"machine": {"cpu": "a CPU", "threads": 1, "versions": {}}, "device": "cpu", "dtype": "float32"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "_MOST_CALLS", 1)
    monkeypatch.setattr(speed_module, "_MOST_COPIES", 2)
    monkeypatch.setattr(roofline, "_COPIED_BYTES", 2**10)
    monkeypatch.setattr(roofline, "_GEMM_SIZE", 16)


def test_rounds_are_interleaved_and_rotate():
    calls: list[tuple[str, int]] = []
    names = {name: (lambda number, name=name: calls.append((name, number))) for name in "abc"}
    timings = time_interleaved(names, CPU, seconds=0, least_rounds=4)
    warm, rounds = calls[:6], calls[6:]
    assert {name for name, _ in warm} == set("abc")
    assert ["".join(name for name, _ in rounds[i : i + 3]) for i in range(0, 12, 3)] == ["abc", "bca", "cab", "abc"]
    assert [number for _, number in rounds] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert all(entry.samples == 4 and entry.low <= entry.median <= entry.high for entry in timings.values())


def test_the_median_is_of_the_samples(monkeypatch):
    samples = iter([0.0, 1.0, 5.0, 1.0, 2.0, 3.0, 9.0])  # two of the warm-up, five rounds
    monkeypatch.setattr(timing, "_sample", lambda *_: next(samples))
    (result,) = time_interleaved({"a": lambda _: None}, CPU, seconds=0, least_rounds=5).values()
    assert (result.low, result.median, result.high) == (2.0, 3.0, 5.0)


def test_every_original_implementation_computes_the_layer():
    experts = find_experts(make_model())[0].module
    inputs = layer_inputs(5, 32, 8, 2, dtype=torch.float32, device=CPU, seed=3)
    with torch.no_grad():
        expected = experts(inputs.hidden, inputs.index, inputs.weights)
        outputs = {
            name: variant(0, inputs.hidden, inputs.index, inputs.weights)
            for name, variant in original_variants([experts], 5, 2).items()
        }
    assert list(outputs) == ["original, eager", "original, grouped_mm", "original, batched_mm"]
    for output in outputs.values():
        torch.testing.assert_close(output, expected)
    assert "original, batched_mm" not in original_variants([experts], 17, 2)


def test_inputs_are_routed_like_a_router_does():
    inputs = layer_inputs(50, 32, 8, 3, dtype=torch.float32, device=CPU, seed=3)
    assert inputs.index.shape == inputs.weights.shape == (50, 3)
    assert all(len(set(row.tolist())) == 3 for row in inputs.index)
    torch.testing.assert_close(inputs.weights.sum(-1), torch.ones(50))
    assert set(inputs.index.flatten().tolist()) == set(range(8))


@pytest.fixture
def fixed_times(monkeypatch):
    """Every variant takes a time that is known: the compressed ones less than any original."""

    def fixed(calls, device, **_):
        for call in calls.values():
            call(0)
        seconds = {"original, eager": 8.0, "original, grouped_mm": 4.0, "original, batched_mm": 6.0, OURS: 2.0}
        times = {name: seconds.get(name, 3.0) for name in calls}
        return {name: timing.Timing(each, each / 2, each * 2, 3) for name, each in times.items()}

    for module in (speed_module, model_module):
        monkeypatch.setattr(module, "time_interleaved", fixed)


def test_layer_speed_compares_with_the_fastest_original(fixed_times):
    original = find_experts(make_model())[0].module
    rows = layer_speed(original, {OURS: random_layer(original, LAYOUT)}, top_k=2, tokens=(1, 40))
    assert {(row["tokens"], row["variant"]): row["speedup"] for row in rows} == {
        (1, "original, eager"): 0.5, (1, "original, grouped_mm"): 1.0, (1, "original, batched_mm"): 4 / 6,
        (1, OURS): 2.0,
        (40, "original, eager"): 0.5, (40, "original, grouped_mm"): 1.0, (40, OURS): 2.0,
    }  # fmt: skip
    assert [rows[0][key] for key in ("ms", "ms_low", "ms_high", "samples")] == [8000, 4000, 16000, 3]


def test_small_layers_are_timed_as_copies_in_turn(monkeypatch):
    seen: dict[int, int] = {}
    layer = torch.nn.Linear(1, 1)
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, *_: seen.update({id(self): len(seen)}))
    copies = speed_module._copies(layer)
    for number in range(4):
        Variant(copies)(number, *(torch.zeros(0),) * 3)
    assert len(seen) == 2 and id(layer) in seen
    monkeypatch.setattr(speed_module, "_COLD_BYTES", 8)
    assert len(speed_module._copies(layer)) == 1  # as large as it needs to be


def test_training_is_timed_with_all_gradients_and_its_memory_measured(fixed_times):
    original = find_experts(make_model())[0].module
    layer = random_layer(original, LAYOUT)
    rows = layer_speed(original, {OURS: layer}, top_k=2, tokens=(40,), training=True)
    assert [row["variant"] for row in rows] == ["original, grouped_mm", OURS]
    gradients = {id(module): sum(p.nbytes for p in module.parameters()) for module in (original, layer)}
    for row, module in zip(rows, (original, layer), strict=True):
        assert 0 < row["kept_bytes"] < row["peak_bytes"]
        assert row["peak_bytes"] >= gradients[id(module)]


def test_work_counts_the_core_once_and_each_chosen_expert():
    original = find_experts(make_model())[0].module
    core = random_layer(original, LAYOUT)
    index = torch.tensor([[0, 1], [1, 2], [1, 0]])
    up, down = (core.factors(name).core.numel() for name in core.projections)
    deltas = sum(p[0].numel() for name, p in core.named_parameters() if "delta" in name)
    assert layer_work(core, index) == Work(4 * (up + down + 3 * deltas), 2 * 3 * (up + down + 2 * deltas))
    each = sum(p[0].numel() for p in original.parameters())
    assert layer_work(original, index) == Work(4 * 3 * each, 2 * 3 * 2 * each)
    assert Work(100, 30).seconds(Rates(10.0, 10.0)) == 10
    assert Work(100, 300).seconds(Rates(10.0, 10.0)) == 30


def test_work_counts_a_basis_once():
    original = find_experts(make_model())[0].module
    layout = {"gate_up_proj": {"delta_rank": 8, "cores": 0, "basis": 10}, "down_proj": {"delta_rank": 8, "cores": 0}}
    layer = random_layer(original, layout)
    basis, deltas = 10 * 32, 8 * (10 + 32) + 8 * (16 + 32)
    found = layer_work(layer, torch.tensor([[0, 1], [1, 2], [1, 0]]))
    assert found == Work(4 * (basis + 3 * deltas), 2 * 3 * (basis + 2 * deltas))


def test_allocations_are_followed():
    def call():
        scratch = torch.ones(1000, 1000)
        return torch.ones(1000) + scratch[0]

    found = allocated_by(call, CPU)
    assert found.kept == 4000 and 4_004_000 <= found.peak < 4_100_000


def bench_tiny_layers(count):
    """The figures of `count` equal layers, benched as one, at wrapper rank 4."""
    model_config = OlmoeConfig(
        vocab_size=11, hidden_size=64, intermediate_size=32, num_hidden_layers=count, num_attention_heads=2,
        num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    config = Config()
    config.compression.rank, config.compression.target_ratio, config.compression.cores = 4, None, 1
    (layer,) = bench_layers(model_config, None, config, torch.float32, CPU, tokens=(2,), seconds=0)
    return layer


def test_the_rank_at_which_a_layer_is_as_fast(fixed_times):
    layer = bench_tiny_layers(count=1)
    rows = {row["variant"]: row for row in layer["rows"]}
    # Twice as fast with cores of 6144 and deltas of 2 * 8 * (128 + 96): it may count twice as many multiply-adds.
    assert rows[OURS]["faster_below"] == {"gate_up_proj": 29, "down_proj": 29}
    assert break_even_lines(layer) == [
        "2 tokens: 2.00x, faster than the fastest original; "
        "break-even at about delta rank gate_up_proj 29, down_proj 29."
    ]
    assert not any("slower" in cell for row in layer_grid(layer, CONDITIONS).rows for cell in row)
    rows[OURS] |= {"speedup": 0.5, "faster_below": {"gate_up_proj": 3, "down_proj": 2}}
    grid = {row[0]: row[1:] for row in layer_grid(layer, CONDITIONS).rows}
    (cell,) = grid[f"{OURS}, {layer['kept'][OURS]:.1%} of the bytes"]
    assert cell.endswith("slower; break-even at about delta rank gate_up_proj 3, down_proj 2")
    rows[OURS]["faster_below"]["down_proj"] = 0
    assert break_even_lines(layer) == ["2 tokens: 0.50x, slower than the fastest original; slower at any rank."]


def test_the_rank_at_which_a_basis_is_as_fast(fixed_times):
    layer = bench_tiny_layers(count=1)
    name = "shared basis H/3"  # of 20 (not 21.3) directions, rounded to 16
    up, down = (layer["layouts"][name][each] for each in ("gate_up_proj", "down_proj"))
    assert up["basis"] == 16
    (row,) = (row for row in layer["rows"] if row["variant"] == name)
    # Every token meets the basis of 16 * 64 once; two experts' deltas read 16 and 32 inputs, and write 64 each.
    shared, deltas = 16 * 64, 2 * (up["delta_rank"] * (64 + 16) + down["delta_rank"] * (64 + 32))
    scale = ((shared + deltas) * row["speedup"] - shared) / deltas
    assert row["faster_below"] == {
        "gate_up_proj": int(scale * up["delta_rank"]), "down_proj": int(scale * down["delta_rank"]),
    }  # fmt: skip
    row["faster_below"]["gate_up_proj"] = 17
    assert "faster at any rank that its basis allows" in break_even_lines(layer, name)[0]


def test_grids_are_markdown():
    grid = Grid("Title", "Caption.", ["1 token"], [["core", "1  2.00x\n(1-2)"]])
    assert grid.markdown().splitlines() == [
        "**Title**", "", "|  | 1 token |", "|---|---:|", "| core | 1  2.00x; (1-2) |", "", "Caption.",
    ]  # fmt: skip


def test_model_speed_is_tokens_per_second(fixed_times):
    original = make_model()
    speed = model_speed(original, {OURS: mean_core(make_model())}, prefill_tokens=40, decode_tokens=3)
    core = next(row for row in speed["rows"] if row["variant"] == OURS)
    weights, peak = core.pop("weight_bytes"), core.pop("peak_bytes")
    assert weights < peak < 10 * weights
    assert core == {
        "variant": OURS, "prefill": 20.0, "prefill_low": 10.0, "prefill_high": 40.0, "prefill_speedup": 2.0,
        "decode": 1.5, "decode_low": 0.75, "decode_high": 3.0, "decode_speedup": 2.0,
    }  # fmt: skip


def test_model_speed_leaves_the_model_as_it_was():
    original = make_model()
    before = original.config._experts_implementation
    speed = model_speed(original, {OURS: mean_core(make_model())}, prefill_tokens=40, decode_tokens=3, seconds=0)
    assert original.config._experts_implementation == before
    rows = {row["variant"]: row for row in speed["rows"]}
    assert list(rows) == ["original, eager", "original, grouped_mm", "original, batched_mm", OURS]
    assert "prefill" not in rows["original, batched_mm"]


def test_a_layer_is_timed_from_its_configuration_alone():
    layer = bench_tiny_layers(count=3)
    assert (layer["count"], layer["experts"], layer["top_k"]) == (3, 4, 2)
    assert layer["layouts"][OURS]["down_proj"] == {"delta_rank": 8, "cores": 1}
    kept = sum(rows * columns + 4 * 8 * (rows + columns) for rows, columns in ((64, 64), (64, 32)))
    assert layer["kept"][OURS] == pytest.approx(kept / (4 * (64 * 64 + 64 * 32)))
    variants = {row["variant"] for row in layer["rows"]}
    assert variants > {OURS, SVD, "shared basis H/2", "original, eager"}
    assert CORE not in variants  # which is what it is
    assert all(kept <= layer["kept"][OURS] for kept in layer["kept"].values())


@pytest.mark.parametrize("compressed", [False, True])
def test_bench_prints_writes_and_returns_tables(config, student_dir, tmp_path, capsys, monkeypatch, compressed):
    for name in ("layer_speed", "model_speed"):
        function = getattr(bench_module, name)
        monkeypatch.setattr(
            bench_module, name, lambda *args, function=function, **kwargs: function(*args, **kwargs | {"seconds": 0})
        )
    config.compression.rank, config.compression.cores = 4, 1
    if compressed:
        config.distillation.teacher.model_path, config.model.name = config.model.name, str(student_dir)
    found = bench_model(config, tmp_path / "speed")
    assert json.loads((tmp_path / "speed/speed.json").read_text()) == json.loads(json.dumps(found))
    assert "| moe-compress |" in (tmp_path / "speed/speed.md").read_text()
    assert found["layers"][0]["layouts"][OURS]["down_proj"]["delta_rank"] == 8
    printed = capsys.readouterr().out
    assert "per-expert SVD" in printed and "Whole model" in printed and f"{torch.get_num_threads()} thread" in printed
    assert {row["variant"] for row in found["model"]["rows"]} > {OURS, "original, grouped_mm"}


def test_the_roofline_is_of_the_same_rounds(monkeypatch):
    """The copy and the GEMM are timed among the variants, for each number of tokens, and are no variant."""
    timed = []

    def spy(calls, *args, **kwargs):
        timed.append(set(calls))
        return time_interleaved(calls, *args, **kwargs)

    monkeypatch.setattr(speed_module, "time_interleaved", spy)
    (facts, *_) = find_experts(make_model())
    original = facts.module
    rows = layer_speed(original, {}, top_k=2, tokens=(1, 3), seconds=0, roofline=True)
    assert all({"copy", "gemm", "original, eager"} <= calls for calls in timed) and len(timed) == 2
    assert {row["variant"] for row in rows} == {"original, eager", "original, grouped_mm", "original, batched_mm"}
    rates = {row["tokens"]: row["rates"] for row in rows}
    assert all(row["rates"] == rates[row["tokens"]] for row in rows)
    inputs = [
        layer_inputs(3, facts.hidden_size, facts.num_experts, 2, dtype=torch.float32, device=CPU, seed=seed)
        for seed in range(speed_module._INPUTS)
    ]
    least = sum(layer_work(original, each.index).seconds(Rates(**rates[3])) for each in inputs) / len(inputs)
    assert rows[-1]["roofline_ms"] == pytest.approx(1e3 * least)


def test_rates_are_those_of_the_quartile():
    timings = {name: timing.Timing(9.0, low, 9.0, 5) for name, low in (("copy", 2.0), ("gemm", 4.0))}
    assert roofline.rates_of(timings) == Rates(2 * 2**10 / 2.0, 2 * 16**3 / 4.0)


def test_bench_of_a_compressed_model_finds_the_teacher_in_its_run(make_run):
    run = make_run(0)
    assert bench_module._teacher_of(run.path / "checkpoints" / "checkpoint-0") is None  # a link to elsewhere
    (run.path / "checkpoints" / "checkpoint-9").mkdir()
    assert bench_module._teacher_of(run.path / "checkpoints" / "checkpoint-9") == run.config.model.name


def test_the_command_runs(tmp_path, capsys, monkeypatch):
    make_model().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(bench_module, "layer_speed", partial(layer_speed, seconds=0))
    monkeypatch.setattr(bench_module, "_whole_models", lambda *_, **__: None)
    assert main(["bench", str(tmp_path / "model"), "compression.rank=4"]) == 0
    assert "grouped_mm" in capsys.readouterr().out


def test_bench_refusals(config, tmp_path):
    config.model.name = str(tmp_path)
    with pytest.raises(UserError, match="no configuration"):
        bench_model(config)


def test_what_was_measured_without_the_kernel_says_so():
    words = ", without the CPU kernel"
    assert words in conditions(CONDITIONS | {"cpu_kernel": False})
    assert words not in conditions(CONDITIONS | {"cpu_kernel": True})
    assert words not in conditions(CONDITIONS)  # of before there was one
