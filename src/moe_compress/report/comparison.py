"""`compare_runs`: several runs on one page: how they differ, what they cost, how good and how fast they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_compress.errors import UserError
from moe_compress.evaluation.results import Record, jsonable
from moe_compress.evaluation.variants import OURS
from moe_compress.files import write_atomically, write_json
from moe_compress.report.build import Figure, Section, points
from moe_compress.report.collect import RunData, collect
from moe_compress.report.measures import behaviour_table, quality_table
from moe_compress.report.page import Page, render_html, render_markdown
from moe_compress.report.plots import line_plot
from moe_compress.report.tables import MISSING, Table, count, number, percent, size
from moe_compress.report.verdict import paired_difference
from moe_compress.run import Run
from moe_compress.schema import flatten, show

Named = tuple[str, RunData]

# They say where a run is or who looked at it, not what it is.
_NO_DIFFERENCE = ("run", "experiment_name", "output.base_dir")


def compare_runs(paths: Sequence[Path], output: Path) -> None:
    """Write `report.html`, `report.md` and `report.json` of several runs into a directory, and print the main tables.

    Raises:
        UserError: a directory that is no run, or the same run twice.
    """
    runs = [Run.open(path) for path in paths]
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise UserError("the same run is named twice; give different run directories")
    named = list(zip(labels(paths), map(collect, runs), strict=True))
    sections = build_comparison(named, [flatten(run.config) for run in runs])
    title = " against ".join(name for name, _ in named) if len(named) < 4 else f"{len(named)} runs"
    page = Page(title, "Runs of moe-compress, compared", sections)
    write_atomically(output / "report.html", render_html(page))
    write_atomically(output / "report.md", render_markdown(page))
    tables = {table.title: table.to_json() for section in sections for table in (*section.tables, *section.details)}
    results = {name: list(data.results.values()) for name, data in named}
    write_json(output / "report.json", jsonable({"runs": list(map(str, paths)), "tables": tables, "results": results}))
    console = Console()
    for section in sections:
        for table in section.tables:
            console.print(table.to_rich(console.width))
    for line in sections[0].text:
        console.print(f"* {line}", highlight=False, markup=False)
    console.print(f"report: {output / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def build_comparison(named: Sequence[Named], settings: Sequence[dict[str, Any]]) -> list[Section]:
    """The sections that the runs have data for; the findings come first and are always there."""
    first = findings(named)
    rest = [_settings(named, settings), _sizes(named), _quality(named), _errors(named), _training(named), _speed(named)]
    return [first, *(section for section in rest if section)]


def findings(named: Sequence[Named]) -> Section:
    """How each run's last measured checkpoint compares with that of the first run."""
    section = Section("findings", "Findings")
    last = [(name, data, record) for name, data in named if (record := _last(data)) is not None]
    for name, data in named:
        if _last(data) is None:
            section.text.append(f"{name} has no measurement yet.")
    if not last:
        return section
    base_name, base_data, base = last[0]
    for name, data, record in last[1:]:
        if _text(data) != _text(base_data):
            section.text.append(f"{name} and {base_name} were measured on different text: their losses do not compare.")
            continue
        result = paired_difference(record, base)
        if result is None:
            broken = name if record.get("loss") is None else base_name
            section.text.append(f"{name} and {base_name} do not compare: the loss of {broken} is not finite.")
            continue
        difference, stderr = result
        error = "" if stderr is None else f" ± {number(stderr, 4)}"
        verdict = "cannot be told apart from" if stderr is None or abs(difference) <= 2 * stderr else (
            "is worse than" if difference > 0 else "is better than"
        )  # fmt: skip
        section.text.append(
            f"{name} {verdict} {base_name}: its loss differs by {difference:+.4f}{error} nats per token "
            f"(perplexity {number(record['perplexity'], 2)} against {number(base['perplexity'], 2)}), with experts of "
            f"{size(record.get('expert_bytes'))} against {size(base.get('expert_bytes'))}."
        )
    return section


def _settings(named: Sequence[Named], settings: Sequence[dict[str, Any]]) -> Section:
    keys = [
        key
        for key in settings[0]
        if key not in _NO_DIFFERENCE and any(values.get(key) != settings[0][key] for values in settings)
    ]
    section = Section("settings-compared", "How the runs differ")
    if keys:
        rows = [[key, *(show(values.get(key)) for values in settings)] for key in keys]
        section.tables.append(Table("Settings that differ", ["", *(name for name, _ in named)], rows))
    else:
        section.text.append("All settings are the same.")
    return section


