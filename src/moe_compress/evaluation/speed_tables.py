"""Tables of measured speed, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from moe_compress.evaluation.speed import CORE
from moe_compress.files import write_atomically, write_json


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


def layer_grids(layer: Mapping[str, Any], found: Mapping[str, Any]) -> list[Grid]:
    """The times of one kind of layer: a row per variant, a column per number of tokens; forward, then training."""
    ranks = {name: projection["delta_rank"] for name, projection in layer["layouts"].get(CORE, {}).items()}
    size = (
        f"{layer['module']}: {layer['experts']} experts, top {layer['top_k']}, hidden {layer['hidden_size']}, "
        f"intermediate {layer['intermediate_size']}; {layer['kept']:.1%} of the bytes"
    ) + (f", delta ranks {ranks}" if ranks else "")
    grids = [
        _layer_grid(
            size,
            "ms per layer, median (quartiles); speed against the fastest original; "
            f"share of what the roofline allows; {conditions(found)}",
            layer["rows"],
        )
    ]
    if layer.get("training"):
        caption = (
            "ms per layer, median (quartiles); speed against the fastest original; share of what the roofline allows; "
            f"MB kept for the backward pass / most allocated, gradients included; {conditions(found)}"
        )
        grids.append(_layer_grid(f"Forward and backward: {size}", caption, layer["training"]))
    return grids


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
        grid.rows.append([row["variant"], *cells])
    return grid


def conditions(found: Mapping[str, Any]) -> str:
    """Type, machine, threads, versions and measured rates, in a line."""
    machine = found["machine"]
    where = machine["cpu"] if found["device"] == "cpu" else f"{found['device']} ({', '.join(machine['gpus'])})"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    text = f"{found['dtype']}, {where}, {threads}, torch {machine['versions'].get('torch')}"
    if "rates" in found:
        rates = found["rates"]
        text += (
            f", copies {rates['bytes_per_second'] / 1e9:.0f} GB/s, multiplies {rates['flops_per_second'] / 1e9:,.0f} "
            "GFLOP/s"
        )
    return text


def write_speed(directory: Path, found: Mapping[str, Any], grids: list[Grid]) -> None:
    """Write `speed.json`, the figures, and `speed.md`, the tables."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "speed.json", found)
    write_atomically(directory / "speed.md", "\n".join(grid.markdown() for grid in grids))


def _layer_grid(title: str, caption: str, rows: list[dict[str, Any]]) -> Grid:
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    grid = Grid(title, caption, [f"{number:,} token{'s' if number > 1 else ''}" for number in tokens])
    for variant in dict.fromkeys(row["variant"] for row in rows):
        by_tokens = {row["tokens"]: row for row in rows if row["variant"] == variant}
        grid.rows.append([variant, *(_cell(by_tokens[number]) if number in by_tokens else "" for number in tokens)])
    return grid


def _cell(row: Mapping[str, Any]) -> str:
    lines = [f"{row['ms']:.3g}  {row['speedup']:.2f}x", f"({row['ms_low']:.3g}-{row['ms_high']:.3g})"]
    if "roofline_ms" in row:
        lines[0] += f"  {row['roofline_ms'] / row['ms']:.0%}"
    if "kept_bytes" in row:
        lines.append(f"{row['kept_bytes'] / 1e6:,.3g} / {row['peak_bytes'] / 1e6:,.3g} MB")
    return "\n".join(lines)
