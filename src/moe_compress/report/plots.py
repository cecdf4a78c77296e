"""Figures as inline SVG: text stays text, lines take the colour of the page, and nothing is fetched from elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Readable on white and on near-black; told apart by the colour-blind (after Okabe and Ito).
COLOURS = ("#0f7ab8", "#d9650c", "#0c9a70", "#b8629a", "#8a8a8a", "#b59a00")
_INK = "#010203"  # stands for the page's own text colour in the SVG

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moe-compress",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#888888",
    "grid.alpha": 0.25,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.0,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.8,
}

Series = tuple[Sequence[float], Sequence[float]]


def line_plot(
    name: str,
    series: Mapping[str, Series],
    *,
    x: str,
    y: str,
    levels: Mapping[str, float] | None = None,
    markers: bool = False,
    log: bool = False,
    whole_numbers: bool = False,
    bottom: float | None = None,
) -> str:
    """Lines over a common axis.

    Args:
        name: prefix of the ids in the SVG; unique on its page.
        series: legend label to x and y values.
        x, y: axis labels.
        levels: legend label to the height of a dashed horizontal line.
        markers: mark the points, for few of them.
        log: logarithmic y axis.
        whole_numbers: ticks of x on whole numbers only.
        bottom: lower end of the y axis.

    Returns:
        An `<svg>` element.
    """

    def draw(axes: Axes) -> None:
        for number, (label, (xs, ys)) in enumerate(series.items()):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(xs, ys, label=_literal(label), color=colour, marker="o" if markers else None, markersize=4)
        for number, (label, level) in enumerate((levels or {}).items()):
            axes.axhline(level, label=_literal(label), color=COLOURS[-1 - number % 2], linestyle="--", linewidth=1.2)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if log:
            axes.set_yscale("log")
        if bottom is not None:
            axes.set_ylim(bottom=bottom)
        if whole_numbers:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) + len(levels or {}) > 1:
            _legend(axes)

    return _svg(name, draw)


def bar_plot(
    name: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    y: str,
    unit: str = "",
    level: float | None = None,
) -> str:
    """Groups of bars with their values above them and a dashed line at `level`; see `line_plot` for `name`."""

    def draw(axes: Axes) -> None:
        width = 0.8 / max(1, len(series))
        for number, (label, values) in enumerate(series.items()):
            places = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
            bars = axes.bar(places, values, width * 0.92, label=label, color=COLOURS[number % len(COLOURS)])
            axes.bar_label(bars, labels=[f"{value:.3g}{unit}" for value in values], fontsize=8, padding=2)
        if level is not None:
            axes.axhline(level, color=_INK, linestyle="--", linewidth=1.0)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(y)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.15)
        _legend(axes)

    return _svg(name, draw)


def _literal(label: str) -> str:
    """A label as it is: Matplotlib takes dollars for mathematics, and one that begins with `_` for none."""
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def _legend(axes: Axes) -> None:
    """Above the axes, where it covers no data."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, borderaxespad=0.2)


def _svg(name: str, draw: Callable[[Axes], None], inches: tuple[float, float] = (4.8, 3.1)) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(stream.getvalue(), name)


def _inline(text: str, name: str) -> str:
    """The `<svg>` element alone, scaling with the page; its ids get a prefix, since a page holds several figures."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;]*;", "", text)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace(_INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{name}" class="figure"', 1).strip()
