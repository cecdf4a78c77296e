"""The speed benchmark at tiny sizes: every part, what is written, and the tables made of it; never how fast it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import speed
from moe_compress.evaluation import roofline, timing
from moe_compress.evaluation import speed as layer_speed

TINY = (8, 2, 32, 16, 4)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that runs the script with tiny shapes, and returns what it wrote."""
    monkeypatch.setattr(speed, "SHAPES", dict.fromkeys(speed.SHAPES, TINY))
    monkeypatch.setattr(speed, "WORDS", 64)
    monkeypatch.setattr(roofline, "_COPIED_BYTES", 2**10)
    monkeypatch.setattr(roofline, "_GEMM_SIZE", 16)
    monkeypatch.setattr(timing, "_MOST_CALLS", 1)
    monkeypatch.setattr(layer_speed, "_MOST_COPIES", 1)

    def call(*arguments: str) -> dict[str, Any]:
        output = tmp_path / "speed"
        quick = ["--seconds", "0", "--rounds", "1", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["speed.py", *quick, *arguments])
        speed.main()
        found: dict[str, Any] = json.loads((output / "speed.json").read_text())
        return found

    return call


def test_layers_and_training(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--dtypes", "float32", "--tokens", "1", "20", "--ratios", "0.5", "0.3", "0.02"]
    found = run("--parts", "olmoe", "training", *settings)
    forward, training = found["results"]
    assert (forward["part"], training["part"]) == ("olmoe", "training")
    assert "kept_bytes" in training["rows"][0] and "kept_bytes" not in forward["rows"][0]
    for result in found["results"]:
        for form in speed.FORMS:
            assert result["kept"][f"{form} at 0.5"] <= 0.5 and result["kept"][f"{form} at 0.3"] <= 0.3
        assert len(result["unreachable"]) == len(speed.FORMS)  # 2 % is less than a rank of 1
    assert "shared core: not at 2.00% of the bytes of olmoe" in capsys.readouterr().out
    text = (tmp_path / "speed/speed.md").read_text()
    assert f"| shared core, {forward['kept']['shared core at 0.3']:.1%} of the bytes |" in text
    assert "**Forward and backward: olmoe: 8 experts" in text


def test_whole_models_with_layers_and_words_in_proportion(run: Any) -> None:
    (result,) = run("--parts", "models", "--forms", "per-expert SVD", "--tokens", "20", "--ratios", "0.5")["results"]
    assert result["title"] == "2 of 4 layers of olmoe with random values, 32 words"
    assert {row["variant"] for row in result["rows"]} > {"per-expert SVD at 0.5", "original, grouped_mm"}
    assert 0.4 < result["kept"]["per-expert SVD at 0.5"] <= 0.5


def test_a_layer_is_cut_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    part, cpu = speed.Part(("olmoe",), ratios=(0.5,)), torch.device("cpu")
    one = 3 * 2048 * 1024 * 4  # bytes of an expert; 1.2 * (1 + 1.3 * 6 forms * 0.5) = 5.88 times that is needed
    monkeypatch.setattr(speed, "free_bytes", lambda _: 64 * 6 * one)
    assert speed.fitting_experts("olmoe", part, torch.float32, cpu, False) == (64, "olmoe")
    cut = 32, "olmoe with 32 of its 64 experts"
    assert speed.fitting_experts("olmoe", part, torch.float32, cpu, True) == cut  # room for gradients
    monkeypatch.setattr(speed, "free_bytes", lambda _: 0)
    assert speed.fitting_experts("olmoe", part, torch.float32, cpu, False)[0] == 16  # more than a token goes to


def layer_result(ms: dict[str, float]) -> dict[str, Any]:
    rows = [
        {"tokens": tokens, "variant": name, "ms": own, "ms_low": own, "ms_high": own, "speedup": 7 / own}
        | {"roofline_ms": 1.0, "faster_below": {"down_proj": 9}}
        for tokens in speed.BAR_TOKENS
        for name, own in ms.items()
    ]
    return {
        "part": "olmoe", "shape": "olmoe", "module": "olmoe", "dtype": "float32", "device": "cpu", "rows": rows,
        "machine": {"cpu": "a CPU", "threads": 2, "versions": {}}, "experts": 64, "top_k": 8, "hidden_size": 2048,
        "intermediate_size": 1024, "kept": {name: 0.2 for name in ms if " at " in name},
        "layouts": {name: {"down_proj": {"delta_rank": 10, "cores": 1}} for name in ms if " at " in name},
    }  # fmt: skip


def test_tables_of_earlier_runs_go_into_a_document(run: Any, tmp_path: Path) -> None:
    times = {
        "original, eager": 8.0,
        "original, grouped_mm": 7.0,
        "shared core at 0.25": 2.0,
        "shared core at 0.125": 7.5,
    }
    (tmp_path / "a.json").write_text(json.dumps({"results": [layer_result(times)]}))
    (tmp_path / "b.json").write_text(json.dumps({"results": [layer_result(times) | {"dtype": "bfloat16"}]}))
    document = tmp_path / "SPEED.md"
    document.write_text(f"before\n{speed.BEGIN}\nold\n{speed.END}\nafter\n")
    run("--tables", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--docs", str(document))
    text = document.read_text()
    assert text.startswith(f"before\n{speed.BEGIN}\n") and text.endswith(f"\n{speed.END}\nafter\n")
    assert "old" not in text
    assert "| bfloat16, 1 token: shared core | 7.0 (grouped_mm) | 3.50x met | 0.93x missed | not timed |" in text
    assert (
        "| float32, 512 tokens: shared core | 7.0 (grouped_mm) | 3.50x met, 2.00 times the roofline | "
        "0.93x missed, 7.50 times the roofline | not timed |"
    ) in text
    assert "7.5  0.93x  13%; (7.5-7.5); slower; break-even at about delta rank down_proj 9" in text
    again = document.read_text()
    run("--tables", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--docs", str(document))
    assert document.read_text() == again
    document.write_text("no place")
    with pytest.raises(SystemExit, match="has no place"):
        run("--tables", str(tmp_path / "a.json"), "--docs", str(document))


def test_a_run_without_a_share_that_has_a_bar_is_not_held_against_them() -> None:
    results = [layer_result({"original, eager": 8.0, f"shared core at {ratio}": 2.0}) for ratio in (0.5, 0.25)]
    assert speed.bar_grids(results[:1]) == []
    (grid,) = speed.bar_grids(results)
    assert len(grid.rows) == len(speed.BAR_TOKENS) * len(speed.FORMS)
