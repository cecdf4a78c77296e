"""What each choice of the distillation brings at equal tokens, on the reference MoE, over several seeds.

    python benchmarks/distillation_study.py --out STUDY [--variants delta wrapper] [--seeds 1 2 3] [--steps 240]

A seed decides the calibration text, the fit, and the order of the training text. Everything else of a variant is what
its line in `VARIANTS` says. Interrupt it and start it again: what is in STUDY/results.jsonl is not done twice, and a
training that was cut goes on from its last checkpoint. The table is printed and written to STUDY/study.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_compress import settings
from moe_compress.compression import compress
from moe_compress.config import Config, LrMultiplier, StageConfig
from moe_compress.distillation import distill, generate_teacher_logits
from moe_compress.distillation.teachers import teacher_path
from moe_compress.evaluation import TextScore, score_text
from moe_compress.evaluation.teacher_pass import teacher_text
from moe_compress.files import append_line, directory_in_progress, write_atomically
from moe_compress.modeling import load_model
from moe_compress.run import Run

EXPERTS, CORES, FACTORS = r"\.experts\.", r"\.experts\.\w*proj$", r"\.experts\.\w*_(delta|u|v)_(in|out)$"
BASELINE = "delta"


@dataclass(frozen=True)
class Variant:
    """One way to distil.

    Attributes:
        words: its line in the table.
        stages: share of the steps and settings of each stage.
        compression: overrides of the compression.
        settings: overrides of the distillation.
        rates: multipliers in front of the default ones.
    """

    words: str
    stages: Sequence[tuple[float, dict[str, Any]]] = ((1.0, {"name": "all"}),)
    compression: Sequence[str] = ()
    settings: Sequence[str] = ()
    rates: Sequence[tuple[str, float]] = ()


_BLOCKWISE = {"name": "blockwise", "kind": "blockwise", "trainable": [EXPERTS], "learning_rate": 1e-3}
_FACTORS = {"name": "experts", "trainable": [EXPERTS]}
_ROUTER = {"name": "router", "trainable": [r"\.(gate|router)\."]}
_ALL = {"name": "all"}

VARIANTS: dict[str, Variant] = {
    BASELINE: Variant("core + delta, everything trains, alpha 0.9, T 1"),
    "wrapper": Variant("wrapper instead of delta", compression=("compression.parameterization=wrapper",)),
    "wrapper-balanced": Variant(
        "wrapper, balanced factors",
        compression=("compression.parameterization=wrapper",),
        settings=("distillation.training.balance_factors=true",),
    ),
    "slow-core": Variant("core at 0.3 of the rate", rates=((CORES, 0.3),)),
    "slow-factors": Variant("factors at 0.3 of the rate", rates=((FACTORS, 0.3),)),
    "fast-factors": Variant("factors at 3 times the rate", rates=((FACTORS, 3.0),)),
    "router-only": Variant("only the routers train", stages=((1.0, _ROUTER),)),
    "experts-only": Variant("only cores and factors train", stages=((1.0, _FACTORS),)),
    "experts-then-all": Variant("experts for 1/4, then everything", stages=((0.25, _FACTORS), (0.75, _ALL))),
    "blockwise-first": Variant("block-wise for 1/4, then everything", stages=((0.25, _BLOCKWISE), (0.75, _ALL))),
    "ce-only": Variant("alpha 0 (no teacher)", settings=("distillation.loss.alpha=0",)),
    "alpha-0.5": Variant("alpha 0.5", settings=("distillation.loss.alpha=0.5",)),
    "alpha-1": Variant("alpha 1 (teacher only)", settings=("distillation.loss.alpha=1",)),
    "temperature-2": Variant("T 2", settings=("distillation.loss.temperature=2",)),
    "reverse-kl": Variant("reverse KL", settings=("distillation.loss.divergence=reverse_kl",)),
    "jsd": Variant("Jensen-Shannon", settings=("distillation.loss.divergence=jsd",)),
}


def config_of(variant: Variant, seed: int, options: argparse.Namespace) -> Config:
    """The settings of one training."""
    config = settings.compose(
        [
            "model=reference",
            f"seed={seed}",
            f"compression.target_ratio={options.kept}",
            f"evaluation.perplexity.max_samples={options.rows}",
            f"distillation.dataset.max_samples={4 * options.steps}",
            f"distillation.teacher.cache_dir={options.out / f'cache-{seed}-{options.steps}'}",
            f"distillation.training.save_steps={options.steps}",
            *variant.compression,
            *variant.settings,
            *options.overrides,
        ]
    )
    distillation, left = config.distillation, options.steps
    distillation.stages = []
    for number, (share, stage) in enumerate(variant.stages, start=1):
        steps = left if number == len(variant.stages) else max(1, round(share * options.steps))
        distillation.stages.append(StageConfig(steps=steps, **stage))
        left -= steps
    own = [LrMultiplier(pattern, factor) for pattern, factor in variant.rates]
    distillation.parameter_lr_multipliers = own + distillation.parameter_lr_multipliers
    return config


def zero_shot(config: Config, variant: Variant, options: argparse.Namespace) -> Run:
    """The run whose checkpoint-0 a variant starts from, and which fills the cache of its seed; made once."""
    form = [text.rpartition("=")[2] for text in variant.compression]
    name = "-".join(["zero", *form, str(config.seed), str(options.steps)])
    run = Run.create(options.out / name, config_of(Variant("", compression=variant.compression), config.seed, options))
    compress(run)
    generate_teacher_logits(run)
    return run


def train(name: str, seed: int, options: argparse.Namespace) -> tuple[Run, Run]:
    """Train one variant; the run that it starts from, and its own."""
    variant = VARIANTS[name]
    config = config_of(variant, seed, options)
    start = zero_shot(config, variant, options)
    run = Run.create(options.out / "runs" / f"{name}-{seed}", config)
    if not run.checkpoint(0).exists():
        run.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        with directory_in_progress(run.checkpoint(0)) as directory:
            shutil.copytree(start.checkpoint(0), directory, dirs_exist_ok=True)
    distill(run)
    return start, run


def measure(checkpoint: Path, config: Config, directory: Path) -> TextScore:
    """Loss on held-out text and KL from the teacher, of a checkpoint; the teacher's pass is kept in a directory."""
    teacher = teacher_text(Path(teacher_path(config)), config, directory)
    student = load_model(str(checkpoint), dtype="float32")
    return score_text(student, teacher.rows, teacher, progress=False)


