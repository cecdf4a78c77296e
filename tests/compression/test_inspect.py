"""The inspection: measures with known values, the routing's counts, and what it leaves on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moe_compress.cli import main
from moe_compress.compression.inspect import error_at, inspect, measure_layer
from moe_compress.compression.inspect_views import print_inspection, verdict
from moe_compress.config import Config
from moe_compress.factorization import FitSpec, Form, error_curve, fit, permute_neurons

Settings = Callable[..., Config]


def test_experts_that_are_permutations_share_everything_once_aligned() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(24, 16, generator=generator), torch.randn(16, 12, generator=generator)
    orders = torch.stack([torch.randperm(12, generator=generator) for _ in range(4)])
    gate_up, down_proj = permute_neurons(
        up.expand(4, -1, -1), down.expand(4, -1, -1), orders, interleaved=False, gates=2
    )
    facts = measure_layer({"gate_up_proj": gate_up, "down_proj": down_proj}, interleaved=False)
    for projection in facts.values():
        assert projection["core_energy_before"] < 0.5
        assert projection["core_energy_after"] == pytest.approx(1, abs=1e-5)
        assert projection["error_with_core"]["0.4"] < 1e-5 < 0.01 < projection["error_without_core"]["0.4"]


def test_measures_of_random_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"gate_up_proj": torch.randn(8, 32, 64, generator=generator)}
    weights["down_proj"] = torch.randn(8, 64, 16, generator=generator)
    facts = measure_layer(weights, interleaved=False)
    for name, projection in facts.items():
        assert projection["shape"] == list(weights[name].shape)
        assert projection["core_energy_before"] == pytest.approx(1 / 8, abs=0.02)
        assert projection["core_energy_after"] > projection["core_energy_before"]
        energy = list(projection["residual_energy"].values())
        assert energy == sorted(energy)
        assert energy[-1] == pytest.approx(1, abs=1e-5)
        assert projection["error_with_core"]["0.1"] is None  # the core alone is an eighth
        assert 0 < projection["error_without_core"]["0.5"] < projection["error_without_core"]["0.25"] < 1
    fitted = fit(weights["down_proj"], FitSpec(delta_rank=6, cores=0))
    curve = error_curve(weights["down_proj"], Form(0))
    six = 6 * (64 + 16) / (64 * 16)
    assert error_at(curve, (8, 64, 16), six, Form(0)) == pytest.approx(fitted.relative_error, rel=1e-3)
    assert error_at(curve, (8, 64, 16), six + 0.125, Form(1)) == pytest.approx(fitted.relative_error, rel=1e-3)
    assert error_at(curve, (8, 64, 16), six - 0.001, Form(0)) == pytest.approx(float(curve[5]))


@pytest.mark.parametrize("family", ["olmoe", "nemotron_h", "gpt_oss"])
def test_files_and_table(family: str, model_dir: Callable[[str], Path], settings: Settings, tmp_path: Path) -> None:
    config = settings(model_dir(family), calibrate=True)
    output = tmp_path / "seen"
    facts = inspect(config, output)
    assert json.loads((output / "inspection.json").read_text()) == facts
    plots = {f"{name}.{suffix}" for name in ("energy", "spectrum", "error", "load") for suffix in ("png", "svg")}
    assert {file.name for file in output.iterdir()} == plots | {"inspection.json"}
    assert all((output / name).stat().st_size > 1000 for name in plots)
    for layer in facts["layers"].values():
        assert sum(layer["load"]) == 10 * 32 * 2
        assert len(layer["load"]) == 8
    stream = io.StringIO()
    print_inspection(facts, Console(file=stream, width=160))
    for part in ("down_proj", "aligned", "25% of bytes", f"of {2 * len(facts['layers'])} projections"):
        assert part in stream.getvalue()
    assert not list(tmp_path.glob(".*"))


def test_verdict_counts() -> None:
    def projection(core: float | None, plain: float) -> dict[str, dict[str, float | None]]:
        ratios = ("0.1", "0.25", "0.5")
        return {
            "error_with_core": dict.fromkeys(ratios, core),
            "error_without_core": dict.fromkeys(ratios, plain),
        }

    layer = {"projections": {"a": projection(0.1, 0.2), "b": projection(0.3, 0.2), "c": projection(None, 0.2)}}
    assert "at 25% of the bytes in 1 of 3 projections" in verdict({"layers": {"x": layer}})
    assert "cores" not in verdict({"layers": {"x": layer}})
    layer["projections"]["c"]["error_with_4_cores"] = {"0.1": None, "0.25": 0.1, "0.5": 0.1}
    layer["projections"]["b"]["error_with_2_cores"] = {"0.1": 0.25, "0.25": 0.25, "0.5": 0.1}
    assert "Two or four cores leave less than both in 0, 1, 2 of 3." in verdict({"layers": {"x": layer}})


def test_command(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["inspect", str(model_dir("mixtral")), "compression.calibration.enabled=false"]
    assert main(arguments) == 0
    assert not (tmp_path / "inspection/load.png").exists()
    assert (tmp_path / "inspection/error.svg").exists()
    before = (tmp_path / "inspection/inspection.json").read_bytes()
    assert main(arguments) == 2
    assert "inspection exists already" in capsys.readouterr().err
    assert (tmp_path / "inspection/inspection.json").read_bytes() == before
    assert main([*arguments, "--output", "other"]) == 0
    assert (tmp_path / "other/inspection.json").exists()
    assert main(["plan", str(model_dir("mixtral")), "compression.rank=2"]) == 0
    assert "MixtralForCausalLM" in capsys.readouterr().out
