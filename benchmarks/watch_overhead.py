"""Does a watcher on another core slow the training? A real distillation, with a busy watcher and without, interleaved.

    python benchmarks/watch_overhead.py [--windows 40] [--seconds 8] [--train-core 0] [--watch-core 1] [--keep DIR]

Trains the reference MoE on one core, while `moe-compress watch` evaluates its checkpoints on another. The watcher is
stopped and continued (SIGSTOP, SIGCONT) in windows of a few seconds, in the order on off off on, so that a drift of the
machine cancels. Steps per second come from the times in `train.jsonl`; steps at a window's edge, and those that write a
checkpoint, are left out. Prints the difference with its standard error over pairs of windows; exits with 1 above 3 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

LIMIT = 0.03
SAVE_STEPS = 25
SETTINGS = (
    "model=reference",
    "compression=weights_only",
    "distillation.teacher.use_cached_logits=false",
    "distillation.dataset.max_samples=20000",
    "distillation.dataset.max_length=128",
    "distillation.training.per_device_train_batch_size=1",
    "distillation.training.gradient_accumulation_steps=1",
    "distillation.training.max_steps=100000",
    "distillation.stages=[]",
    f"distillation.training.save_steps={SAVE_STEPS}",
    "distillation.training.logging_steps=1",
    "evaluation.tasks={}",
    "evaluation.perplexity.max_samples=32",
    "evaluation.poll_seconds=0.2",
)


@dataclass(frozen=True)
class Window:
    """A stretch of time in which the watcher ran, or was stopped."""

    start: float
    end: float
    watched: bool


def step_rate(window: Window, steps: Sequence[tuple[int, float]]) -> float | None:
    """Steps per second of the steps that lie wholly within a window; None where there are none.

    Args:
        window: the window.
        steps: number and time of the end of each step, in order.
    """
    took = [
        after[1] - before[1]
        for before, after in pairwise(steps)
        if before[1] >= window.start
        and after[1] <= window.end
        and after[0] == before[0] + 1
        and not {before[0] % SAVE_STEPS, after[0] % SAVE_STEPS} & {0}
    ]
    return len(took) / sum(took) if took else None


def slowdown(windows: Sequence[Window], steps: Sequence[tuple[int, float]]) -> tuple[float, float, int]:
    """How much slower training is while watched: mean of the log ratios of neighbouring windows, its error, pairs."""
    ratios = []
    for first, second in zip(windows[::2], windows[1::2], strict=False):
        rates = {window.watched: step_rate(window, steps) for window in (first, second)}
        if rates.get(True) and rates.get(False):
            ratios.append(math.log(rates[False] / rates[True]))  # type: ignore[operator]
    mean = sum(ratios) / len(ratios)
    spread = math.sqrt(sum((ratio - mean) ** 2 for ratio in ratios) / max(1, len(ratios) - 1))
    return mean, spread / math.sqrt(len(ratios)), len(ratios)


def measure(run: Path, windows: int, seconds: float, train_core: int, watch_core: int) -> dict[str, object]:
    """Train and watch in windows; returns the figures."""
    command(["compress", f"run={run}", *SETTINGS], train_core).wait()
    trainer = command(["distill", f"run={run}"], train_core)
    watcher = command(["watch", f"run={run}", "evaluation.devices=[cpu]"], watch_core)
    done: list[Window] = []
    busy = {True: 0.0, False: 0.0}
    try:
        wait_for(
            lambda: len(lines(run / "logs/train.jsonl")) > 20 and lines(run / "evals/results.jsonl"), trainer, watcher
        )
        group = [watcher.pid, *descendants(watcher.pid)]
        for number in range(windows):
            watched = number % 4 in (0, 3)
            for pid in group:
                os.kill(pid, signal.SIGCONT if watched else signal.SIGSTOP)
            time.sleep(0.5)
            start, used = time.time(), sum(map(cpu_seconds, group))
            time.sleep(seconds)
            done.append(Window(start, time.time(), watched))
            busy[watched] += sum(map(cpu_seconds, group)) - used
            if trainer.poll() is not None:
                raise SystemExit("the training ended; see its output above")
    finally:
        for pid in [watcher.pid, *descendants(watcher.pid)]:
            os.kill(pid, signal.SIGCONT)
        for process in (watcher, trainer):
            process.send_signal(signal.SIGINT)
        for process in (watcher, trainer):
            process.wait()
    steps = [(line["step"], line["time"]) for line in lines(run / "logs/train.jsonl")]
    mean, error, pairs = slowdown(done, steps)
    rates = [rate for window in done if (rate := step_rate(window, steps))]
    return {
        "slowdown": mean,
        "stderr": error,
        "pairs": pairs,
        "steps_per_second": sum(rates) / len(rates),
        "watcher_load": busy[True] / sum(window.end - window.start for window in done if window.watched),
        "watcher_load_stopped": busy[False] / sum(window.end - window.start for window in done if not window.watched),
        "checkpoints_evaluated": len(lines(run / "evals/results.jsonl")),
    }


def command(arguments: Sequence[str], core: int) -> subprocess.Popen[bytes]:
    """A command of moe-compress, pinned to a core with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "moe_compress", *arguments],
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )


def wait_for(condition: Callable[[], object], *processes: subprocess.Popen[bytes]) -> None:
    """Wait until something is so, or a process has ended."""
    while not condition():
        if any(process.poll() is not None for process in processes):
            raise SystemExit("a process ended before the measurement began; see its output above")
        time.sleep(0.5)


def lines(path: Path) -> list[dict[str, float]]:
    """The JSON lines of a file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # being written
            continue
    return found


def descendants(pid: int) -> list[int]:
    """The processes below a process."""
    below = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*below, *(one for child in below for one in descendants(child))]


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--train-core", type=int, default=0)
    parser.add_argument("--watch-core", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="directory of the run; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = options.keep or Path(temporary) / "run"
        found = measure(run, options.windows, options.seconds, options.train_core, options.watch_core)
    print(json.dumps(found, indent=2))
    print(
        f"watched training is {100 * found['slowdown']:+.2f} % slower, ± {100 * found['stderr']:.2f} (standard error)"
    )  # type: ignore[operator]
    return int(found["slowdown"] > LIMIT)  # type: ignore[operator]


if __name__ == "__main__":
    sys.exit(main())
