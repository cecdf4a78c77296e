"""The measurements that the documentation stands on: cells kept in the repository, and the documents made of them.

`docs/quality/<model>.jsonl` holds one cell per line. A run that is given the record measures none of them again, on
whatever machine, as long as the model's weights are the same; so tables grow over many runs. Training a test model
gives other weights on another kind of CPU: cells of each are kept, and compared among themselves only.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import cell_fingerprint
from benchmarks.quality.table import Cell, group, markdown, plot, standing, summary, teacher_line
from moe_compress.files import put_between, write_atomically

PAGE = """# Quality at equal bytes: `{model}`

Made by `python -m benchmarks.quality table --model {model} --docs docs`; what it means: [QUALITY.md](../QUALITY.md).

{parts}"""
PART = """## Weights {weights}

![KL to the teacher against expert bytes]({plot})

{tables}"""


def record_file(docs: Path, model: str) -> Path:
    """Where the cells of a test model are kept."""
    return docs / "quality" / f"{model}.jsonl"


def read_record(file: Path) -> list[Cell]:
    """The cells of a record; none where there is no such file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def write_documents(docs: Path, model: str, cells: list[Cell]) -> None:
    """Add cells to the record of a model, and make of them its page, its plots and its tables in QUALITY.md.

    Raises:
        UserError: QUALITY.md has no place for the table.
    """
    file = record_file(docs, model)
    by_weights: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_weights[cell["model"]].append(cell)
    begin, end = (f"<!-- {word} of benchmarks.quality: {model} -->" for word in ("table", "end"))
    text, parts = [], []
    for weights, own in sorted(by_weights.items(), key=lambda item: (-len(item[1]), item[0])):
        picture = file.with_name(f"{model}-{weights[:8]}.png")
        plot(own, picture)
        found = group(own)
        text += [f"Weights {weights[:8]}. {teacher_line(own)}".rstrip(), "", *summary(found), *standing(found)]
        parts.append(PART.format(weights=weights[:8], plot=picture.name, tables=markdown(own)))
    put_between(docs / "QUALITY.md", begin, end, "\n".join(text))
    write_atomically(file.with_suffix(".md"), PAGE.format(model=model, parts="\n".join(parts)))
    lines = sorted({cell_fingerprint(cell): cell for cell in (*read_record(file), *cells)}.values(), key=_order)
    write_atomically(file, "".join(json.dumps(cell, sort_keys=True) + "\n" for cell in lines))


def _order(cell: Cell) -> tuple[Any, ...]:
    """One order for all machines, so that a record changes only where something was measured."""
    training = cell["training"] or {"learning_rate": 0.0}
    key = cell["model"], cell["method"], cell["ratio"], cell["seed"]
    return *key, training["learning_rate"], json.dumps(cell["settings"])
