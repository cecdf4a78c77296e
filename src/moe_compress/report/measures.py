"""The tables of a report, from the records that `compress` and `evaluate` leave."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moe_compress.evaluation.results import Record, metrics_of
from moe_compress.evaluation.variants import OURS, SVD
from moe_compress.report.tables import MISSING, Table, count, number, percent, significant, size, with_error


def rank_table(compression: dict[str, Any]) -> Table:
    """Delta rank, cores and bytes of every projection."""
    rows = []
    for layer, facts in compression["layers"].items():
        for projection, own in facts["projections"].items():
            kept = percent(own["bytes"] / own["bytes_before"]) if own.get("bytes_before") else MISSING
            rows.append([f"{layer}.{projection}", str(own["delta_rank"]), str(own["cores"]), size(own["bytes"]), kept])
    return Table("Ranks", ["", "delta rank", "cores", "bytes", "kept"], rows)


def error_table(title: str, compression: dict[str, Any]) -> Table:
    """Relative error of every projection."""
    rows = [
        [f"{layer}.{projection}", number(own["relative_error"], 4), number(own.get("data_error"), 4)]
        for layer, facts in compression["layers"].items()
        for projection, own in facts["projections"].items()
    ]
    return Table(f"Relative squared error, {title}", ["", "weights", "weighed by data"], rows)


def quality_table(rows: list[tuple[str, Record]]) -> Table:
    """One row per model; of every task the one metric that matters most."""
    tasks = {task: primary for _, record in rows for task, entry in record.get("tasks", {}).items()
             if (primary := primary_metric(entry))}  # fmt: skip
    columns = ["", "perplexity", "KL to original", "top-1 agreement"]
    columns += [f"{task.replace('_', ' ')} {metric}" for task, metric in tasks.items()]
    columns += ["expert bytes", "all bytes", "active parameters"]
    cells = []
    for name, record in rows:
        scores = [record.get("tasks", {}).get(task, {}) for task in tasks]
        cells.append(
            [
                name,
                with_error(record.get("perplexity"), record.get("perplexity_stderr"), 2),
                with_error(record.get("kl"), record.get("kl_stderr"), 4),
                with_error(record.get("top1_agreement"), record.get("top1_stderr")),
                *(
                    with_error(score.get(metric), score.get(f"{metric}_stderr"))
                    for score, metric in zip(scores, tasks.values(), strict=True)
                ),
                size(record.get("expert_bytes")),
                size(record.get("bytes")),
                count(record.get("active_parameters")),
            ]
        )
    texts = sorted({(record["tokens"], record["sequences"]) for _, record in rows})
    note = f"{texts[0][0]:,} held-out tokens in {texts[0][1]} sequences; ± is the standard error."
    if len(texts) > 1:
        note = (
            f"Not all on the same text ({texts[0][0]:,} to {texts[-1][0]:,} held-out tokens); ± is the standard error."
        )
    emphasis = [index for index, (name, _) in enumerate(rows) if name == "moe-compress, distilled"]
    return Table("Held-out text and tasks", columns, cells, note, emphasis)


def behaviour_table(rows: list[tuple[str, Record]]) -> Table:
    """What perplexity does not show: where tokens are routed, and whether texts end in loops; empty if not measured."""
    columns = ["", "same experts as original", "load entropy", "texts that end in a loop", "repeated 4-grams"]
    cells = [
        [
            name,
            percent(record.get("routing_agreement")),
            number(record.get("load_entropy")),
            _share(record.get("loop_rate"), record.get("loop_stderr")),
            percent(record.get("repeat_rate")),
        ]
        for name, record in rows
    ]
    samples = max((record.get("loop_samples") or 0 for _, record in rows), default=0)
    note = "Load entropy: 1 is balanced." + (f" Loops: of {samples} texts at temperature 0.3." if samples else "")
    measured = any(cell != MISSING for row in cells for cell in row[1:])
    return Table("Routing and loops", columns, cells if measured else [], note)


def _share(value: float | None, error: float | None) -> str:
    return percent(value, 0) if value is None or error is None else f"{100 * value:.0f} ± {100 * error:.0f} %"


def primary_metric(entry: dict[str, Any]) -> str | None:
    """The metric of a task to show first: accuracy if it has one, else its first."""
    metrics = [name.partition(".")[2] for name in metrics_of({"tasks": {"": entry}})]
    return next((name for name in ("acc", "exact_match") if name in metrics), next(iter(metrics), None))


def task_table(rows: list[tuple[str, Record]]) -> Table:
    """Every metric of every task, errors included."""
    cells = []
    for name, record in rows:
        for task, entry in record.get("tasks", {}).items():
            if "error" in entry:
                cells.append([f"{name}: {task}", entry["error"], MISSING, MISSING])
            for metric in metrics_of({"tasks": {task: entry}}):
                key = metric.removeprefix(f"{task}.")
                documents = str(entry.get("documents") or MISSING)
                shots = MISSING if entry.get("few_shot") is None else str(entry["few_shot"])
                score = with_error(entry[key], entry.get(f"{key}_stderr"))
                cells.append([f"{name}: {metric}", score, documents, shots])
    return Table("All task metrics", ["", "score", "documents", "few-shot"], cells)


def checkpoint_table(students: list[Record], best: str | None) -> Table:
    """The student over the steps."""
    rows = []
    for record in students:
        name = f"step {record['step']}" + (" (best)" if best == f"checkpoint-{record['step']}" else "")
        rows.append([name, with_error(record.get("perplexity"), record.get("perplexity_stderr"), 2),
                     with_error(record.get("kl"), record.get("kl_stderr"), 4), number(record.get("top1_agreement")),
                     percent(record.get("routing_agreement")), percent(record.get("loop_rate"), 0)])  # fmt: skip
    columns = ["", "perplexity", "KL to original", "top-1 agreement", "same experts", "loops"]
    return Table("Checkpoints", columns, rows)


def layer_table(layer: dict[str, Any], speed: dict[str, Any]) -> Table:
    """Milliseconds of one MoE layer: a row per variant, two columns per number of tokens."""
    tokens = list(dict.fromkeys(row["tokens"] for row in layer["rows"]))
    columns = [""]
    for tokens_ in tokens:
        columns += [f"ms, {tokens_:,} token{'s' if tokens_ > 1 else ''}", "speed"]
    by = {(row["variant"], row["tokens"]): row for row in layer["rows"]}
    variants = variants_of(layer["rows"])
    rows = []
    for variant in variants:
        cells = [variant]
        for tokens_ in tokens:
            row = by.get((variant, tokens_))
            cells += [_spread(row, "ms"), f"{row['speedup']:.2f}x"] if row else [MISSING, MISSING]
        rows.append(cells)
    machine = speed["machine"]
    where = machine["cpu"] if speed["device"] == "cpu" else ", ".join(machine["gpus"])
    note = (
        f"{layer['experts']} experts, {layer['top_k']} per token, hidden {layer['hidden_size']}, intermediate "
        f"{layer['intermediate_size']}; {speed['dtype']} on {where}, {threads(machine)}; median (quartiles), "
        "interleaved; speed is against the fastest original."
    )
    if any(row["variant"] == SVD for row in layer["rows"]):
        values = "random factors" if speed.get("svd_values") == "random" else "the factors of the baseline"
        note += f" Per-expert SVD: {values}, at most the same bytes, ranks cut to multiples of 8."
    emphasis = [index for index, variant in enumerate(variants) if variant == OURS]
    return Table("One MoE layer", columns, rows, note, emphasis)


def threads(machine: dict[str, Any]) -> str:
    """`2 threads`."""
    return f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"


def model_table(model: dict[str, Any]) -> Table:
    """Tokens per second of the whole model."""
    kinds = ("prefill", "decode")
    columns = [
        "",
        f"reading {model['prefill_tokens']} tokens",
        "speed",
        f"writing {model['decode_tokens']} tokens",
        "speed",
    ]
    with_memory = any(row.get("peak_bytes") for row in model["rows"])
    columns += ["weights", "weights and peak"] if with_memory else []
    rows = []
    for row in model["rows"]:
        cells = [row["variant"]]
        for kind in kinds:
            has = row.get(kind) is not None
            cells += [_spread(row, kind), f"{row[f'{kind}_speedup']:.2f}x"] if has else [MISSING, MISSING]
        cells += [size(row.get("weight_bytes")), size(row.get("peak_bytes"))] if with_memory else []
        rows.append(cells)
    emphasis = [index for index, row in enumerate(model["rows"]) if row["variant"] == OURS]
    note = "Tokens per second, one sequence at a time; median (quartiles), interleaved."
    if with_memory:
        note += " Peak: the most that reading the prompt allocates beyond the weights."
    return Table("Whole model", columns, rows, note, emphasis)


def _spread(row: dict[str, Any], key: str) -> str:
    return f"{significant(row[key])} ({significant(row[f'{key}_low'])} to {significant(row[f'{key}_high'])})"


def variants_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The names of the variants in order."""
    return list(dict.fromkeys(row["variant"] for row in rows))
