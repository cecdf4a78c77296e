"""An inspection as a table on the terminal and as plots (PNG and SVG)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_SHOWN_RATIOS = ("0.1", "0.25", "0.5")


def print_inspection(facts: dict[str, Any], console: Console) -> None:
    """Print one row for each layer and projection, and what the rows say together.

    Args:
        facts: what `moe_compress.compression.inspect.measure` returns.
    """
    table = Table(title=f"{facts['architecture']} {facts['model']}", title_justify="left", box=SIMPLE_HEAD)
    for title in ("layer", "projection"):
        table.add_column(title, no_wrap=True)
    for title in ("in mean", "aligned", "least", *(f"{float(ratio):.0%} of bytes" for ratio in _SHOWN_RATIOS), "load"):
        table.add_column(title, justify="right")
    for number, layer in enumerate(facts["layers"].values()):
        for position, (name, projection) in enumerate(layer["projections"].items()):
            table.add_row(
                str(number) if position == 0 else "",
                name,
                f"{projection['core_energy_before']:.1%}",
                f"{projection['core_energy_after']:.1%}",
                f"{1 / projection['shape'][0]:.1%}",
                *(_comparison(projection, ratio) for ratio in _SHOWN_RATIOS),
                _load(layer["load"]) if position == 0 else "",
            )
    console.print(table)
    console.print(
        "in mean, aligned: share of the energy in the mean of the experts, before and after their neurons are aligned "
        "(least: if they have nothing in common). At each share of the bytes: relative squared error with a shared "
        "core / without, by truncated SVD of the weights; a star marks the smaller. load: least and most used expert, "
        "as multiples of the mean.",
        highlight=False,
    )
    console.print(verdict(facts), highlight=False)


def verdict(facts: dict[str, Any]) -> str:
    """In how many projections a shared core, or several, leave the smaller error, for each share of the bytes."""
    projections = [p for layer in facts["layers"].values() for p in layer["projections"].values()]
    parts, grouped = [], []
    for ratio in _SHOWN_RATIOS:
        pairs = [(p["error_with_core"][ratio], p["error_without_core"][ratio]) for p in projections]
        wins = sum(core < plain for core, plain in pairs if core is not None and plain is not None)
        parts.append(f"at {float(ratio):.0%} of the bytes in {wins} of {len(pairs)} projections")
        grouped.append(f"{sum(_groups_win(projection, ratio) for projection in projections)}")
    text = f"A shared core leaves a smaller error than none {', '.join(parts)} (before distillation)."
    if any(key.endswith("_cores") for projection in projections for key in projection):
        text += f" Two or four cores leave less than both in {', '.join(grouped)} of {len(projections)}."
    return text


def _groups_win(projection: dict[str, Any], ratio: str) -> bool:
    """Whether some number of cores leaves a smaller error than one and than none."""
    several = [values[ratio] for key, values in projection.items() if key.endswith("_cores")]
    others = [projection[key][ratio] for key in ("error_with_core", "error_without_core")]
    reached = [error for error in several if error is not None]
    return bool(reached) and all(error is None or min(reached) < error for error in others)


def _comparison(projection: dict[str, Any], ratio: str) -> str:
    core, plain = projection["error_with_core"][ratio], projection["error_without_core"][ratio]
    marks = (
        ("*", "") if core is not None and (plain is None or core < plain) else ("", "*" if plain is not None else "")
    )
    return " / ".join(
        "-" if value is None else f"{value:.3f}{mark}" for value, mark in zip((core, plain), marks, strict=True)
    )


def _load(load: list[int] | None) -> str:
    if not load or not sum(load):
        return "-"
    mean = sum(load) / len(load)
    return f"{min(load) / mean:.2f} - {max(load) / mean:.2f}"


def write_plots(facts: dict[str, Any], directory: Path) -> None:
    """Write `energy`, `spectrum`, `error` and, with calibration, `load`, each as PNG and SVG."""
    from matplotlib.figure import Figure

    def save(name: str, draw: Callable[[Any], None]) -> None:
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        for suffix in ("png", "svg"):
            figure.savefig(directory / f"{name}.{suffix}", dpi=130)

    layers = list(facts["layers"].values())
    save("energy", lambda axes: _draw_energy(axes, layers))
    save("spectrum", lambda axes: _draw_spectrum(axes, layers))
    save("error", lambda axes: _draw_error(axes, layers))
    loads = [layer["load"] for layer in layers if layer["load"]]
    if loads:
        save("load", lambda axes: _draw_load(axes, loads))


def _draw_energy(axes: Any, layers: list[dict[str, Any]]) -> None:
    """Energy in the mean of the experts over the layers."""
    for number, name in enumerate(_projections(layers)):
        for key, style in (("core_energy_before", ":"), ("core_energy_after", "-")):
            values = [layer["projections"][name][key] for layer in layers]
            label = f"{name}, {'aligned' if key.endswith('after') else 'as it is'}"
            axes.plot(range(len(values)), values, style, color=f"C{number}", marker="o", markersize=3, label=label)
    least = 1 / next(iter(layers[0]["projections"].values()))["shape"][0]
    axes.axhline(least, color="gray", linestyle="--", linewidth=1, label="nothing in common")
    axes.set(xlabel="MoE layer", ylabel="share of energy in the mean core", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes)


def _draw_spectrum(axes: Any, layers: list[dict[str, Any]]) -> None:
    """Energy of what the core leaves against the rank of the delta, one line for each layer."""
    for number, name in enumerate(_projections(layers)):
        for index, layer in enumerate(layers):
            energy = layer["projections"][name]["residual_energy"]
            ranks = [int(rank) for rank in energy]
            label = name if index == 0 else None
            axes.plot(ranks, list(energy.values()), color=f"C{number}", alpha=0.6, linewidth=1, label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="delta rank", ylabel="share of the residual's energy", ylim=(0, 1))
    _legend(axes)


def _draw_error(axes: Any, layers: list[dict[str, Any]]) -> None:
    """Mean error over the layers against the share of the bytes that is kept, with and without a core."""
    for number, name in enumerate(_projections(layers)):
        for key, style in (("error_with_core", "-"), ("error_without_core", ":")):
            curves = [layer["projections"][name][key] for layer in layers]
            ratios = [ratio for ratio in curves[0] if all(curve[ratio] is not None for curve in curves)]
            means = [math.fsum(curve[ratio] for curve in curves) / len(curves) for ratio in ratios]
            label = f"{name}, {'shared core' if style == '-' else 'no core'}"
            axes.plot(list(map(float, ratios)), means, style, color=f"C{number}", marker="o", markersize=3, label=label)
    axes.set(xlabel="share of the bytes kept", ylabel="relative squared error", ylim=(0, None))
    _legend(axes)


def _draw_load(axes: Any, loads: list[list[int]]) -> None:
    """Tokens per expert as multiples of the layer's mean; the experts of each layer in the order of their load."""
    longest = max(map(len, loads))
    rows = []
    for load in loads:
        mean = max(sum(load), 1) / len(load)
        rows.append(sorted((count / mean for count in load), reverse=True) + [math.nan] * (longest - len(load)))
    image = axes.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    axes.figure.colorbar(image, label="tokens, as multiples of the mean")
    axes.set(xlabel="expert, most used first", ylabel="MoE layer")
    axes.yaxis.get_major_locator().set_params(integer=True)


def _legend(axes: Any) -> None:
    """Above the axes, where it covers no data."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=9)


def _projections(layers: list[dict[str, Any]]) -> list[str]:
    return list(layers[0]["projections"])
