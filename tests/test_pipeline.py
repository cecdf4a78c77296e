"""Which stages `moe-compress run` goes through."""

from pathlib import Path

import pytest

from moe_compress import compression, distillation, evaluation, report
from moe_compress.config import Config, StageConfig
from moe_compress.errors import UserError
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


@pytest.mark.parametrize("measured", [True, False])
def test_what_was_measured_is_reported_also_where_something_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    reported: list[Run] = []

    def loses_a_task(run: Run) -> None:
        raise UserError("not measured: wikitext")

    for module, name in (
        (compression, "compress"),
        (distillation, "generate_teacher_logits"),
        (distillation, "distill"),
    ):
        monkeypatch.setattr(module, name, lambda run: None, raising=False)
    monkeypatch.setattr(evaluation, "evaluate_run", loses_a_task, raising=False)
    monkeypatch.setattr(report, "write_report", reported.append, raising=False)
    monkeypatch.setattr(Run, "finished", lambda run, stage: measured and stage == "evaluate")
    config = Config()
    config.evaluation.baseline = False
    with pytest.raises(UserError, match="wikitext"):
        run_all(Run(tmp_path, config))
    assert bool(reported) == measured
