"""From the files of a run to the sections of its report: sentences, tables and figures, where there is data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_compress.evaluation.results import Record
from moe_compress.evaluation.variants import OURS, SVD
from moe_compress.report.collect import RunData
from moe_compress.report.measures import (
    behaviour_table,
    checkpoint_table,
    error_table,
    layer_table,
    model_table,
    quality_table,
    rank_table,
    task_table,
    variants_of,
)
from moe_compress.report.plots import bar_plot, line_plot
from moe_compress.report.tables import Table, count, number, percent, significant, size
from moe_compress.report.verdict import sentences


@dataclass
class Figure:
    """An `<svg>` element and the line below it."""

    svg: str
    caption: str


@dataclass
class Section:
    """A part of the report.

    Attributes:
        name: anchor on the page, and key in the JSON.
        title: heading.
        text: paragraphs.
        tables, figures: shown.
        details: tables behind a fold.
    """

    name: str
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    details: list[Table] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.tables or self.figures or self.details)


def build(data: RunData) -> list[Section]:
    """The sections that the run has data for, in reading order (samples and settings are the page's own)."""
    makers: list[Callable[[RunData], Section]] = [findings, sizes, quality, errors, training, speed, routing]
    return [section for make in makers if (section := make(data))]


def findings(data: RunData) -> Section:
    """What the numbers say, in sentences."""
    failed = [
        f"Not measured: {record['model']} at step {record['step']}: {record['error']}" for record in data.failures()
    ]
    lost = {
        f"Task {task} was not measured: {entry['error']}"
        for record in data.results.values()
        for task, entry in record.get("tasks", {}).items()
        if "error" in entry
    }
    return Section("findings", "Findings", text=[*sentences(data), *failed, *sorted(lost)])


def sizes(data: RunData) -> Section:
    """Bytes, parameters and arithmetic before and after, and how the compression was done."""
    section = Section("sizes", "What was compressed, and how")
    if data.compression is None:
        return section
    totals = data.compression["totals"]
    kinds = (
        ("bytes of the experts", "expert_bytes", size),
        ("bytes of the model", "bytes", size),
        ("parameters", "parameters", count),
        ("active parameters per token", "active_parameters", count),
        ("FLOPs per token", "flops_per_token", count),
    )
    rows = []
    for label, key, show in kinds:
        before, after = totals.get(f"{key}_before"), totals.get(f"{key}_after")
        if before and after:
            rows.append([label, show(before), show(after), percent(after / before)])
    note = "FLOPs: two per multiply-add of the weights a token meets; attention over earlier tokens is not counted."
    section.tables.append(Table("Size", ["", "original", "compressed", "kept"], rows, note))
    section.text.append(_method(data.compression))
    ranks = _ranks(data.compression)
    if len({rank for _, line in ranks.values() for rank in line}) > len(ranks):  # else a line of text has said it
        svg = line_plot("ranks", ranks, x="MoE layer", y="delta rank", markers=True, whole_numbers=True, bottom=0.0)
        section.figures.append(Figure(svg, "Ranks of the deltas, by layer and projection."))
    section.details.append(rank_table(data.compression))
    return section


def quality(data: RunData) -> Section:
    """Original, zero-shot, distilled, and per-expert SVD, on the same held-out text and tasks; and over the steps."""
    section = Section("quality", "Quality")
    rows = quality_rows(data)
    if not rows:
        return section
    section.tables.append(quality_table(rows))
    behaviour = behaviour_table(rows)
    if behaviour.rows:
        section.tables.append(behaviour)
    every_metric = task_table(rows)
    if every_metric.rows:
        section.details.append(every_metric)
    students, baseline = data.measured("student"), data.measured("svd")
    if len(students) > 1:
        series = {OURS: points(students, "perplexity")}
        if len(baseline) > 1:
            series[SVD] = points(baseline, "perplexity")
        teacher = data.teacher()
        levels = {"original": teacher["perplexity"]} if teacher and teacher.get("perplexity") else {}
        svg = line_plot("perplexity", series, x="step", y="perplexity", levels=levels, markers=True, whole_numbers=True)
        section.figures.append(Figure(svg, "Perplexity on held-out text over the steps of the distillation."))
    if len(students) > 2:
        section.details.append(checkpoint_table(students, data.best))
    return section


def quality_rows(data: RunData) -> list[tuple[str, Record]]:
    """The rows of the quality table that were measured, by their names."""
    candidates = [
        ("original", data.teacher()),
        ("moe-compress, zero-shot", data.zero_shot()),
        ("moe-compress, distilled", data.distilled()),
        ("per-expert SVD, zero-shot", data.zero_shot("svd")),
        ("per-expert SVD, distilled", data.distilled("svd")),
    ]
    return [(name, record) for name, record in candidates if record is not None]


def errors(data: RunData) -> Section:
    """Relative error of the factorization, per layer and projection."""
    section = Section("errors", "Error of the factorization")
    for title, compression in ((OURS, data.compression), (SVD, data.baseline_compression)):
        if compression is None:
            continue
        layers = list(compression["layers"].values())
        measures = ["relative_error", "data_error"]
        series = {
            f"{projection}, {'weighed by data' if measure == 'data_error' else 'weights'}": (
                range(len(layers)),
                [layer["projections"][projection][measure] for layer in layers],
            )
            for projection in (layers[0]["projections"] if layers else {})
            for measure in measures
            if all(layer["projections"].get(projection, {}).get(measure) is not None for layer in layers)
        }
        if not series:
            continue
        svg = line_plot(
            f"errors-{'svd' if compression is data.baseline_compression else 'core'}",
            series,
            x="MoE layer",
            y="relative squared error",
            markers=True,
            whole_numbers=True,
            bottom=0.0,
        )
        caption = f"{title}: squared error of the weights over their squared norm, right after compression."
        section.figures.append(Figure(svg, caption))
        section.details.append(error_table(title, compression))
    return section


def training(data: RunData) -> Section:
    """The parts of the loss over the steps of the distillation, of the run and of its baseline."""
    section = Section("training", "Distillation")
    logs = {OURS: data.training, SVD: data.baseline_training}
    labels = {"loss": "loss that is trained on", "ce": "cross-entropy", "kl": "KL to the teacher"}
    for key, label in labels.items():
        series = {name: points(lines, key) for name, lines in logs.items()}
        series = {name: line for name, line in series.items() if len(line[0]) > 1}
        if series:
            svg = line_plot(f"training-{key}", series, x="step", y="nats per token", whole_numbers=True)
            section.figures.append(Figure(svg, f"Training: {label}."))
    for name, lines in logs.items():
        rates = sorted(line["tokens_per_second"] for line in lines if line.get("tokens_per_second"))
        if section.figures and rates:
            pace = significant(rates[len(rates) // 2])
            section.text.append(f"{lines[-1]['step']:,} steps, {pace} tokens per second (median): {name}.")
    return section


def speed(data: RunData) -> Section:
    """One MoE layer and the whole model, against the original under each implementation."""
    section = Section("speed", "Speed")
    if data.speed is None:
        return section
    layer, model = data.speed.get("layer"), data.speed.get("model")
    if layer:
        section.tables.append(layer_table(layer, data.speed))
        tokens = list(dict.fromkeys(row["tokens"] for row in layer["rows"]))
        names = [name for name in variants_of(layer["rows"]) if not name.startswith("original")]
        speedups = {(row["variant"], row["tokens"]): row["speedup"] for row in layer["rows"]}
        series = {name: [speedups[name, number] for number in tokens] for name in names}
        if names:
            groups = [f"{number:,} token{'s' if number > 1 else ''}" for number in tokens]
            svg = bar_plot("speedup", groups, series, y="speed, original = 1", unit="x", level=1.0)
            caption = "One MoE layer: time of the fastest original implementation over that of the compressed layer."
            section.figures.append(Figure(svg, caption))
    if model and model.get("rows"):
        section.tables.append(model_table(model))
    return section


def routing(data: RunData) -> Section:
    """Load of the experts per layer, and how often student and original choose the same ones."""
    section = Section("routing", "Routing")
    student = data.distilled() or data.zero_shot()
    measured = [(name, record) for name, record in (("original", data.teacher()), ("compressed", student)) if record]
    series = {
        name: (range(len(record["routing"])), [layer["entropy"] for layer in record["routing"].values()])
        for name, record in measured
        if record.get("routing")
    }
    if not series:
        return section
    agreement = [layer.get("agreement") for layer in (student or {}).get("routing", {}).values()]
    if agreement and None not in agreement:
        series["experts shared with the original"] = (range(len(agreement)), [float(share) for share in agreement])  # type: ignore[arg-type]
    svg = line_plot("routing", series, x="MoE layer", y="share", markers=True, whole_numbers=True)
    caption = (
        "Entropy of the load over the experts (1 is balanced), and the share of chosen experts that the original "
        "chooses as well, on the held-out text."
    )
    section.figures.append(Figure(svg, caption))
    rows = []
    for name, record in measured:
        for layer, facts in record.get("routing", {}).items():
            agreed = percent(facts.get("agreement"))
            rows.append([f"{name}, {layer}", number(facts["entropy"]), str(facts["unused"]), agreed])
    section.details.append(Table("Routing per layer", ["", "load entropy", "unused experts", "same as original"], rows))
    return section


def _ranks(compression: dict[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """Projection to the numbers of the MoE layers that have it, and its delta rank there."""
    ranks: dict[str, tuple[list[float], list[float]]] = {}
    for number_, layer in enumerate(compression["layers"].values()):
        for projection, own in layer["projections"].items():
            places, line = ranks.setdefault(projection, ([], []))
            places.append(number_)
            line.append(own["delta_rank"])
    return ranks


def _method(compression: dict[str, Any]) -> str:
    layers = compression["layers"]
    projections = next(iter(layers.values()))["projections"]
    cores = sorted({facts["cores"] for layer in layers.values() for facts in layer["projections"].values()})
    words = {0: "no core", 1: "one shared core"}
    how = f"{' or '.join(words.get(number, f'{number} cores') for number in cores)} and a low-rank delta per expert"
    if cores == [0]:
        how = "low-rank factors per expert"
    if any(facts.get("basis") for layer in layers.values() for facts in layer["projections"].values()):
        how += " on a basis of the inputs that all experts share"
    fitted = ", weighed by calibration data," if compression.get("calibrated") else " on the weights alone,"
    names = " and ".join(projections)
    return (
        f"{compression.get('architecture', 'The model')}: in {len(layers)} MoE layers, {names} became {how} "
        f"({compression.get('parameterization')}), fitted by {compression.get('method')}{fitted} "
        f"neurons aligned: {compression.get('alignment')}."
    )


def points(records: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the records that have a value."""
    measured = [record for record in records if record.get(key) is not None]
    return [record["step"] for record in measured], [record[key] for record in measured]
