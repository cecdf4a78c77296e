"""Which stages `moe-compress run` goes through."""

from pathlib import Path

import pytest

from moe_compress import compression, distillation, evaluation, report
from moe_compress.config import Config, StageConfig
from moe_compress.pipeline import run_all
from moe_compress.run import Run


@pytest.mark.parametrize(
    ("stages", "written"),
    [([], True), ([StageConfig(kind="blockwise", steps=2)], False), ([StageConfig(steps=2, alpha=0.0)], False)],
)
def test_the_cache_is_written_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: list[StageConfig], written: bool
) -> None:
    called: list[str] = []
    for module, name in (
        (compression, "compress"),
        (distillation, "generate_teacher_logits"),
        (distillation, "distill"),
        (evaluation, "evaluate_run"),
        (report, "write_report"),
    ):
        monkeypatch.setattr(module, name, lambda run, name=name: called.append(name), raising=False)
    config = Config()
    config.distillation.stages = stages
    config.evaluation.baseline = False
    run_all(Run(tmp_path, config))
    assert called == ["compress", *["generate_teacher_logits"] * written, "distill", "evaluate_run", "write_report"]
