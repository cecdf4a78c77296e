"""Tables of measured speed, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from moe_compress.evaluation.variants import OURS
from moe_compress.files import write_atomically, write_json
from moe_compress.modeling.tensors import Layout


@dataclass
class Grid:
    """A table of text: the first column names the row. Cells may hold lines, of which the first matters most."""

    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, caption=self.caption, title_justify="left", caption_justify="left")
        table.add_column("")
        for column in self.columns:
            table.add_column(column, justify="right")
        for name, *cells in self.rows:
            shown = []
            for cell in cells:
                first, *rest = cell.split("\n")
                shown.append("\n".join([first, *(f"[dim]{line}[/dim]" for line in rest)]))
            table.add_row(name, *shown)
        return table

    def markdown(self) -> str:
        """The same for a document, with the caption below."""
        lines = ["| " + " | ".join(["", *self.columns]) + " |", "|---|" + "---:|" * len(self.columns)]
        lines += ["| " + " | ".join(cell.replace("\n", "; ") for cell in row) + " |" for row in self.rows]
        return "\n".join([f"**{self.title}**", "", *lines, "", self.caption, ""])


def layer_grid(layer: Mapping[str, Any], found: Mapping[str, Any]) -> Grid:
    """The times of one kind of layer: a row per variant, a column per number of tokens.

    Args:
        layer: see `bench.time_layer`, and `module`, its name.
        found: see `conditions`.
    """
    rows = layer["rows"]
    training = "kept_bytes" in rows[0]
    title = (
        f"{'Forward and backward: ' * training}{layer['module']}: {layer['experts']} experts, top {layer['top_k']}, "
        f"hidden {layer['hidden_size']}, intermediate {layer['intermediate_size']}"
    )
    if OURS in layer["layouts"]:
        title += f"; {OURS}: {_layout_words(layer['layouts'][OURS])}"
    caption = (
        "ms per layer, median (quartiles); speed against the fastest original; share of what the roofline allows; "
        f"{'MB kept for the backward pass / most allocated, gradients included; ' * training}{conditions(found)}"
        f"{_rates_words(rows)}"
    )
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    grid = Grid(title, caption, [_tokens(number) for number in tokens])
    for variant in dict.fromkeys(row["variant"] for row in rows):
        by_tokens = {row["tokens"]: row for row in rows if row["variant"] == variant}
        layout = layer["layouts"].get(variant, {})
        cells = [_cell(by_tokens[number], layout) if number in by_tokens else "" for number in tokens]
        grid.rows.append([_label(variant, layer["kept"]), *cells])
    return grid


def variant_at(form: str, ratio: float) -> str:
    """The name of a variant of which there is one at each of several shares of the bytes."""
    return f"{form} at {ratio:g}"


def _label(variant: str, kept: Mapping[str, float]) -> str:
    """A variant, with the share of the expert bytes that it really has."""
    form = variant.partition(" at ")[0]
    return f"{form}, {kept[variant]:.1%} of the bytes" if variant in kept else variant


def break_even_lines(layer: Mapping[str, Any], variant: str = OURS) -> list[str]:
    """Says for which numbers of tokens a variant is slower than the original, and what rank would change it."""
    lines = []
    for row in layer["rows"]:
        if row["variant"] == variant:
            compared = "faster" if row["speedup"] >= 1 else "slower"
            turn = _break_even_words(layer["layouts"][variant], row["faster_below"])
            lines.append(
                f"{_tokens(row['tokens'])}: {row['speedup']:.2f}x, {compared} than the fastest original; {turn}."
            )
    return lines


def model_grid(speed: Mapping[str, Any], found: Mapping[str, Any], title: str = "Whole model") -> Grid:
    """Tokens per second and memory of the whole model."""
    grid = Grid(
        f"{title}, one sequence",
        "tokens per second, median (quartiles); speed against the fastest original; peak is that of tensors, weights "
        f"included, while reading; {conditions(found)}",
        [
            f"reading {speed['prefill_tokens']} tokens",
            f"writing {speed['decode_tokens']} tokens",
            "weights, GB",
            "peak, GB",
        ],
    )
    for row in speed["rows"]:
        cells = [
            f"{row[kind]:,.0f}  {row[f'{kind}_speedup']:.2f}x\n({row[f'{kind}_low']:,.0f}-{row[f'{kind}_high']:,.0f})"
            if kind in row
            else ""
            for kind in ("prefill", "decode")
        ]
        cells += [f"{row[key] / 1e9:.2f}" if key in row else "" for key in ("weight_bytes", "peak_bytes")]
        grid.rows.append([_label(row["variant"], speed.get("kept", {})), *cells])
    return grid


def conditions(found: Mapping[str, Any]) -> str:
    """Type, machine, threads and versions, in a line."""
    machine = found["machine"]
    where = machine["cpu"] if found["device"] == "cpu" else f"{found['device']} ({', '.join(machine['gpus'])})"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    text = f"{found['dtype']}, {where}, {threads}, torch {machine['versions'].get('torch')}"
    if found["device"] == "cpu" and found.get("cpu_kernel") is False:
        text += ", without the CPU kernel"
    return text


def _rates_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rates that the machine had in the columns of a table."""
    words = ""
    for name, verb, unit in (("bytes_per_second", "copies", "GB/s"), ("flops_per_second", "multiplies", "GFLOP/s")):
        found = [round(row["rates"][name] / 1e9) for row in rows if "rates" in row]
        if found:
            lowest, highest = min(found), max(found)
            words += f", {verb} {f'{lowest:,} to ' if lowest < highest else ''}{highest:,} {unit}"
    return words


def write_speed(directory: Path, found: Mapping[str, Any], grids: list[Grid]) -> None:
    """Write `speed.json`, the figures, and `speed.md`, the tables."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "speed.json", found)
    write_atomically(directory / "speed.md", "\n".join(grid.markdown() for grid in grids))


def _cell(row: Mapping[str, Any], layout: Mapping[str, Layout]) -> str:
    ms, low, high = (_three_digits(row[key]) for key in ("ms", "ms_low", "ms_high"))
    lines = [f"{ms}  {row['speedup']:.2f}x", f"({low}-{high})"]
    if "roofline_ms" in row:
        lines[0] += f"  {row['roofline_ms'] / row['ms']:.0%}"
    if "kept_bytes" in row:
        kept, peak = (_three_digits(row[key] / 1e6) for key in ("kept_bytes", "peak_bytes"))
        lines.append(f"{kept} / {peak} MB")
    if "faster_below" in row and row["speedup"] < 1:
        words = _break_even_words(layout, row["faster_below"])
        lines.append(words if words.startswith("slower") else f"slower; {words}")
    return "\n".join(lines)


def _break_even_words(layout: Mapping[str, Layout], ranks: Mapping[str, int]) -> str:
    """At which of the ranks of `faster_below` the layer is as fast as the original."""
    if not all(ranks.values()):
        return "slower at any rank"
    if any(ranks[name] >= own["basis"] for name, own in layout.items() if "basis" in own):
        return "faster at any rank that its basis allows"
    return "break-even at about delta rank " + ", ".join(f"{name} {rank}" for name, rank in ranks.items())


def _layout_words(layout: Mapping[str, Layout]) -> str:
    parts = []
    for name, own in layout.items():
        cores = {0: "no core", 1: "one core"}.get(own["cores"], f"{own['cores']} cores")
        basis = f", basis {own['basis']}" if "basis" in own else ""
        parts.append(f"{name} {cores}{basis}, rank {own['delta_rank']}")
    return "; ".join(parts)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _tokens(number: int) -> str:
    return f"{number:,} token{'s' if number > 1 else ''}"
