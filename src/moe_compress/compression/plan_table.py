"""A plan as tables on the terminal."""

from __future__ import annotations

from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moe_compress.compression.planning import LayerPlan, Plan
from moe_compress.factorization import Form

_PADDING = (0, 0)  # so that a row fits a terminal of 80 columns


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
    projections = [projection for layer in plan.layers for projection in layer.projections]
    dtypes = " and ".join(sorted({projection.dtype for projection in projections}))
    numbers = sorted({projection.form.cores for projection in projections})
    words = {0: "no core", 1: "a shared core"}
    cores = " or ".join(words.get(number, f"{number} cores") for number in numbers)
    fitted = "on calibration data" if plan.calibrated else "on the weights"
    console.print(
        f"The experts' projections keep {plan.ratio:.2%} of their bytes: {cores}"
        f"{', shared input bases' if any(projection.form.basis for projection in projections) else ''} and low-rank "
        f"factors ({plan.parameterization}, {dtypes}), fitted {fitted}.",
        highlight=False,
    )
    console.print(
        f"Expected peak memory {_bytes(plan.peak_bytes)} ({plan.peak_stage}); disk {_bytes(plan.disk_bytes)}.",
        highlight=False,
    )
    if plan.provisional:
        console.print(
            f"{' and '.join(plan.provisional)}: the bytes are an upper limit; what they buy in each projection is "
            "measured by compress, so that its ranks, cores and bases will differ from these.",
            highlight=False,
        )
    slower = [layer for layer in plan.layers if layer.arithmetic > 1]
    if slower:
        worst = max(slower, key=lambda layer: layer.arithmetic)
        ranks = worst.faster_below
        turn = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        advice = (
            f"It turns faster at delta rank {turn} or lower; what it gains on your machine: moe-compress bench"
            if all(ranks.values())
            else "No rank is low enough; fewer cores or a smaller basis are faster"
        )
        console.print(
            f"[yellow]{len(slower)} of {len(plan.layers)} MoE layers need more multiply-adds per token than before "
            f"({worst.arithmetic:.2f} times in {worst.name}): expect them to be smaller but slower. {advice}.[/yellow]",
            highlight=False,
        )
    if plan.unused:
        console.print(
            f"{len(plan.unused)} tensors are not loaded by this architecture and are copied as they are "
            f"({plan.unused[0]}, ...).",
            highlight=False,
        )


def _layer_table(plan: Plan) -> Table:
    """One row for each projection of each run of equal layers."""
    table = Table(
        title=f"{len(plan.layers)} MoE layers: {_names(plan)}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=_PADDING,
        pad_edge=False,
    )
    for title in ("layers", "top-k", "projection"):
        table.add_column(title, no_wrap=True)
    for title in ("out x in", "shared", "rank", "before", "after", "kept"):
        table.add_column(title, justify="right", no_wrap=True)

    def kind(item: tuple[int, LayerPlan]) -> tuple[object, ...]:
        return item[1].top_k, tuple(item[1].projections)

    for _, group in groupby(enumerate(plan.layers), key=kind):
        numbers, layers = zip(*group, strict=True)
        span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
        for position, projection in enumerate(layers[0].projections):
            first = position == 0
            table.add_row(
                span if first else "",
                f"{layers[0].top_k}/{projection.experts}" if first else "",
                projection.name,
                f"{projection.rows} x {projection.columns}",
                _shared(projection.form),
                str(projection.delta_rank),
                _bytes(projection.bytes_before * len(layers)),
                _bytes(projection.bytes_after * len(layers)),
                f"{projection.bytes_after / projection.bytes_before:.1%}",
            )
    return table


def _shared(form: Form) -> str:
    cores = {0: [], 1: ["core"]}.get(form.cores, [f"{form.cores} cores"])
    return ", ".join([*cores, *([f"basis {form.basis}"] if form.basis else [])]) or "-"


def _names(plan: Plan) -> str:
    first, last = plan.layers[0].name, plan.layers[-1].name
    return first if len(plan.layers) == 1 else f"{first} ... {last}"


def _size_table(plan: Plan) -> Table:
    table = Table(title="Whole model", title_justify="left", box=SIMPLE_HEAD, padding=_PADDING, pad_edge=False)
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
