"""Cells to a Markdown table, mean and deviation over seeds, and a plot of quality against bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Cell = dict[str, Any]
Key = tuple[bool, float, str]  # distilled, ratio, method
Groups = dict[Key, list[Cell]]


def group(cells: list[Cell]) -> Groups:
    """Cells by (distilled, ratio, method); of the distilled ones, those at the learning rate that is best on the
    validation text for the first seed that has all of them. Of several versions of a method, the latest alone."""
    grouped: Groups = defaultdict(list)
    latest: dict[str, int] = defaultdict(int)
    for cell in cells:
        latest[cell["method"]] = max(latest[cell["method"]], _version(cell))
    for cell in cells:
        if "test" in cell and cell["method"] != "teacher" and _version(cell) == latest[cell["method"]]:
            grouped[cell["training"] is not None, cell["ratio"], cell["method"]].append(cell)
    for key, found in grouped.items():
        if key[0]:
            rates = {
                seed: {c["training"]["learning_rate"] for c in found if c["seed"] == seed} for seed in seeds(found)
            }
            searched = max(rates, key=lambda seed: (len(rates[seed]), -seed))
            best = min((c for c in found if c["seed"] == searched), key=lambda c: c["validation"]["loss"])
            found[:] = [c for c in found if c["training"] == best["training"]]
    return grouped


def _version(cell: Cell) -> int:
    return cell["settings"].get("version", 0)


def seeds(cells: list[Cell]) -> list[int]:
    return sorted({cell["seed"] for cell in cells})


def spread(values: list[float], digits: int) -> str:
    """Mean and, of several values, standard deviation."""
    if not values:
        return ""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.{digits}f}"


def summary(grouped: Groups) -> list[str]:
    """Perplexity of every method at every ratio, zero-shot and distilled; the best of a column is bold.

    Methods with most cells come first, of those the ones that are best on average. A mean of fewer seeds than others
    says of how many; one without deviation is of one.
    """
    columns = _columns(grouped)
    figures = _figures(grouped, "perplexity")
    means = {key: fmean(values) for key, values in figures.items()}
    most = max((len(values) for values in figures.values()), default=0)
    best = {column: min(mean for key, mean in means.items() if key[:2] == column) for column in columns}

    def rank(name: str) -> tuple[int, float]:
        behind = [math.log(means[*column, name] / best[column]) for column in columns if (*column, name) in means]
        return -len(behind), fmean(behind)

    lines = ["| perplexity | " + " | ".join(map(_heading, columns)) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for name in sorted({key[2] for key in grouped}, key=rank):
        row = [name]
        for column in columns:
            values = figures.get((*column, name), [])
            text = spread(values, 2) + (f" ({len(values)} seeds)" if 1 < len(values) < most else "")
            row.append(f"**{text}**" if means.get((*column, name)) == best[column] else text)
        lines.append("| " + " | ".join(row) + " |")
    return [*lines, ""]


def standing(grouped: Groups, name: str = "ours") -> list[str]:
    """In how many columns a method is best by each measure, and what is better in the others; for a page, as a list."""
    columns = [column for column in _columns(grouped) if (*column, name) in grouped]
    lines = []
    for measure, label, sign, digits in _MEASURES if columns else ():
        figures = _figures(grouped, measure)
        behind = []
        for column in columns:
            own = figures[*column, name]
            best = min((key for key in figures if key[:2] == column), key=lambda key: sign * fmean(figures[key]))
            if fmean(figures[best]) != fmean(own):
                better = f"{best[2]} {spread(figures[best], digits)}"
                behind.append(f"{_heading(column)}: {better}, not {spread(own, digits)}")
        text = f"* By {label} `{name}` is best in {len(columns) - len(behind)} of {len(columns)} columns"
        lines.append("; ".join([text, *behind]) + ".")
    return [*lines, ""] if lines else []


def _columns(grouped: Groups) -> list[tuple[bool, float]]:
    """(distilled, ratio) of all methods, few bytes first, zero-shot before distilled."""
    return sorted({key[:2] for key in grouped}, key=lambda key: (key[1], key[0]))


def _heading(column: tuple[bool, float]) -> str:
    distilled, ratio = column
    return f"{ratio:.1%}, {'distilled' if distilled else 'zero-shot'}"


def _figures(grouped: Groups, measure: str) -> dict[Key, list[float]]:
    """What each seed reaches on the test text."""
    return {key: [cell["test"][measure] for cell in found] for key, found in grouped.items()}


# Key in a cell, name, whether less is better (1) or more (-1), digits.
_MEASURES = (
    ("perplexity", "perplexity", 1, 2),
    ("kl", "KL to the teacher", 1, 4),
    ("top1", "top-1 agreement", -1, 3),
)


def teacher_line(cells: list[Cell]) -> str:
    """What the original itself reaches; empty where that was not measured."""
    for teacher in (cell for cell in cells if cell["method"] == "teacher"):
        tasks = "".join(f", {task} {value:.2f}" for task, value in sorted(teacher.get("tasks", {}).items()))
        return f"Teacher: perplexity {teacher['test']['perplexity']:.3f}{tasks}."
    return ""


def markdown(cells: list[Cell]) -> str:
    """All at a glance; one table for each (zero-shot or distilled, ratio), best KL first; what was not possible."""
    grouped = group(cells)
    lines = [teacher_line(cells), ""]
    if grouped:
        lines += summary(grouped) + standing(grouped)
    for distilled, ratio in sorted({key[:2] for key in grouped}, key=lambda key: (key[0], -key[1])):
        rows = {name: found for (d, r, name), found in grouped.items() if (d, r) == (distilled, ratio)}
        tasks = sorted({task for found in rows.values() for cell in found for task in cell.get("tasks", {})})
        head = ["method", "kept", "n", "perplexity", "KL to the teacher", "top-1 agreement", *tasks]
        head += ["learning rate"] if distilled else []
        lines += [f"### {ratio:.1%} of the expert bytes, {'distilled' if distilled else 'zero-shot'}", ""]
        lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        for name, found in sorted(rows.items(), key=lambda item: fmean(c["test"]["kl"] for c in item[1])):
            figures = {key: [cell["test"][key] for cell in found] for key in ("perplexity", "kl", "top1")}
            row = [name, f"{fmean(c['kept'] for c in found):.4f}", str(len(found))]
            row += [spread(figures["perplexity"], 3), spread(figures["kl"], 4), spread(figures["top1"], 3)]
            row += [spread([c["tasks"][task] for c in found if task in c.get("tasks", {})], 2) for task in tasks]
            row += [f"{found[0]['training']['learning_rate']:g}"] if distilled else []
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    failed = sorted({(c["method"], c["ratio"], c["error"]) for c in cells if "error" in c})
    lines += [f"* {name} at {ratio:.1%}: not possible, {error}" for name, ratio, error in failed]
    return "\n".join(lines).rstrip() + "\n"


def plot(cells: list[Cell], path: Path) -> None:
    """KL to the teacher against expert bytes, zero-shot and distilled side by side, deviations as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, NullLocator

    grouped = group(cells)
    panels = sorted({key[0] for key in grouped})
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(6 * max(1, len(panels)), 4.5), squeeze=False)
    for axis, distilled in zip(axes[0], panels, strict=False):
        curves: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for (kind, _, name), found in grouped.items():
            if kind == distilled:
                values = [cell["test"]["kl"] for cell in found]
                deviation = stdev(values) if len(values) > 1 else 0.0
                curves[name].append((100 * fmean(c["kept"] for c in found), fmean(values), deviation))
        for name, points in sorted(curves.items()):
            x, y, bars = zip(*sorted(points), strict=True)
            axis.errorbar(x, y, yerr=bars, marker="o", capsize=2, label=name, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="expert bytes kept, %", ylabel="KL to the teacher, nats per token")
        axis.set_xticks(sorted({100 * ratio for _, ratio, _ in grouped}), minor=False)
        axis.xaxis.set_minor_locator(NullLocator())
        for numbers in (axis.xaxis, axis.yaxis):
            numbers.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title("after distillation" if distilled else "zero-shot")
        axis.legend(fontsize="x-small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
