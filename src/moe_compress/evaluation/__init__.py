"""Measuring models: perplexity, agreement with the teacher, lm_eval tasks, routing, speed, of every checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_compress.lazy import lazy_names

if TYPE_CHECKING:
    from moe_compress.evaluation.bench import bench_model
    from moe_compress.evaluation.evaluate import evaluate_run
    from moe_compress.evaluation.harness import run_tasks
    from moe_compress.evaluation.measure import evaluate_model
    from moe_compress.evaluation.models import evaluate_models
    from moe_compress.evaluation.perplexity import score_text
    from moe_compress.evaluation.scores import TextScore
    from moe_compress.evaluation.watch import watch_run

# Lazy, because the report reads results without needing torch, Transformers or lm_eval.
_HOME = {
    "TextScore": "scores",
    "bench_model": "bench",
    "evaluate_model": "measure",
    "evaluate_models": "models",
    "evaluate_run": "evaluate",
    "run_tasks": "harness",
    "score_text": "perplexity",
    "watch_run": "watch",
}

__all__ = [
    "TextScore",
    "bench_model",
    "evaluate_model",
    "evaluate_models",
    "evaluate_run",
    "run_tasks",
    "score_text",
    "watch_run",
]

__getattr__ = lazy_names(__name__, _HOME)
