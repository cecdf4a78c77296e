"""The model cards of a run's checkpoints, brought up to date with what was measured of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult

from moe_compress.compression.card import inherited, model_card, read_metadata, write_card
from moe_compress.evaluation.results import Record
from moe_compress.report.collect import RunData
from moe_compress.report.measures import behaviour_table, primary_metric, quality_table

if TYPE_CHECKING:
    from moe_compress.run import Run


def refresh_cards(run: Run, data: RunData) -> int:
    """Rewrite README.md of every measured checkpoint that is still there; returns how many changed."""
    changed = 0
    for record in data.results.values():
        compression = data.baseline_compression if record["model"] == "svd" else data.compression
        directory = run.path / record["path"]
        if record["model"] == "teacher" or "error" in record or compression is None or not directory.is_dir():
            continue
        try:
            changed += write_card(directory, card_of(data, record, compression, read_metadata(directory)))
        except OSError:  # a checkpoint that may not be written to keeps the card it has
            continue
    return changed


def card_of(data: RunData, record: Record, compression: dict[str, Any], metadata: dict[str, Any]) -> str:
    """The card of one checkpoint.

    Args:
        data: what the run has measured.
        record: the measurement of the checkpoint.
        compression: its `compression.json`.
        metadata: those of the card it has now, for license and language.
    """
    model = data.config["model"]["name"]
    title = data.name if record["model"] == "student" else f"{data.name}, per-expert SVD"
    return model_card(
        compression,
        {**inherited({}, model), **metadata},
        title=f"{title}, step {record['step']}" if record["step"] else f"{title}, not distilled",
        sections=[*_distillation(data, record), *_measured(data, record)],
        results=_results(data, record),
    )


def _distillation(data: RunData, record: Record) -> list[str]:
    if not record["step"]:
        return []
    settings = data.config["distillation"]
    teacher = settings["teacher"]["model_path"] or data.config["model"]["name"]
    dataset, loss = settings["dataset"], settings["loss"]
    text = (
        f"Trained for {record['step']:,} steps to give the distributions of `{teacher}` on `{dataset['name']}` "
        f"(alpha {loss['alpha']}, temperature {loss['temperature']})."
    )
    if data.best == record["path"].rpartition("/")[2] and record["model"] == "student":
        text += f" Of its run's checkpoints it is the best by {data.config['evaluation']['metric']}."
    return [f"## Distillation\n\n{text}"]


def _measured(data: RunData, record: Record) -> list[str]:
    teacher = data.teacher()
    rows = [*([("original", teacher)] if teacher else []), ("this model", record)]
    tables = [quality_table(rows), behaviour_table(rows)]
    return ["## Measured", *(table.to_markdown() for table in tables if table.rows)]


def _results(data: RunData, record: Record) -> list[EvalResult]:
    text = data.config["evaluation"]["perplexity"]
    held_out = {"dataset_type": text["name"], "dataset_name": f"{text['name']}, {text['split']}, held out"}
    names = {
        "perplexity": "perplexity",
        "kl": "KL to the original, nats per token",
        "top1_agreement": "top-1 agreement with the original",
    }
    results = [
        EvalResult(
            task_type="text-generation",
            metric_type=key,
            metric_name=name,
            metric_value=round(record[key], 6),
            **held_out,
        )
        for key, name in names.items()
        if record.get(key) is not None
    ]
    for task, entry in record.get("tasks", {}).items():
        metric = primary_metric(entry)
        if metric is not None and entry.get(metric) is not None:
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=task,
                    dataset_name=task,
                    metric_type=metric,
                    metric_value=round(entry[metric], 6),
                )
            )
    return results
