"""`compare_models`: any model directories measured side by side, printed and written as JSON and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.evaluation import evaluate_models
from moe_compress.evaluation.results import jsonable, lost_tasks
from moe_compress.files import write_atomically, write_json
from moe_compress.report.measures import behaviour_table, quality_table, task_table


def compare_models(models: Sequence[str], config: Config, output: Path, *, teacher: str | None = None) -> None:
    """Measure models (see `evaluate_models`), print a table, and write `evaluation.json` and `evaluation.md`.

    Args:
        models: `reference`, directories or hub ids.
        config: the settings.
        output: the directory to write to; measurements that are there already are used again.
        teacher: the model to compare the others with.

    Raises:
        UserError: a model that does not exist, or a model or task that could not be measured (after the rest was).
    """
    console = Console()
    records = evaluate_models(models, config, output, teacher=teacher)
    rows = [(record["model"], record) for record in records if "error" not in record]
    tables = [quality_table(rows), behaviour_table(rows), task_table(rows)] if rows else []
    tables = [table for table in tables if table.rows]
    write_json(
        output / "evaluation.json",
        jsonable(
            {"teacher": teacher, "results": records, "tables": {table.title: table.to_json() for table in tables}}
        ),
    )
    write_atomically(output / "evaluation.md", "\n".join(table.to_markdown() for table in tables))
    for table in tables[:2]:
        console.print(table.to_rich(console.width))
    console.print(f"results: {output / 'evaluation.json'}", highlight=False, markup=False, soft_wrap=True)
    failed = {record["model"]: record["error"] for record in records if "error" in record}
    for record in records:
        failed |= {f"task {task} of {record['model']}": error for task, error in lost_tasks(record).items()}
    for name, error in failed.items():
        raise UserError(f"{name} could not be measured: {error}")
