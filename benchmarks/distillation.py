"""What the distillation costs: memory and time of the loss over a large vocabulary, and of cached KD per step.

    python benchmarks/distillation.py [loss] [step] [--tokens 4096] [--plain-tokens 1024] [--hidden 512]

`loss` measures, each in a process of its own, the peak memory (resident set) and time of loss and backward from hidden
states `[tokens, hidden]` and a head of 151,936 tokens, with cached top-64 targets: the formula in plain PyTorch over
whole logits, the chunked loss on whole logits, and the loss fused with the head. `step` trains the compressed reference
MoE for a few steps with cross-entropy alone, a cached and a live teacher.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

VOCABULARY = 151_936
TOP_K = 64
LOSSES = {
    "plain": "plain PyTorch on whole logits",
    "chunked": "chunked, from whole logits",
    "fused": "fused with the head",
}


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_loss(kind: str, tokens: int, hidden_size: int) -> dict[str, float]:
    """Memory beyond the inputs, and CPU seconds, of one loss and backward."""
    from moe_compress.distillation.chunks import LinearHead
    from moe_compress.distillation.losses import distillation_loss, divergence
    from moe_compress.distillation.targets import SparseTargets

    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, hidden_size, requires_grad=True)
    weight = torch.randn(VOCABULARY, hidden_size).mul_(hidden_size**-0.5).requires_grad_()  # no copy in the peak before
    labels = torch.randint(0, VOCABULARY, (1, tokens))
    log_probs = (torch.randn(1, tokens, TOP_K) - 6).sort(dim=-1, descending=True).values
    indices = torch.randint(0, VOCABULARY, (1, tokens, TOP_K))
    targets = SparseTargets(indices, log_probs, torch.zeros(1, tokens), torch.full((1, tokens, 2), -1.0))
    before, start = peak_bytes(), time.process_time()
    if kind == "plain":
        flat = F.linear(hidden, weight)[0, :-1]
        ce = F.cross_entropy(flat, labels[0, 1:])
        kl = divergence(flat, targets.flatten().rows(torch.arange(tokens - 1)), 2.0).mean()
        loss = 0.5 * ce + 0.5 * 4 * kl
    elif kind == "chunked":
        loss = distillation_loss(F.linear(hidden, weight), labels, targets, alpha=0.5, temperature=2.0).loss
    else:
        loss = distillation_loss(hidden, labels, targets, alpha=0.5, temperature=2.0, head=LinearHead(weight)).loss
    loss.backward()
    return {"bytes": peak_bytes() - before, "seconds": time.process_time() - start}


def loss_table(options: argparse.Namespace) -> str:
    """The losses side by side as Markdown."""
    lines = [
        f"Vocabulary {VOCABULARY:,}, hidden size {options.hidden}, fp32, top-{TOP_K} targets, "
        f"{torch.get_num_threads()} CPU threads. Memory is that of loss and backward beyond hidden states, head and "
        f"targets; the gradient of the head alone is {4 * VOCABULARY * options.hidden / 2**30:.2f} GiB.",
        "",
        "| loss | tokens | peak memory, GiB | CPU seconds |",
        "|---|---|---|---|",
    ]
    for kind, tokens in [(kind, count) for count in (options.plain_tokens, options.tokens) for kind in LOSSES]:
        if kind != "fused" and tokens > options.plain_tokens:
            continue
        command = [sys.executable, __file__, "--worker", kind, "--tokens", str(tokens), "--hidden", str(options.hidden)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        lines.append(f"| {LOSSES[kind]} | {tokens:,} | {found['bytes'] / 2**30:.2f} | {found['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def step_table(options: argparse.Namespace) -> str:
    """Seconds per step of the compressed reference MoE with and without a teacher, as Markdown."""
    from moe_compress import settings
    from moe_compress.compression import compress
    from moe_compress.config import StageConfig
    from moe_compress.distillation import distill, generate_teacher_logits
    from moe_compress.run import Run

    kinds = {
        "cross-entropy alone": ["distillation.loss.alpha=0"],
        "cached top-64 teacher": ["distillation.loss.alpha=0.9"],
        "live teacher": ["distillation.loss.alpha=0.9", "distillation.teacher.use_cached_logits=false"],
    }
    speeds: dict[str, list[float]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        common = [
            "model=reference",
            f"distillation.dataset.max_samples={4 * options.steps}",
            f"distillation.teacher.cache_dir={root / 'cache'}",
            "distillation.training.logging_steps=1",
            "distillation.training.save_steps=1000",
        ]
        base = Run.create(root / "base", settings.compose(common))
        compress(base)
        generate_teacher_logits(base)
        for repeat in range(options.repeats):
            for name, overrides in kinds.items():
                config = settings.compose([*common, *overrides])
                config.distillation.stages = [StageConfig(name="all", steps=options.steps)]
                run = Run.create(root / f"{name.replace(' ', '-')}-{repeat}", config)
                run.checkpoints_dir.mkdir()
                shutil.copytree(base.checkpoint(0), run.checkpoint(0))
                distill(run)
                lines = [json.loads(line) for line in (run.logs_dir / "train.jsonl").read_text().splitlines()]
                # Not the first step, which makes the optimizer's state, nor the last, which writes the checkpoint.
                speeds[name] += [line["tokens_per_second"] for line in lines[1:-1]]
    base_speed = statistics.median(speeds["cross-entropy alone"])
    training, length = base.config.distillation.training, base.config.distillation.dataset.max_length
    rows = [
        f"The reference MoE at {base.config.compression.target_ratio:.0%} of the expert bytes, everything trains, "
        f"{training.per_device_train_batch_size} x {length} tokens a step, {options.repeats} trainings of "
        f"{options.steps} steps each, {torch.get_num_threads()} CPU threads, torch {torch.__version__}.",
        "",
        "| teacher | tokens/s (median) | time per step |",
        "|---|---|---|",
    ]
    for name, values in speeds.items():
        speed = statistics.median(values)
        rows.append(f"| {name} | {speed:,.0f} | {base_speed / speed:.2f}x |")
    return "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="loss|step", help="what to measure; both by default")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--plain-tokens", type=int, default=1024, help="tokens of the losses that hold whole logits")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12, help="steps of each training")
    parser.add_argument("--repeats", type=int, default=2, help="trainings of each kind, in turn")
    parser.add_argument("--worker", choices=list(LOSSES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(measure_loss(options.worker, options.tokens, options.hidden)))
        return
    tables = {"loss": loss_table, "step": step_table}
    for name in options.what or tables:
        if name not in tables:
            parser.error(f"there is no {name}; there are: {', '.join(tables)}")
        print(tables[name](options), flush=True)


if __name__ == "__main__":
    main()
