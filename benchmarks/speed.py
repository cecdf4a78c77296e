"""Speed side by side: MoE layers of known models, and whole models, original against compressed; see docs/SPEED.md.

    python benchmarks/speed.py --output speed                             # everything: about 13 minutes on 2 cores
    python benchmarks/speed.py --parts olmoe --dtypes bfloat16 --tokens 1 16 --output speed     # or in pieces
    python benchmarks/speed.py --tables speed/speed.json --docs docs/SPEED.md   # the tables again, and into a document

Layers have random values. The original under each implementation of Transformers and every form of a compressed layer
(shared core, per-expert SVD, shared bases) at every share of the bytes are interleaved in one run, with the roofline of
this machine beside them. A layer too large for the memory is timed with fewer experts, and said to be.
`moe-compress bench` does the same for a model of yours.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, OlmoeConfig

from moe_compress.allocator import give_back_freed_memory, keep_freed_memory
from moe_compress.errors import UserError
from moe_compress.evaluation.bench import describe_conditions, meta_model, time_layer
from moe_compress.evaluation.layer_forms import FORMS, random_student, same_ratio_layouts
from moe_compress.evaluation.machine import free_bytes
from moe_compress.evaluation.model_speed import model_speed
from moe_compress.evaluation.speed_tables import Grid, break_even_lines, layer_grid, model_grid, variant_at, write_speed
from moe_compress.files import put_between
from moe_compress.modeling import find_experts, load_model

# experts, experts per token, hidden size, intermediate size, layers
SHAPES = {
    "reference": (64, 8, 192, 64, 4),
    "olmoe": (64, 8, 2048, 1024, 16),
    "qwen3-30b-a3b": (128, 8, 2048, 768, 48),
    "mixtral-8x7b": (8, 2, 4096, 14336, 32),
    "deepseek-v3": (256, 8, 7168, 2048, 58),
}
WORDS = 50304  # of OLMoE
# Issue 6: what the count of multiply-adds and bytes allows of OLMoE's layer, less a fifth; by share of the bytes.
BARS = {0.25: 2.3, 0.125: 3.5, 0.0625: 4.6}
BAR_TOKENS = (1, 16, 512)
# Read when a process starts. Without it oneDNN forgets bf16 kernels that the many forms of one run need in turn, which
# a single model does not.
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "65536"}
BEGIN, END = "<!-- tables of benchmarks/speed.py -->", "<!-- end of tables -->"


@dataclass(frozen=True)
class Part:
    """What is timed by one part of the benchmark: every dtype and shape, with all ratios and forms in one run."""

    shapes: tuple[str, ...]
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125, 0.0625)
    tokens: tuple[int, ...] = (1, 16, 128, 512, 2048)
    forms: tuple[str, ...] = tuple(FORMS)
    rounds: int = 5  # samples per figure, at least


PARTS = {
    # Medians of 5 left single forms far off in one run of two on a shared machine.
    "olmoe": Part(("olmoe",), rounds=15),
    "shapes": Part(("qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3"), ("bfloat16",), (0.25, 0.125), (1, 16, 512)),
    "training": Part(("olmoe",), ratios=(0.25, 0.0625), tokens=(512,)),
    "models": Part(("olmoe",), ("bfloat16",), (0.25, 0.0625), (512,)),
}


def main() -> None:
    """Time the parts that the command line selects, or only make the tables of earlier runs again."""
    options = _options()
    console = Console()
    keep_freed_memory()
    found: dict[str, Any] = {"results": []}
    if options.tables:
        found["results"] = [result for file in options.tables for result in json.loads(file.read_text())["results"]]
    else:
        if options.threads:
            torch.set_num_threads(options.threads)
        for name in options.parts:
            begin = time.perf_counter()
            _run(name, _selected(PARTS[name], options), options, found, console)
            console.print(f"{name}: {(time.perf_counter() - begin) / 60:.1f} minutes\n", highlight=False)
    grids = all_grids(found["results"])
    for grid in grids if options.tables else bar_grids(found["results"]):
        console.print(grid.rich())
    if options.output:
        write_speed(options.output, found, grids)
    if options.docs:
        try:
            put_between(options.docs, BEGIN, END, "\n".join(grid.markdown() for grid in grids))
        except UserError as error:
            raise SystemExit(str(error)) from None


def _run(name: str, part: Part, options: argparse.Namespace, found: dict[str, Any], console: Console) -> None:
    device = torch.device(options.device)
    for dtype_name in part.dtypes:
        dtype = getattr(torch, dtype_name)
        conditions = describe_conditions(dtype, device)
        for shape in part.shapes:
            if name == "models":
                result = whole_models(shape, part, dtype, device, options)
            else:
                result = layer(shape, part, dtype, device, training=name == "training", options=options)
            found["results"].append({"part": name, "shape": shape, **conditions, **result})
            console.print(_grid(found["results"][-1]).rich())
            for variant in result.get("layouts", {}):
                for line in break_even_lines(result, variant):
                    if "slower" in line:
                        console.print(f"{variant}, {line}", highlight=False)
            for line in result.get("unreachable", ()):
                console.print(line, highlight=False)
            if options.output:  # after each, so that an interrupted run leaves what it has
                write_speed(options.output, found, all_grids(found["results"]))
            gc.collect()
            give_back_freed_memory()


def layer(
    shape: str,
    part: Part,
    dtype: torch.dtype,
    device: torch.device,
    *,
    training: bool,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Time one layer of a shape, original and in all forms and shares of the bytes, in one interleaved run."""
    experts, label = fitting_experts(shape, part, dtype, device, training)
    (facts,) = find_experts(meta_model(layer_config(shape, experts)))
    layouts, unreachable = {}, []
    for ratio in part.ratios:
        fitting = same_ratio_layouts(facts.projections, ratio)
        layouts |= {variant_at(form, ratio): fitting[form] for form in part.forms if form in fitting}
        unreachable += [
            f"{form}: not at {ratio:.2%} of the bytes of {label}" for form in part.forms if form not in fitting
        ]
    timed = time_layer(
        facts, layouts, dtype, device, top_k=SHAPES[shape][1], tokens=part.tokens, seconds=options.seconds,
        least_rounds=part.rounds, training=training,
    )  # fmt: skip
    return {"module": label, "unreachable": unreachable, **timed}


