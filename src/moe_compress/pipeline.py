"""All stages of a run in order, and the nested run of the baseline: plain per-expert SVD at the same bytes."""

from __future__ import annotations

import json

from moe_compress.config import Config
from moe_compress.distillation.stages import reads_cache
from moe_compress.errors import UserError
from moe_compress.run import Run
from moe_compress.settings import compose

BASELINE = "baseline_svd"


def run_all(run: Run) -> None:
    """Compress, write teacher logits if they are read, distil, evaluate and report; finished stages are passed over.

    With `evaluation.baseline` the same is done, before the evaluation, for per-expert SVD without a core at the same
    expert bytes, with the same calibration and the same distillation from the same cache, in `RUN/baseline_svd`.
    """
    from moe_compress.compression import compress
    from moe_compress.distillation import distill, generate_teacher_logits
    from moe_compress.evaluation import evaluate_run
    from moe_compress.report import write_report

    compress(run)
    if reads_cache(run.config.distillation):
        generate_teacher_logits(run)
    distill(run)
    if run.config.evaluation.baseline:
        baseline = Run.create(run.path / BASELINE, baseline_config(run))
        compress(baseline)
        distill(baseline)
    try:
        evaluate_run(run)
    except UserError:
        if run.finished("evaluate"):  # something could not be measured; the rest was
            write_report(run)
        raise
    write_report(run)


def baseline_config(run: Run) -> Config:
    """The settings of the baseline: `compression=svd` on the calibration of the run, at the run's expert bytes."""
    totals = json.loads((run.path / "compression.json").read_text(encoding="utf-8"))["totals"]
    config = compose(["compression=svd"], base=run.config)
    config.run = None
    config.experiment_name = f"{run.config.experiment_name}-svd"
    config.compression.target_bytes = totals["expert_bytes_after"]
    config.compression.target_ratio = None
    # A rank of any size: the rival gets every byte that ours has.
    config.compression.rank_multiple = 1
    config.distillation.teacher.cache_dir = str(run.teacher_logits_dir)
    config.evaluation.baseline = False
    return config
