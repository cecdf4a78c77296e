"""One MoE layer, side by side: the original under every implementation, the shared core, per-expert SVD.

    python benchmarks/layer_speed.py --shape olmoe --kept 0.25 0.125 --tokens 1 16 512 --dtype float32 bfloat16

Weights are random, so that the shapes of any model can be timed; the timing is that of `moe-compress bench`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from transformers import OlmoeConfig

from moe_compress.config import Config
from moe_compress.evaluation.bench import bench_layers, layer_table
from moe_compress.evaluation.machine import describe_machine
from moe_compress.files import write_json

# experts, experts per token, hidden size, intermediate size
SHAPES = {
    "reference": (64, 8, 192, 64),
    "olmoe": (64, 8, 2048, 1024),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
}


def main() -> None:
    """Time the shapes, shares and types of the command line and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["olmoe"])
    parser.add_argument("--kept", nargs="+", type=float, default=[0.25], help="share of the expert bytes to keep")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["bfloat16"])
    parser.add_argument("--seconds", type=float, default=3.0, help="time to spend per number of tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    console = Console()
    results = []
    for shape in options.shape:
        experts, top_k, hidden, intermediate = SHAPES[shape]
        model_config = OlmoeConfig(
            num_hidden_layers=1,
            num_experts=experts,
            num_experts_per_tok=top_k,
            hidden_size=hidden,
            intermediate_size=intermediate,
        )
        for dtype in options.dtype:
            for kept in options.kept:
                config = Config()
                config.compression.target_ratio = kept
                (layer,) = bench_layers(
                    model_config,
                    None,
                    config,
                    getattr(torch, dtype),
                    torch.device(options.device),
                    tokens=options.tokens,
                    seconds=options.seconds,
                )
                found = {"machine": describe_machine(), "device": options.device, "dtype": dtype}
                console.print(layer_table({**layer, "module": shape}, found))
                results.append({"shape": shape, **found, **layer})
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
