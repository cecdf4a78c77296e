"""A run directory as the stages leave it, with made-up figures, complete or in part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_compress.config import Config
from moe_compress.evaluation.results import append_result, settings_fingerprint
from moe_compress.files import append_line, write_json
from moe_compress.run import Run

LAYERS = [f"model.layers.{number}.mlp.experts" for number in range(3)]
MakeRun = Callable[..., Run]


def record(config: Config, model: str, step: int, loss: float, **values: Any) -> dict[str, Any]:
    compressed = model != "teacher"
    return {
        "model": model,
        "step": step,
        "path": f"{'baseline_svd/' if model == 'svd' else ''}checkpoints/checkpoint-{step}",
        "settings": settings_fingerprint(config),
        "loss": loss,
        "stderr": 0.02,
        "perplexity": 2.718281828**loss,
        "perplexity_stderr": 0.05,
        "tokens": 3066,
        "sequences": 6,
        # spread over sequences far above the differences between models: only a paired comparison sees these
        "sequence_losses": [loss + offset for offset in (-0.5, -0.3, -0.1, 0.1, 0.3, 0.5)],
        "kl": 0.3 if compressed else None,
        "kl_stderr": 0.01 if compressed else None,
        "top1_agreement": 0.71 if compressed else None,
        "top1_stderr": 0.01 if compressed else None,
        "routing_agreement": 0.8 if compressed else None,
        "load_entropy": 0.95,
        "loop_rate": 0.25,
        "loop_stderr": 0.11,
        "loop_samples": 16,
        "repeat_rate": 0.3,
        "tasks": {
            "stdlib_next_line": {"acc": 0.41, "acc_stderr": 0.03, "acc_norm": 0.4, "few_shot": 0, "documents": 200},
            "wikitext": {"error": "ConnectionError: no network"},
        },
        "bytes": 9_000_000 if compressed else 21_000_000,
        "expert_bytes": 4_700_000 if compressed else 18_874_368,
        "parameters": 4_500_000 if compressed else 10_500_000,
        "active_parameters": 1_900_000 if compressed else 2_300_000,
        "routing": {layer: {"entropy": 0.95, "unused": 0, "agreement": 0.8} for layer in LAYERS},
        "seconds": 3.2,
        **values,
    }


def compression(error: float) -> dict[str, Any]:
    projection = {
        "relative_error": error, "data_error": error / 2, "delta_rank": 16, "cores": 1, "shape": [64, 128, 192],
        "bytes": 900_000, "bytes_before": 3_145_728,
    }  # fmt: skip
    keys = ("bytes", "expert_bytes", "parameters", "expert_parameters", "active_parameters", "flops_per_token")
    return {
        "model": "reference",
        "architecture": "OlmoeForCausalLM",
        "method": "closed_form",
        "parameterization": "delta",
        "alignment": "weights",
        "calibrated": True,
        "layers": {
            name: {"projections": {"gate_up_proj": projection, "down_proj": projection}, "load": [1] * 64}
            for name in LAYERS
        },
        "totals": {f"{key}_{when}": value for key in keys for when, value in (("before", 4000), ("after", 1000))},
    }


def speed() -> dict[str, Any]:
    def row(variant: str, tokens: int, ms: float, speedup: float) -> dict[str, Any]:
        return {
            "variant": variant,
            "tokens": tokens,
            "ms": ms,
            "ms_low": ms * 0.9,
            "ms_high": ms * 1.1,
            "speedup": speedup,
        }

    def model_row(variant: str, rate: float) -> dict[str, Any]:
        return {"variant": variant} | {
            f"{kind}{suffix}": value
            for kind in ("prefill", "decode")
            for suffix, value in (("", rate), ("_low", rate), ("_high", rate), ("_speedup", rate / 100))
        }

    rows = [
        row("original, eager", 1, 4.0, 0.5),
        row("original, grouped_mm", 1, 2.0, 1.0),
        row("moe-compress", 1, 1.0, 2.0),
    ]
    rows += [row("original, grouped_mm", 512, 20.0, 1.0), row("moe-compress", 512, 25.0, 0.8)]
    return {
        "machine": {"cpu": "Test CPU", "threads": 2, "gpus": [], "versions": {"torch": "2.13.0"}},
        "device": "cpu",
        "dtype": "bfloat16",
        "svd_values": "random",
        "layer": {"experts": 64, "top_k": 8, "hidden_size": 192, "intermediate_size": 64, "rows": rows},
        "model": {
            "prefill_tokens": 512,
            "decode_tokens": 32,
            "rows": [model_row("original, grouped_mm", 100.0), model_row("moe-compress", 150.0)],
        },
    }


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A function that makes a run; `core` and `svd` are the losses after distillation, None leaves the part out."""

    def make(core: float | None = 1.50, svd: float | None = 1.60, *, with_speed: bool = True, name: str = "run") -> Run:
        config = Config(experiment_name="<demo> & co")
        config.evaluation.prompt = "<script>alert('prompt')</script>"
        run = Run.create(tmp_path / name, config)
        write_json(run.path / "compression.json", compression(0.25))
        records = [record(config, "teacher", 0, 1.2), record(config, "student", 0, 2.0)]
        if core is not None:
            records += [record(config, "student", step, core + (50 - step) / 100) for step in (20, 50)]
            for step in range(10, 60, 10):
                line = {
                    "step": step,
                    "loss": 3 - step / 50,
                    "ce": 2.9 - step / 50,
                    "kl": 0.5,
                    "tokens_per_second": 900.0,
                }
                append_line(run.logs_dir / "train.jsonl", line)
        if svd is not None:
            write_json(run.path / "baseline_svd" / "compression.json", compression(0.35))
            records += [record(config, "svd", 0, 1.9), record(config, "svd", 50, svd)]
        for entry in records:
            append_result(run.evals_dir, entry)
        if with_speed:
            write_json(run.evals_dir / "speed.json", speed())
            samples = [
                {
                    "model": model,
                    "prompt": "def ",
                    "decoding": decoding,
                    "text": f"<b>{model}</b>(self):",
                    "repeat_rate": 0.25,
                }
                for model in ("teacher", "zero-shot", "distilled")
                for decoding in ("greedy", "temperature 0.3")
            ]
            write_json(run.evals_dir / "samples.json", {"made_from": "x", "samples": samples})
        return run

    return make


def read_json(run: Run) -> dict[str, Any]:
    return json.loads((run.path / "report.json").read_text(encoding="utf-8"))
