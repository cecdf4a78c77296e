"""Peak memory and time of `moe-compress compress` against depth and processes, and the closed form against Adam.

    python benchmarks/compression_scaling.py --output scaling.json      # the whole table, some 15 minutes on 2 cores
    python benchmarks/compression_scaling.py --tiny                     # a minute, to see that it runs

Checkpoints of random experts are generated (written layer by layer, so that this script needs no memory either), and
each compression runs in a process of its own, whose peak resident memory the system reports. The peak may not grow with
depth and has to stay below three times one layer's experts in fp32 plus what the interpreter and the libraries take,
which a process that only opens the model measures. Exits with 1 if it does not.

The time of a fit is in its iterations (by default of the product 5, of which each factorizes every expert once). The
rows that tell how memory goes with depth have one, so that they do not take an hour; one row has five.

The comparison with Adam is on fewer and smaller experts than the checkpoints have, as is said with its figures: Adam
takes minutes where the closed form takes a second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe_compress.compression.shards import tensor_source, write_shard
from moe_compress.factorization import FitSpec, fit
from moe_compress.files import write_json

TOP_K = 8


def main() -> int:
    options = _options()
    work = Path(tempfile.mkdtemp(prefix="scaling-", dir=options.directory))
    layer_bytes = 4 * options.experts * 3 * options.hidden * options.intermediate
    facts: dict[str, Any] = {
        "layer_bytes_fp32": layer_bytes,
        "settings": {key: str(value) for key, value in vars(options).items()},
        "runs": [],
    }
    try:
        for spec in options.runs:
            layers, ranks, iterations = map(int, spec.split(":"))
            model = work / f"model-{layers}"
            source_bytes = generate(model, layers, options)
            baseline = measured([sys.executable, "-m", "moe_compress", "plan", *settings(model, iterations, options)])
            run = work / "run"
            command = [sys.executable, "-m", "moe_compress", "compress", f"run={run}"]
            command += settings(model, iterations, options)
            if ranks > 1:
                command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            found = measured(command)
            row = {
                "layers": layers,
                "ranks": ranks,
                "iterations": iterations,
                "seconds": found["seconds"],
                "seconds_per_gb": found["seconds"] / (source_bytes / 1e9),
                "peak_bytes": found["peak_bytes"],
                "libraries_bytes": baseline["peak_bytes"],
                "layers_of_memory": (found["peak_bytes"] - baseline["peak_bytes"]) / layer_bytes,
            }
            facts["runs"].append(row)
            print(json.dumps(row), flush=True)
            shutil.rmtree(run)
            shutil.rmtree(model)
        facts["closed_form_against_adam"] = [closed_form_against_adam(options, cores) for cores in (0, 1)]
        print(json.dumps(facts["closed_form_against_adam"]), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.output:
        write_json(options.output, facts)
    print(table(facts))
    if options.tiny:  # what the libraries take varies by more than such a layer
        return 0
    failures = [f"{row['layers']} layers: {row['layers_of_memory']:.2f} layers of memory" for row in facts["runs"]
                if row["layers_of_memory"] >= 3]  # fmt: skip
    alone = {row["layers"]: row["peak_bytes"] for row in facts["runs"] if row["ranks"] == row["iterations"] == 1}
    if alone and max(alone.values()) > 1.05 * alone[min(alone)]:
        failures.append("the peak grows with depth")
    failures += [
        f"with {fits['cores']} cores the closed form is less than 20 times as fast as Adam"
        for fits in facts["closed_form_against_adam"]
        if fits["times_faster"] < 20
    ]
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def settings(model: Path, iterations: int, options: argparse.Namespace) -> list[str]:
    return [
        f"model={model}",
        f"compression.rank={options.rank}",
        f"compression.iterations={iterations}",
        "compression=weights_only",
        "compression.cores=1",  # so that there is something to iterate
        "compression.input_basis=0",
        "compression.device=cpu",
    ]


def generate(path: Path, layers: int, options: argparse.Namespace) -> int:
    """Write a random Qwen3-MoE in bfloat16, a shard per layer; returns the bytes of its tensors."""
    path.mkdir(parents=True)
    hidden, inner, vocabulary = options.hidden, options.intermediate, 1024
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
        "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": hidden // 8, "intermediate_size": inner,
        "moe_intermediate_size": inner, "num_experts": options.experts,
        "num_experts_per_tok": min(TOP_K, options.experts), "tie_word_embeddings": False,
    }  # fmt: skip
    write_json(path / "config.json", config)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(_shapes(layers, hidden, inner, vocabulary, options.experts)):
        file = f"model-{number:05d}.safetensors"
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(shape, dtype=torch.bfloat16).mul_(hidden**-0.5)
            for name, shape in shapes.items()
        }
        write_shard(path / file, {name: tensor_source(tensor) for name, tensor in tensors.items()})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _shapes(
    layers: int, hidden: int, inner: int, vocabulary: int, experts: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    yield {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_norm.weight": (hidden // 8,),
            f"{prefix}.self_attn.k_norm.weight": (hidden // 8,),
            f"{prefix}.mlp.gate.weight": (experts, hidden),
        }
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (hidden, hidden)
        for expert in range(experts):
            for name in ("gate_proj", "up_proj"):
                shapes[f"{prefix}.mlp.experts.{expert}.{name}.weight"] = (inner, hidden)
            shapes[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = (hidden, inner)
        yield shapes


_MEASURE = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(json.dumps([code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def measured(command: list[str]) -> dict[str, float]:
    """Run a command in a fresh process tree: its seconds, and the peak of its largest process in bytes."""
    start = time.monotonic()
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command], capture_output=True, text=True, env=environment, check=False
    )
    seconds = time.monotonic() - start
    code, kilobytes = json.loads(done.stdout) if done.returncode == 0 else (1, 0)
    if code:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return {"seconds": seconds, "peak_bytes": kilobytes * (1024 if sys.platform != "darwin" else 1)}


def closed_form_against_adam(options: argparse.Namespace, cores: int) -> dict[str, Any]:
    """Seconds of the closed form, and of Adam until it is as good, on one projection, without a core or with one.

    Adam is tried with twice the steps until its error is that of the closed form or `--adam-steps` are spent; the
    seconds are those of the last try alone.
    """
    torch.manual_seed(0)
    count, rows, columns = map(int, options.fit_shape)
    # Experts that share something, as trained ones do: on pure noise any method stops at the same error.
    weights = torch.randn(rows, columns) + 0.5 * torch.randn(count, rows, 16) @ torch.randn(count, 16, columns) / 4
    weights += 0.5 * torch.randn(count, rows, columns)

    def run(**changes: Any) -> tuple[float, float]:
        start = time.monotonic()
        spec = FitSpec(parameterization="delta", delta_rank=options.fit_rank, cores=cores, seed=0, **changes)
        return fit(weights, spec).relative_error, time.monotonic() - start

    error, seconds = run(method="closed_form", iterations=5)
    steps, adam_seconds, adam_error = min(25, options.adam_steps), 0.0, float("inf")
    while True:
        adam_error, adam_seconds = run(method="adam", num_steps=steps, lr=1e-2)
        if adam_error <= error * 1.001 or steps >= options.adam_steps:
            break
        steps = min(2 * steps, options.adam_steps)
    return {
        "shape": [count, rows, columns],
        "cores": cores,
        "delta_rank": options.fit_rank,
        "closed_form_seconds": seconds,
        "closed_form_error": error,
        "adam_seconds": adam_seconds,
        "adam_error": adam_error,
        "adam_steps": steps,
        "adam_reached_it": float(adam_error <= error * 1.001),
        "times_faster": adam_seconds / seconds,
    }


def table(facts: dict[str, Any]) -> str:
    """The table of docs/COMPRESSION.md, as Markdown."""
    lines = [
        "| layers | processes | iterations | s | s/GB | peak GB | libraries GB | (peak - libraries) / layer in fp32 |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in facts["runs"]:
        cells = [str(row[key]) for key in ("layers", "ranks", "iterations")]
        cells += [f"{row['seconds']:.0f}", f"{row['seconds_per_gb']:.0f}", f"{row['peak_bytes'] / 1e9:.2f}"]
        cells += [f"{row['libraries_bytes'] / 1e9:.2f}", f"{row['layers_of_memory']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    for fits in facts["closed_form_against_adam"]:
        reached = "to the same error" if fits["adam_reached_it"] else f"still above it after {fits['adam_steps']} steps"
        lines += [
            "",
            f"{fits['shape'][0]} experts of {fits['shape'][1]} x {fits['shape'][2]}, {fits['cores']} cores, delta rank "
            f"{fits['delta_rank']}. Closed form: {fits['closed_form_seconds']:.1f} s to error "
            f"{fits['closed_form_error']:.4f}; Adam: {fits['adam_seconds']:.1f} s to {fits['adam_error']:.4f} "
            f"({reached}): {fits['times_faster']:.0f} times the time.",
        ]
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, one run of each kind")
    parser.add_argument(
        "--runs",
        nargs="+",
        metavar="LAYERS:PROCESSES:ITERATIONS",
        default=["4:1:1", "8:1:1", "16:1:1", "8:2:1", "2:1:5"],
    )
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument(
        "--fit-shape", nargs=3, default=[8, 512, 512], metavar=("E", "OUT", "IN"), help="in the comparison with Adam"
    )
    parser.add_argument("--fit-rank", type=int, default=64, help="delta rank in the comparison with Adam")
    parser.add_argument("--adam-steps", type=int, default=3200)
    parser.add_argument("--directory", type=Path, default=None, help="where the checkpoints are generated")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures")
    options = parser.parse_args()
    if options.tiny:
        small = {"experts": 4, "hidden": 64, "intermediate": 32, "rank": 4, "adam_steps": 50}
        small |= {"fit_shape": [4, 64, 32], "fit_rank": 8, "runs": ["2:1:1", "3:1:1", "2:2:1"]}
        vars(options).update(small)
    return options


if __name__ == "__main__":
    sys.exit(main())