def _sizes(named: Sequence[Named]) -> Section:
    kinds = (
        ("expert bytes", "expert_bytes", size),
        ("all bytes", "bytes", size),
        ("active parameters", "active_parameters", count),
        ("FLOPs per token", "flops_per_token", count),
    )
    rows = []
    for name, data in named:
        totals = (data.compression or {}).get("totals", {})
        cells = [name]
        for _, key, shown in kinds:
            before, after = totals.get(f"{key}_before"), totals.get(f"{key}_after")
            cells.append(f"{shown(after)} ({percent(after / before)})" if before and after else MISSING)
        rows.append(cells)
    section = Section("sizes", "Sizes")
    section.tables.append(Table("Size, and what is kept of it", ["", *(label for label, *_ in kinds)], rows))
    return section


def _quality(named: Sequence[Named]) -> Section:
    section = Section("quality", "Quality")
    rows: list[tuple[str, Record]] = []
    teachers: dict[str | None, str] = {}
    for name, data in named:
        teacher = data.teacher()
        if teacher is not None and teachers.setdefault(teacher.get("settings"), name) == name:
            rows.append((f"original of {name}", teacher))
        rows += [
            (f"{name}, {label}", record)
            for label, record in (("zero-shot", data.zero_shot()), ("distilled", data.distilled()))
            if record is not None
        ]
    if not rows:
        return section
    section.tables.append(quality_table(rows))
    behaviour = behaviour_table(rows)
    if behaviour.rows:
        section.details.append(behaviour)
    series = {name: points(data.measured("student"), "perplexity") for name, data in named}
    series = {name: line for name, line in series.items() if len(line[0]) > 1}
    if series:
        originals = [(label, record["perplexity"]) for label, record in rows if record["model"] == "teacher"]
        levels = {label: perplexity for label, perplexity in originals if perplexity}
        svg = line_plot("perplexity", series, x="step", y="perplexity", levels=levels, markers=True, whole_numbers=True)
        section.figures.append(Figure(svg, "Perplexity on held-out text over the steps of the distillation."))
    return section


def _errors(named: Sequence[Named]) -> Section:
    section = Section("errors", "Error of the factorization")
    series = {}
    for name, data in named:
        layers = list((data.compression or {}).get("layers", {}).values())
        measure = "data_error" if all(_has(layer, "data_error") for layer in layers) else "relative_error"
        errors = [
            sum(own[measure] for own in layer["projections"].values()) / len(layer["projections"])
            for layer in layers
            if _has(layer, measure)
        ]
        if errors:
            label = f"{name}, {'weighed by data' if measure == 'data_error' else 'weights'}"
            series[label] = (list(range(len(errors))), errors)
    if series:
        svg = line_plot("errors", series, x="MoE layer", y="relative squared error", markers=True, whole_numbers=True,
                        bottom=0.0)  # fmt: skip
        section.figures.append(Figure(svg, "Mean over the projections of each layer, right after compression."))
    return section


def _training(named: Sequence[Named]) -> Section:
    section = Section("training", "Distillation")
    for key, label in (("ce", "cross-entropy"), ("kl", "KL to the teacher")):
        series = {name: points(data.training, key) for name, data in named}
        series = {name: line for name, line in series.items() if len(line[0]) > 1}
        if series:
            svg = line_plot(f"training-{key}", series, x="step", y="nats per token", whole_numbers=True)
            section.figures.append(Figure(svg, f"Training: {label}."))
    return section


def _speed(named: Sequence[Named]) -> Section:
    section = Section("speed", "Speed")
    tokens: list[int] = []
    rows = []
    for name, data in named:
        layer = ((data.speed or {}).get("layer") or {}).get("rows", [])
        own = {row["tokens"]: row for row in layer if row["variant"] == OURS}
        tokens = list(dict.fromkeys([*tokens, *own]))
        rows.append((name, own))
    if tokens:
        cells = [
            [name, *(f"{own[one]['speedup']:.2f}x" if one in own else MISSING for one in tokens)] for name, own in rows
        ]
        columns = ["", *(f"{one:,} token{'s' if one > 1 else ''}" for one in tokens)]
        note = (
            "moe-compress, one MoE layer, against the fastest original in the same run; runs may be of other machines."
        )
        section.tables.append(Table("Speed of one MoE layer", columns, cells, note))
    return section


def _last(data: RunData) -> Record | None:
    return data.distilled() or data.zero_shot()


def _text(data: RunData) -> tuple[Any, ...]:
    """What decides the held-out tokens."""
    return data.config["evaluation"]["perplexity"], data.config["seed"], data.config["model"]["name"]


def _has(layer: dict[str, Any], measure: str) -> bool:
    return all(own.get(measure) is not None for own in layer["projections"].values())
