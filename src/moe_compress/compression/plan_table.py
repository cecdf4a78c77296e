"""A plan as tables on the terminal."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table

from moe_compress.compression.plan import LayerPlan, Plan


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _count(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.0f}" if not unit else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} T"


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print what a plan changes: layers, ranks, bytes, parameters, arithmetic, memory and disk."""
    console = console or Console()
    console.print(f"[bold]{plan.architecture}[/bold] from {plan.path}", highlight=False)
    console.print(_layer_table(plan))
    console.print(_size_table(plan))
    console.print(
        f"Projections of the experts keep {plan.ratio:.2%} of their bytes, as {plan.parameterization}, fitted "
        f"{'on calibration data' if plan.calibrated else 'on the weights alone'}.",
        highlight=False,
    )
    console.print(
        f"Expected peak memory {_bytes(plan.peak_bytes)} ({plan.peak_stage}); disk {_bytes(plan.disk_bytes)}.",
        highlight=False,
    )
    if plan.unused:
        console.print(
            f"{len(plan.unused)} tensors are not loaded by this architecture and are copied as they are "
            f"({plan.unused[0]}, ...).",
            highlight=False,
        )


def _layer_table(plan: Plan) -> Table:
    table = Table(title=f"{len(plan.layers)} MoE layers")
    for title in ("layers", "top-k / experts", "projection", "out x in", "delta rank", "cores", "type"):
        table.add_column(title)
    for title in ("before", "after", "kept"):
        table.add_column(title, justify="right")

    def kind(layer: LayerPlan) -> tuple[object, ...]:
        return layer.top_k, tuple(layer.projections)

    for _, group in groupby(plan.layers, key=kind):
        layers = list(group)
        names = layers[0].name if len(layers) == 1 else f"{layers[0].name}\n... {layers[-1].name} ({len(layers)})"
        for number, projection in enumerate(layers[0].projections):
            table.add_row(
                names if number == 0 else "",
                f"{layers[0].top_k} / {projection.experts}",
                projection.name,
                f"{projection.rows} x {projection.columns}",
                str(projection.delta_rank),
                str(projection.cores),
                projection.dtype,
                _bytes(projection.bytes_before * len(layers)),
                _bytes(projection.bytes_after * len(layers)),
                f"{projection.bytes_after / projection.bytes_before:.1%}",
            )
    return table


def _size_table(plan: Plan) -> Table:
    table = Table(title="Whole model")
    table.add_column("")
    for title in ("before", "after", "kept"):
        table.add_column(title, justify="right")
    rows = [
        ("bytes of the checkpoint", plan.before.bytes, plan.after.bytes, _bytes),
        ("bytes of the experts", plan.before.expert_bytes, plan.after.expert_bytes, _bytes),
        ("parameters", plan.before.parameters, plan.after.parameters, _count),
        ("expert parameters", plan.before.expert_parameters, plan.after.expert_parameters, _count),
        ("active parameters per token", plan.before.active_parameters, plan.after.active_parameters, _count),
        ("FLOPs per token (matrices)", plan.before.flops_per_token, plan.after.flops_per_token, _count),
    ]
    for label, before, after, show in rows:
        table.add_row(label, show(before), show(after), f"{after / before:.1%}")
    return table