def table(results: list[dict[str, Any]], steps: int) -> str:
    """The results as Markdown: means over seeds, standard deviations, and paired differences to the baseline."""
    by_variant: dict[str, dict[int, dict[str, Any]]] = {}
    for line in results:
        if line["steps"] == steps:
            by_variant.setdefault(line["variant"], {})[line["seed"]] = line
    base = by_variant.get(BASELINE, {})
    lines = [
        "| variant | seeds | held-out loss | against the first line | KL from the teacher | top-1 agreement |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("zero-shot", *VARIANTS):
        runs = by_variant.get(name)
        if not runs:
            continue
        words = "before training (delta)" if name == "zero-shot" else VARIANTS[name].words
        paired = [run["loss"] - base[seed]["loss"] for seed, run in runs.items() if seed in base]
        cells = [
            words,
            str(len(runs)),
            _spread([run["loss"] for run in runs.values()]),
            "" if name == BASELINE or not paired else _spread(paired, sign=True),
            _spread([run["kl"] for run in runs.values()]),
            f"{100 * statistics.mean(run['agreement'] for run in runs.values()):.1f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], *, sign: bool = False) -> str:
    mean = f"{statistics.mean(values):{'+' if sign else ''}.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing of the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=240, help="steps of 4 sequences of 512 tokens")
    parser.add_argument("--kept", type=float, default=0.1, help="share of the expert bytes to keep")
    parser.add_argument("--rows", type=int, default=96, help="held-out sequences")
    parser.add_argument("--overrides", nargs="*", default=[], help="further settings of every training, key=value")
    options = parser.parse_args(arguments)
    log = options.out / "results.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(line["variant"], line["seed"], line["steps"]) for line in results}

    def record(name: str, seed: int, checkpoint: Path, config: Config) -> None:
        score = measure(checkpoint, config, options.out)
        line = {"variant": name, "seed": seed, "steps": options.steps, "loss": score.loss, "kl": score.kl}
        results.append(line | {"agreement": score.top1_agreement, "tokens": options.steps * 4 * 512})
        append_line(log, results[-1])
        done.add((name, seed, options.steps))

    for seed in options.seeds:
        for name in options.variants:
            if (name, seed, options.steps) in done:
                continue
            print(f"== {name}, seed {seed}", flush=True)
            start, run = train(name, seed, options)
            if name == BASELINE and ("zero-shot", seed, options.steps) not in done:
                record("zero-shot", seed, start.checkpoint(0), run.config)
            record(name, seed, run.checkpoints()[-1][1], run.config)
            shutil.rmtree(run.path)  # its weights; what was measured is in the log
    text = (
        f"{options.steps * 2048:,} tokens each, {options.kept:.0%} of the expert bytes, torch {torch.__version__}.\n\n"
    )
    write_atomically(options.out / "study.md", text + table(results, options.steps))
    print(table(results, options.steps))


if __name__ == "__main__":
    main()
