"""What each choice of the distillation brings at equal tokens, on the reference MoE, over several seeds.

    python benchmarks/distillation_study.py --out STUDY [--variants delta wrapper] [--seeds 1 2 3] [--steps 240]

A seed decides the calibration text, the fit, and the order of the training text. Everything else of a variant is what
its line in `VARIANTS` says. Made once and shared: the compressed student of a form and seed; the teacher's cache and
its pass over the held-out text, of a seed. Interrupt it and start it again: what is in STUDY/results.jsonl is not done
twice, and a training that was cut goes on from its last checkpoint. The table goes to STUDY/study.md too.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_compress import settings
from moe_compress.compression import compress
from moe_compress.compression.checkpoint import Checkpoint
from moe_compress.config import Config, DistillationConfig, LrMultiplier, StageConfig
from moe_compress.distillation import distill, generate_teacher_logits
from moe_compress.distillation.manifest import MANIFEST
from moe_compress.distillation.teachers import teacher_path
from moe_compress.errors import UserError
from moe_compress.evaluation import TextScore, score_text
from moe_compress.evaluation.teacher_pass import teacher_text
from moe_compress.files import append_line, directory_in_progress, write_atomically, write_json
from moe_compress.modeling import load_model
from moe_compress.run import Run

TOKENS_PER_STEP = 4 * 512
EXPERTS, CORES = r"\.experts\.", r"\.experts\.\w*proj$"
FACTORS, BASES = r"\.experts\.\w*proj_(?!bias|basis)\w+$", r"\.experts\.\w*proj_basis$"
BASELINE, ZERO_SHOT = "default", "zero-shot"

# How the student that a variant starts from is compressed, beside the preset of the reference MoE. All keep the same
# share of the bytes. A wrapper needs a core and uniform ranks, and cannot be fitted to the Fisher information; so does
# what it is compared with.
FORMS: dict[str, Sequence[str]] = {
    "default": (),
    "no-basis": ("compression.input_basis=0.0",),
    "core": ("compression=core",),
    "core-uniform": ("compression=core", "compression.calibration.fisher=false", "compression.allocation=uniform"),
    "wrapper": ("compression=wrapper",),
}


@dataclass(frozen=True)
class Variant:
    """One way to distil.

    Attributes:
        words: its line in the table.
        stages: share of the steps and settings of each stage.
        form: of `FORMS`, what it starts from.
        settings: overrides of the distillation.
        rates: multipliers in front of the default ones; a pattern that the student has nothing for leaves it out.
        against: the variant that it is compared with, seed by seed.
    """

    words: str
    stages: Sequence[tuple[float, dict[str, Any]]] = ((1.0, {"name": "all"}),)
    form: str = "default"
    settings: Sequence[str] = ()
    rates: Sequence[tuple[str, float]] = ()
    against: str = BASELINE


_BLOCKWISE = {"name": "blockwise", "kind": "blockwise", "trainable": [EXPERTS], "learning_rate": 1e-3}
_EXPERTS = {"name": "experts", "trainable": [EXPERTS]}
_ROUTER = {"name": "router", "trainable": [r"\.(gate|router)\."]}
_ALL = {"name": "all"}
_HIGH_RATE = "distillation.training.learning_rate=4.8e-3"

VARIANTS: dict[str, Variant] = {
    BASELINE: Variant("the preset's form, everything trains at one rate, alpha 0.9, T 1"),
    "no-basis": Variant("no shared basis: factors of each expert alone", form="no-basis"),
    "core": Variant("core + delta", form="core"),
    "core-uniform": Variant("core + delta, uniform ranks, no Fisher", form="core-uniform", against="core"),
    "wrapper": Variant("wrapper, uniform ranks, no Fisher", form="wrapper", against="core-uniform"),
    "wrapper-balanced": Variant(
        "the same, balanced factors",
        form="wrapper",
        settings=("distillation.training.balance_factors=true",),
        against="core-uniform",
    ),
    "slow-core": Variant("core at 0.3 of the rate", form="core", rates=((CORES, 0.3),), against="core"),
    "slow-basis": Variant("shared basis at 0.3 of the rate", rates=((BASES, 0.3),)),
    "slow-factors": Variant("factors of the experts at 0.3 of the rate", rates=((FACTORS, 0.3),)),
    "fast-factors": Variant("factors of the experts at 3 times the rate", rates=((FACTORS, 3.0),)),
    "faster-factors": Variant("factors of the experts at 6 times the rate", rates=((FACTORS, 6.0),)),
    "router-only": Variant("only the routers train", stages=((1.0, _ROUTER),)),
    "experts-only": Variant("only the experts train", stages=((1.0, _EXPERTS),)),
    "experts-then-all": Variant("experts for 1/4, then everything", stages=((0.25, _EXPERTS), (0.75, _ALL))),
    "blockwise-first": Variant("block-wise for 1/4, then everything", stages=((0.25, _BLOCKWISE), (0.75, _ALL))),
    "ce-only": Variant("alpha 0 (no teacher)", settings=("distillation.loss.alpha=0",)),
    "alpha-0.5": Variant("alpha 0.5", settings=("distillation.loss.alpha=0.5",)),
    "alpha-1": Variant("alpha 1 (teacher only)", settings=("distillation.loss.alpha=1",)),
    "temperature-2": Variant("T 2", settings=("distillation.loss.temperature=2",)),
    "reverse-kl": Variant("reverse KL", settings=("distillation.loss.divergence=reverse_kl",)),
    "double-rate": Variant("twice the learning rate", settings=("distillation.training.learning_rate=1.2e-3",)),
    "high-rate": Variant("8 times the learning rate", settings=(_HIGH_RATE,)),
    "high-rate-skip": Variant(
        "the same, spikes skipped",
        settings=(
            _HIGH_RATE,
            "distillation.training.spikes.action=skip",
            "distillation.training.spikes.window=10",
            "distillation.training.spikes.grad_norm_factor=2",
        ),
        against="high-rate",
    ),
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
            f"distillation.training.save_steps={max(1, options.steps // 4)}",
            "distillation.training.save_total_limit=1",
            *FORMS[variant.form],
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
    # Not those of the preset, which have what the study found.
    distillation.parameter_lr_multipliers = own + DistillationConfig().parameter_lr_multipliers
    return config


def zero_shot(form: str, seed: int, options: argparse.Namespace) -> Run:
    """The run whose checkpoint-0 the variants of a form start from, and which fills the cache of its seed."""
    run = Run.create(
        options.out / "-".join(["zero", form, str(seed), str(options.steps)]),
        config_of(Variant("", form=form), seed, options),
    )
    if not run.finished("compress"):
        compress(run)
    if not (run.teacher_logits_dir / MANIFEST).exists():
        generate_teacher_logits(run)
    return run


def fits(variant: Variant, checkpoint: Path) -> bool:
    """Whether a student has something for each pattern of the variant's rates; an absent core is an empty tensor."""
    stored = Checkpoint(checkpoint)
    names = [name for name in stored if stored[name].numel]
    return all(any(re.search(pattern, name) for name in names) for pattern, _ in variant.rates)


