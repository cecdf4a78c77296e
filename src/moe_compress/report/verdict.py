"""What the numbers say, in plain sentences that follow from them and from nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from moe_compress.evaluation.results import Record
from moe_compress.evaluation.variants import OURS, SVD
from moe_compress.report.collect import RunData
from moe_compress.report.tables import number, percent, significant, size, with_error

Winner = Literal["moe-compress", "per-expert SVD", "draw"]

# A difference counts from two standard errors; byte counts are equal when they round to the same per cent.
_SIGNIFICANT = 2.0
_EQUAL_BYTES = 0.01


@dataclass(frozen=True)
class Comparison:
    """moe-compress against per-expert SVD on the same text.

    Attributes:
        difference: mean loss of SVD minus that of moe-compress, in nats per token; above zero moe-compress is better.
        stderr: standard error of the difference, paired over sequences; None if it is not known.
        winner: who has the lower loss, or a draw within two standard errors.
    """

    difference: float
    stderr: float | None
    winner: Winner


def compare(core: Record, svd: Record) -> Comparison | None:
    """Compare two measurements; None when one has no finite loss."""
    result = paired_difference(svd, core)
    if result is None:
        return None
    difference, stderr = result
    if difference == 0 or (stderr is not None and abs(difference) < _SIGNIFICANT * stderr):
        return Comparison(difference, stderr, "draw")
    return Comparison(difference, stderr, OURS if difference > 0 else SVD)


def paired_difference(one: Record, other: Record) -> tuple[float, float | None] | None:
    """Loss of one model minus that of another, and its standard error; None when one has no finite loss.

    On the same sequences in the same order the error is that of the mean of the differences, whose spread is far below
    that of the losses; else the errors of both add up, or it is None where they are unknown.
    """
    if one.get("loss") is None or other.get("loss") is None:
        return None
    difference = one["loss"] - other["loss"]
    ours, theirs = one.get("sequence_losses") or [], other.get("sequence_losses") or []
    if len(ours) == len(theirs) > 1 and None not in ours + theirs:
        many, counts = len(ours), one.get("sequence_tokens") or [1] * len(ours)
        gaps = [(a - b, count * many / sum(counts)) for a, b, count in zip(ours, theirs, counts, strict=True)]
        mean = sum(weight * gap for gap, weight in gaps) / many
        return difference, math.sqrt(sum((weight * (gap - mean)) ** 2 for gap, weight in gaps) / (many - 1) / many)
    if one.get("stderr") is not None and other.get("stderr") is not None:
        return difference, math.hypot(one["stderr"], other["stderr"])
    return difference, None


def sentences(data: RunData) -> list[str]:
    """The findings of a run, the most important first; as many as there are measurements for."""
    found = [_quality(data), _rival(data, distilled=True), _rival(data, distilled=False), _sizes(data), _speed(data)]
    return [sentence for sentence in found if sentence]


def _sizes(data: RunData) -> str | None:
    teacher, student = data.teacher(), data.distilled() or data.zero_shot()
    if teacher is None or student is None or not teacher.get("expert_bytes"):
        return None
    return (
        f"The experts keep {percent(student['expert_bytes'] / teacher['expert_bytes'])} of their bytes "
        f"({size(student['expert_bytes'])} of {size(teacher['expert_bytes'])}); the whole model shrinks from "
        f"{size(teacher['bytes'])} to {size(student['bytes'])}, and a token uses "
        f"{percent(student['active_parameters'] / teacher['active_parameters'])} of the parameters it used before."
    )


def _quality(data: RunData) -> str | None:
    teacher, zero_shot, distilled = data.teacher(), data.zero_shot(), data.distilled()
    student = distilled or zero_shot
    if teacher is None or student is None or not student.get("perplexity") or not teacher.get("perplexity"):
        return None
    state = "after distillation" if distilled else "before any distillation"
    text = (
        f"Perplexity on held-out text {state} is {_perplexity(student)}, against {_perplexity(teacher)} of the "
        f"original ({100 * (student['perplexity'] / teacher['perplexity'] - 1):+.1f} %)"
    )
    if distilled and zero_shot and zero_shot.get("perplexity"):
        text += f"; it was {_perplexity(zero_shot)} right after compression"
    return text + "."


def _rival(data: RunData, *, distilled: bool) -> str | None:
    pick = RunData.distilled if distilled else RunData.zero_shot
    core, svd = pick(data, "student"), pick(data, "svd")
    if core is None or svd is None or (result := compare(core, svd)) is None:
        return None
    state = "After the same distillation" if distilled else "Right after compression"
    bytes_ = f"{_bytes_phrase(core, svd)} ({size(core['expert_bytes'])} and {size(svd['expert_bytes'])} of experts)"
    figures = f"{_perplexity(core)} against {_perplexity(svd)}"
    gap = f"a difference in loss of {number(abs(result.difference), 4)}"
    if result.stderr is not None:
        gap += f" ± {number(result.stderr, 4)}"
    if result.winner == "draw":
        return (
            f"{state}, {bytes_}, moe-compress and plain per-expert SVD cannot be told apart: perplexity {figures}, "
            f"{gap}, within two standard errors."
        )
    if result.stderr is None:
        gap += ", uncertainty unknown"
    if result.winner == OURS:
        return f"{state}, {bytes_}, moe-compress beats plain per-expert SVD: perplexity {figures}, {gap}."
    return f"{state}, {bytes_}, plain per-expert SVD beats moe-compress: perplexity {figures} (SVD), {gap}."


def _bytes_phrase(core: Record, svd: Record) -> str:
    excess = svd["expert_bytes"] / core["expert_bytes"] - 1
    if abs(excess) <= _EQUAL_BYTES:
        return "at equal bytes"
    return f"with {percent(abs(excess))} {'more' if excess > 0 else 'fewer'} bytes for SVD"


def _perplexity(record: Record) -> str:
    return with_error(record["perplexity"], record.get("perplexity_stderr"), 2)


def _speed(data: RunData) -> str | None:
    rows: list[dict[str, Any]] = (data.speed or {}).get("layer", {}).get("rows", [])
    parts = []
    for row in rows:
        if row["variant"] == OURS and row.get("speedup") is not None:
            tokens = f"{row['tokens']:,} token{'s' if row['tokens'] != 1 else ''}"
            parts.append(f"{significant(row['speedup'], 2)}x at {tokens}")
    if not parts:
        return None
    return (
        f"One MoE layer runs, against the fastest implementation of the original on this machine, {_listed(parts)} "
        "(below 1x is slower)."
    )


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
