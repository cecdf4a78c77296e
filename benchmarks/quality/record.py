"""The measurements that the documentation stands on: cells kept in the repository, and the documents made of them.

`docs/quality/<model>.jsonl` holds one cell per line. A run that is given the record measures none of them again, on
whatever machine, as long as the model's weights are the same; so tables grow over many runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import cell_fingerprint
from benchmarks.quality.table import Cell, group, markdown, plot, summary, teacher_line
from moe_compress.errors import UserError
from moe_compress.files import put_between, write_atomically

PAGE = """# Quality at equal bytes: `{model}`

Made by `python -m benchmarks.quality table --model {model} --docs docs`; what it means: [QUALITY.md](../QUALITY.md).

![KL to the teacher against expert bytes]({model}.png)

{tables}"""


def record_file(docs: Path, model: str) -> Path:
    """Where the cells of a test model are kept."""
    return docs / "quality" / f"{model}.jsonl"


def read_record(file: Path) -> list[Cell]:
    """The cells of a record; none where there is no such file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def write_documents(docs: Path, model: str, cells: list[Cell]) -> None:
    """Add cells to the record of a model, and make of them its page, its plot and its table in QUALITY.md.

    Raises:
        UserError: the record is one of other weights, which would be lost; or QUALITY.md has no place for the table.
    """
    file = record_file(docs, model)
    kept = read_record(file)
    strangers = {cell["model"] for cell in kept} - {cell["model"] for cell in cells}
    if strangers:
        raise UserError(
            f"{file} is about other weights of {model} ({', '.join(sorted(strangers))}) than those here; "
            "move it away to begin a new record, or give another --docs"
        )
    begin, end = (f"<!-- {word} of benchmarks.quality: {model} -->" for word in ("table", "end"))
    text = "\n".join([*teacher_line(cells), *summary(group(cells))])
    put_between(docs / "QUALITY.md", begin, end, text)
    plot(cells, file.with_suffix(".png"))
    write_atomically(file.with_suffix(".md"), PAGE.format(model=model, tables=markdown(cells)))
    lines = sorted({cell_fingerprint(cell): cell for cell in (*kept, *cells)}.values(), key=_order)
    write_atomically(file, "".join(json.dumps(cell, sort_keys=True) + "\n" for cell in lines))


def _order(cell: Cell) -> tuple[Any, ...]:
    """One order for all machines, so that a record changes only where something was measured."""
    training = cell["training"] or {"learning_rate": 0.0}
    return cell["method"], cell["ratio"], cell["seed"], training["learning_rate"], json.dumps(cell["settings"])