def train(name: str, seed: int, start: Run, options: argparse.Namespace) -> Run:
    """Train one variant from the zero-shot student of `start`, or go on with it."""
    run = Run.create(run_directory(name, seed, options), config_of(VARIANTS[name], seed, options))
    if not run.checkpoint(0).exists():
        run.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        with directory_in_progress(run.checkpoint(0)) as directory:
            shutil.copytree(start.checkpoint(0), directory, dirs_exist_ok=True)
    distill(run)
    return run


def run_directory(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a variant trains."""
    return options.out / "runs" / f"{name}-{seed}-{options.steps}"


def measure(checkpoint: Path, config: Config, directory: Path) -> TextScore:
    """Loss on held-out text and KL from the teacher, of a checkpoint; the teacher's pass is kept in a directory."""
    teacher = teacher_text(Path(teacher_path(config)), config, directory)
    student = load_model(str(checkpoint), dtype="float32")
    return score_text(student, teacher.rows, teacher, progress=False)


def table(results: Sequence[dict[str, Any]], steps: int) -> str:
    """The results as Markdown: means over seeds, standard deviations, and paired differences."""
    by_variant: dict[str, dict[int, dict[str, Any]]] = {}
    for line in results:
        if line["steps"] == steps:
            by_variant.setdefault(line["variant"], {})[line["seed"]] = line
    lines = [
        "| variant | seeds | held-out loss | against | difference | KL from the teacher | top-1 agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    for form in FORMS:
        lines += _row(by_variant, f"{ZERO_SHOT}-{form}", f"before training: {form}", f"{ZERO_SHOT}-{BASELINE}")
    for name, variant in VARIANTS.items():
        lines += _row(by_variant, name, f"{name}: {variant.words}", variant.against)
    return "\n".join(lines) + "\n"


def _row(by_variant: dict[str, dict[int, dict[str, Any]]], name: str, words: str, against: str) -> list[str]:
    runs, base = by_variant.get(name), by_variant.get(against, {})
    if not runs:
        return []
    paired = [] if name == against else [run["loss"] - base[seed]["loss"] for seed, run in runs.items() if seed in base]
    cells = [
        words,
        str(len(runs)),
        _spread([run["loss"] for run in runs.values()]),
        against.removeprefix(f"{ZERO_SHOT}-") if paired else "",
        _spread(paired, sign=True) if paired else "",
        _spread([run["kl"] for run in runs.values()]),
        f"{100 * statistics.mean(run['agreement'] for run in runs.values()):.1f} %",
    ]
    return ["| " + " | ".join(cells) + " |"]


def _spread(values: Sequence[float], *, sign: bool = False) -> str:
    mean = f"{statistics.mean(values):{'+' if sign else ''}.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


class Study:
    """The results so far, and how long what is left will take."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.log = options.out / "results.jsonl"
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.results = [json.loads(line) for line in lines]
        # One directory is one study: results at other sizes are not comparable.
        facts = {"kept": options.kept, "rows": options.rows, "overrides": list(options.overrides)}
        made_from = options.out / "study.json"
        if made_from.exists() and json.loads(made_from.read_text(encoding="utf-8")) != facts:
            raise SystemExit(f"{made_from} is of a study with other settings; choose another --out")
        write_json(made_from, facts)

    def has(self, name: str, seed: int) -> bool:
        """Whether a variant has been measured."""
        return any(
            (line["variant"], line["seed"], line["steps"]) == (name, seed, self.options.steps) for line in self.results
        )

    def record(self, name: str, seed: int, checkpoint: Path, config: Config, started: float) -> None:
        """Measure a checkpoint and append its line."""
        score = measure(checkpoint, config, self.options.out)
        line = {"variant": name, "seed": seed, "steps": self.options.steps, "loss": score.loss, "kl": score.kl}
        line |= {"agreement": score.top1_agreement, "tokens": self.options.steps * TOKENS_PER_STEP}
        self.results.append(line | {"seconds": round(time.perf_counter() - started, 1)})
        append_line(self.log, self.results[-1])

    def seconds_per_variant(self) -> float:
        """Of training and scoring one, as measured; before the first, as on one core of the docs' machine."""
        own = [line for line in self.results if line["variant"] in VARIANTS and line["steps"] == self.options.steps]
        return statistics.median(
            [line["seconds"] for line in own] or [self.options.steps * TOKENS_PER_STEP / 2200 + 30]
        )

    def run(self) -> None:
        """Do what is missing."""
        options = self.options
        todo = [(seed, name) for seed in options.seeds for name in options.variants if not self.has(name, seed)]
        for number, (seed, name) in enumerate(todo):
            each = self.seconds_per_variant()
            left = len(todo) - number
            print(
                f"== {name}, seed {seed}: {left} trainings left, about {each / 60:.1f} min each, "
                f"{left * each / 3600:.1f} h in all",
                flush=True,
            )
            form = VARIANTS[name].form
            start = zero_shot(form, seed, options)
            if not self.has(f"{ZERO_SHOT}-{form}", seed):
                self.record(f"{ZERO_SHOT}-{form}", seed, start.checkpoint(0), start.config, time.perf_counter())
            if not fits(VARIANTS[name], start.checkpoint(0)):
                print(f"{name}: left out, the student has no such part", flush=True)
                continue
            started = time.perf_counter()
            try:
                run = train(name, seed, start, options)
            except UserError as error:  # a rate that is too high, say; the others go on
                print(f"{name}, seed {seed}: {error}", flush=True)
                continue
            self.record(name, seed, run.checkpoints()[-1][1], run.config, started)
            shutil.rmtree(run.path)  # its weights; what was measured is in the log
            write_atomically(options.out / "study.md", self.text())
        print(self.text())

    def text(self) -> str:
        """The table with what it was made of."""
        tokens = self.options.steps * TOKENS_PER_STEP
        words = f"{tokens:,} tokens each, {self.options.kept:.0%} of the expert bytes, torch {torch.__version__}."
        return f"{words}\n\n{table(self.results, self.options.steps)}"


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
    options.out.mkdir(parents=True, exist_ok=True)
    Study(options).run()


if __name__ == "__main__":
    main()
