"""Speed side by side: MoE layers of known models, and whole models, original against compressed; see docs/SPEED.md.

    python benchmarks/speed.py --output speed                                  # everything; hours on 2 cores
    python benchmarks/speed.py --shapes olmoe --ratios 0.25 0.125 --tokens 1 16 512 --dtypes bfloat16 --models

Layers have random weights: the original under each implementation of Transformers, the shared core, and per-expert SVD
factors of the same bytes, interleaved in one run, with the roofline of this machine beside them. A layer too large for
the memory is timed with fewer experts, and said to be. `moe-compress bench` does the same for a model of yours.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, OlmoeConfig

from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.evaluation.bench import bench_layers, break_even_lines, random_student
from moe_compress.evaluation.machine import describe_machine, free_bytes
from moe_compress.evaluation.model_speed import model_speed
from moe_compress.evaluation.roofline import measure_rates
from moe_compress.evaluation.speed import CORE
from moe_compress.evaluation.speed_tables import Grid, layer_grids, model_grid, write_speed
from moe_compress.modeling import load_model

# experts, experts per token, hidden size, intermediate size
SHAPES = {
    "reference": (64, 8, 192, 64),
    "olmoe": (64, 8, 2048, 1024),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "deepseek-v3": (256, 8, 7168, 2048),
}
MODELS = ("reference", "olmoe")


def main() -> None:
    """Time what the command line selects, print a table for each, and write all of them."""
    options = _options()
    console = Console()
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"machine": describe_machine(), "device": str(device), "results": []}
    grids: list[Grid] = []

    def keep(result: dict[str, Any], new: list[Grid], lines: list[str]) -> None:
        found["results"].append(result)
        grids.extend(new)
        for grid in new:
            console.print(grid.rich())
        console.print(*lines, sep="\n", highlight=False)
        if options.output:  # after each, so that an interrupted run leaves what it has
            write_speed(options.output, found, grids)

    for name in options.dtypes:
        dtype = getattr(torch, name)
        rates = measure_rates(dtype, device)
        facts = {**found, "dtype": name, "rates": vars(rates)}
        for shape in options.shapes:
            experts, label = fitting_experts(shape, dtype, device)
            for ratio in options.ratios:
                config = Config()
                config.compression.target_ratio = ratio
                try:
                    (layer,) = bench_layers(
                        layer_config(shape, experts), None, config, dtype, device, tokens=options.tokens,
                        training=options.training, seconds=options.seconds, rates=rates,
                    )  # fmt: skip
                except UserError as error:
                    console.print(f"{label}, {name}, {ratio:.2%} of the bytes: {error}", highlight=False)
                    continue
                layer["module"] = label
                kind = {"shape": shape, "dtype": name, "ratio": ratio, "rates": vars(rates)}
                keep({**kind, **layer}, layer_grids(layer, facts), break_even_lines(layer))
        for model in options.models:
            for ratio in options.ratios:
                try:
                    speed = whole_model(model, ratio, dtype, device, options)
                except UserError as error:
                    console.print(f"{model}, {name}, {ratio:.2%} of the bytes: {error}", highlight=False)
                    continue
                title = f"{model}, {ratio:.2%} of the expert bytes"
                keep({"model": model, "dtype": name, "ratio": ratio, **speed}, [model_grid(speed, facts, title)], [])


def layer_config(shape: str, experts: int, **changes: Any) -> OlmoeConfig:
    """A configuration with one MoE layer of a shape; the class stands for any gated experts."""
    _, top_k, hidden, intermediate = SHAPES[shape]
    sizes = {"num_hidden_layers": 1, "hidden_size": hidden, "intermediate_size": intermediate, **changes}
    return OlmoeConfig(num_experts=experts, num_experts_per_tok=top_k, **sizes)


def fitting_experts(shape: str, dtype: torch.dtype, device: torch.device) -> tuple[int, str]:
    """The number of experts to time: halved until three times their bytes are free; and a name that says so."""
    experts, top_k, hidden, intermediate = SHAPES[shape]
    count = experts
    while count > 2 * top_k and 3 * count * 3 * hidden * intermediate * dtype.itemsize > free_bytes(device):
        count //= 2
    return count, shape if count == experts else f"{shape} with {count} of its {experts} experts"


def whole_model(
    name: str, ratio: float, dtype: torch.dtype, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Time the reference MoE, or a random model with the layers of OLMoE, but fewer of them."""
    config = Config()
    config.compression.target_ratio = ratio
    if name == "reference":
        original = load_model("reference", dtype=dtype, device=device)
    else:
        experts, *_ = SHAPES[name]
        torch.manual_seed(0)
        with torch.device(device):
            original = AutoModelForCausalLM.from_config(
                layer_config(name, experts, num_hidden_layers=options.layers, vocab_size=50304), dtype=dtype
            ).eval()
    with torch.device(device):
        student = random_student(original, config)
    return {"layers": original.config.num_hidden_layers} | model_speed(
        original, {CORE: student}, prefill_tokens=512, decode_tokens=32, seconds=options.seconds * 3
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=[s for s in SHAPES if s != "reference"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.25, 0.125, 0.0625], help="share of bytes")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 512, 2048], help="tokens per call")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--training", nargs="*", type=int, default=[512], help="tokens of forward and backward")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS, help="whole models to time")
    parser.add_argument("--layers", type=int, default=2, help="layers of the random whole model")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to spend per table column")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="directory for speed.json and speed.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
