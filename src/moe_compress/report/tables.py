"""A table is made once and shown three ways: on the terminal (rich), as Markdown, and in the HTML page."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as RichTable

MISSING = "–"  # noqa: RUF001  (an en dash for 'no value')


@dataclass
class Table:
    """Cells are text already; the first column is a name, the others are aligned right.

    Attributes:
        title: heading.
        columns: names of the columns.
        rows: one list of cells per row.
        note: a line below the table: what was measured, and how.
        emphasis: indices of rows to set in bold.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    emphasis: list[int] = field(default_factory=list)

    def to_rich(self, width: int = 0) -> RichTable:
        """The table for a terminal; of few long rows that do not fit into its width, rows become columns."""
        columns, rows, emphasis = self.columns, self.rows, self.emphasis
        widest = [max(len(row[number]) for row in [columns, *rows]) for number in range(len(columns))]
        if width and sum(widest) + 3 * len(columns) > width and len(rows) < len(columns) - 1:
            columns, *rows = map(list, zip(columns, *rows, strict=True))
            emphasis = []
        table = RichTable(
            title=escape(self.title),
            caption=escape(self.note) or None,
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for number, column in enumerate(columns):
            table.add_column(escape(column), justify="left" if number == 0 else "right", overflow="fold")
        for number, row in enumerate(rows):
            table.add_row(*map(escape, row), style="bold" if number in emphasis else None)
        return table

    def to_markdown(self) -> str:
        """The table as GitHub Markdown, with its title as a heading."""
        lines = [f"### {self.title}", "", _markdown_row(self.columns)]
        lines.append("|" + "|".join(" :--- " if number == 0 else " ---: " for number in range(len(self.columns))) + "|")
        for number, row in enumerate(self.rows):
            bold = number in self.emphasis
            lines.append(_markdown_row([f"**{cell}**" if bold else cell for cell in row]))
        if self.note:
            lines += ["", self.note]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The table as plain data."""
        return asdict(self)


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits after the point, or a dash."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def significant(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent, or a dash."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 9)}f}"


def with_error(value: float | None, error: float | None, digits: int = 3) -> str:
    """A number and its standard error, `3.142 ± 0.010`."""
    return number(value, digits) + (f" ± {number(error, digits)}" if value is not None and error is not None else "")


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return MISSING if value is None else f"{100 * value:.{digits}f} %"


def size(value: float | None) -> str:
    """Bytes, in units of a thousand."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def count(value: float | None) -> str:
    """Parameters, in thousands, millions or billions."""
    return _scaled(value, ("", " k", " M", " B", " T"))


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return MISSING
    scaled = float(value)
    for unit in units:
        if abs(scaled) < 1000 or unit == units[-1]:
            return f"{scaled:.0f}{unit}" if unit == units[0] else f"{significant(scaled)}{unit}"
        scaled /= 1000
    raise AssertionError