def whole_models(
    shape: str, part: Part, dtype: torch.dtype, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Time the reference MoE, or a random model with layers of a shape, of which it has fewer.

    Its vocabulary is cut in proportion to its layers, so that the output head takes the part that it has in the model.
    """
    if shape == "reference":
        original, title = load_model("reference", dtype=dtype, device=device), "the reference MoE"
    else:
        experts, *_, layers = SHAPES[shape]
        vocabulary = WORDS * options.layers // layers
        config = layer_config(shape, experts, num_hidden_layers=options.layers, vocab_size=vocabulary)
        torch.manual_seed(0)
        with torch.device(device):
            original = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        title = f"{options.layers} of {layers} layers of {shape} with random values, {vocabulary:,} words"
    students, kept = {}, {}
    for ratio in part.ratios:
        found = find_experts(original)
        fitting = same_ratio_layouts(found[0].projections, ratio)
        for form in part.forms:
            if form in fitting:
                name = variant_at(form, ratio)
                students[name] = random_student(original, {facts.name: fitting[form] for facts in found})
                kept[name] = _expert_values(students[name]) / _expert_values(original)
    speed = model_speed(
        original,
        students,
        prefill_tokens=part.tokens[0],
        decode_tokens=32,
        seconds=3 * options.seconds,
        least_rounds=part.rounds,
    )
    return {"title": title, "kept": kept, **speed}


def layer_config(shape: str, experts: int, **changes: Any) -> OlmoeConfig:
    """A configuration with one MoE layer of a shape; the class stands for any gated experts."""
    _, top_k, hidden, intermediate, _ = SHAPES[shape]
    sizes = {"num_hidden_layers": 1, "hidden_size": hidden, "intermediate_size": intermediate, "eos_token_id": None}
    return OlmoeConfig(num_experts=experts, num_experts_per_tok=top_k, **sizes | changes)


def fitting_experts(
    shape: str, part: Part, dtype: torch.dtype, device: torch.device, training: bool
) -> tuple[int, str]:
    """The number of experts to time: halved until all variants fit the free memory; and a name that says so."""
    experts, top_k, hidden, intermediate, _ = SHAPES[shape]
    # The original and its gradients; all compressed layers, the small ones in copies; room for what they compute.
    share = 1.2 * (1 + training + 1.3 * len(part.forms) * sum(part.ratios))
    count = experts
    while count > 2 * top_k and share * count * 3 * hidden * intermediate * dtype.itemsize > free_bytes(device):
        count //= 2
    return count, shape if count == experts else f"{shape} with {count} of its {experts} experts"


def all_grids(results: list[dict[str, Any]]) -> list[Grid]:
    """The tables of results: first OLMoE's layer against the bars."""
    return [*bar_grids(results), *map(_grid, results)]


def bar_grids(results: list[dict[str, Any]]) -> list[Grid]:
    """How each form of OLMoE's layer stands against the bars of issue 6."""
    columns = [f"{ratio:.2%} of the bytes, bar {bar}x" for ratio, bar in BARS.items()]
    grid = Grid(
        "OLMoE's layer against the bars",
        "speed against the fastest original; with many tokens also how many times the roofline's time it takes",
        ["fastest original, ms", *columns],
    )
    barred = {variant_at(form, ratio) for form in FORMS for ratio in BARS}
    for result in results:
        if not result["part"] == result["shape"] == "olmoe" or barred.isdisjoint(result["kept"]):
            continue
        rows = {(row["tokens"], row["variant"]): row for row in result["rows"]}
        for tokens in BAR_TOKENS:
            originals = [row for (number, name), row in rows.items() if number == tokens and name not in result["kept"]]
            for form in FORMS if originals else ():
                cells = [_bar_cell(rows.get((tokens, variant_at(form, ratio))), bar) for ratio, bar in BARS.items()]
                best = min(originals, key=lambda row: row["ms"])
                label = f"{result['dtype']}, {tokens} token{'s' * (tokens > 1)}: {form}"
                grid.rows.append([label, f"{best['ms']:.1f} ({best['variant'].split(', ')[1]})", *cells])
    return [grid] if grid.rows else []


def _bar_cell(row: dict[str, Any] | None, bar: float) -> str:
    if row is None:
        return "not timed"
    words = f"{row['speedup']:.2f}x {'met' if row['speedup'] >= bar else 'missed'}"
    return words if row["tokens"] < 512 else f"{words}, {row['ms'] / row['roofline_ms']:.2f} times the roofline"


def _grid(result: dict[str, Any]) -> Grid:
    return model_grid(result, result, result["title"]) if result["part"] == "models" else layer_grid(result, result)


def _expert_values(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)


def _selected(part: Part, options: argparse.Namespace) -> Part:
    fields = ("shapes", "dtypes", "ratios", "tokens", "forms")
    given = {name: tuple(getattr(options, name)) for name in fields if getattr(options, name)}
    return replace(part, **given, rounds=options.rounds or part.rounds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), help="instead of those of each part; so are:")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--ratios", nargs="+", type=float, help="shares of the bytes")
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens per call, or of a whole model's prompt")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=None)
    parser.add_argument("--layers", type=int, default=2, help="layers of the random whole model")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to spend per table column, at least")
    parser.add_argument("--rounds", type=int, default=None, help="samples per figure, at least; else each part's own")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="directory for speed.json and speed.md")
    parser.add_argument("--tables", nargs="+", type=Path, metavar="JSON", help="measure nothing: tables of these files")
    parser.add_argument("--docs", type=Path, help="document to put the tables into, between its two markers")
    return parser.parse_args()


if __name__ == "__main__":
    if missing := {key: value for key, value in ENVIRONMENT.items() if key not in os.environ}:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **missing})
    main()
