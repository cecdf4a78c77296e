"""Several runs on one page, and several models in one table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.evaluation.results import append_result, settings_fingerprint
from moe_compress.report import models
from moe_compress.report.collect import collect
from moe_compress.report.comparison import build_comparison, compare_runs, labels
from moe_compress.report.models import compare_models
from moe_compress.schema import flatten
from moe_compress.settings import write

from .conftest import record


def sections(*runs):
    named = [(run.path.name, collect(run)) for run in runs]
    return {section.name: section for section in build_comparison(named, [flatten(run.config) for run in runs])}


def test_two_runs_on_one_page(make_run, tmp_path, capsys):
    first, second = make_run(), make_run(core=1.7, name="other")
    second.config.compression.rank = 32
    write(second.path / "config.yaml", second.config)
    compare_runs([first.path, second.path], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h1>run against other</h1>" in page and "https:" not in page and page.count("<svg") == 4
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["tables"]["Settings that differ"]["rows"] == [["compression.rank", "64", "32"]]
    quality = data["tables"]["Held-out text and tasks"]["rows"]
    assert [row[0] for row in quality] == [
        "original of run", "run, zero-shot", "run, distilled", "other, zero-shot", "other, distilled",
    ]  # fmt: skip
    assert set(data["results"]) == {"run", "other"}
    assert "other is worse than run: its loss differs by +0.2000 ± 0.0000" in capsys.readouterr().out.replace("\n", " ")
    assert "| compression.rank | 64 | 32 |" in (tmp_path / "out" / "report.md").read_text()


def test_runs_that_say_the_same(make_run):
    found = sections(make_run(core=1.7), make_run(core=1.7, name="other"))
    assert found["settings-compared"].text == ["All settings are the same."]
    assert "other cannot be told apart from run" in found["findings"].text[0]


def test_runs_on_different_text_are_not_compared(make_run):
    first, second = make_run(), make_run(name="other")
    second.config.evaluation.perplexity.max_samples = 3
    append_result(second.evals_dir, record(second.config, "student", 50, 1.0))
    write(second.path / "config.yaml", second.config)
    (line,) = sections(first, second)["findings"].text
    assert line == "other and run were measured on different text: their losses do not compare."


def test_a_run_with_nothing_yet(make_run, tmp_path):
    from moe_compress.config import Config
    from moe_compress.run import Run

    found = sections(make_run(), Run.create(tmp_path / "new", Config()))
    assert found["findings"].text == ["new has no measurement yet."]


def test_what_is_no_run_is_refused(make_run, tmp_path):
    run = make_run()
    with pytest.raises(UserError, match="none is not a run directory"):
        compare_runs([run.path, tmp_path / "none"], tmp_path / "out")
    with pytest.raises(UserError, match="named twice"):
        compare_runs([run.path, run.path], tmp_path / "out")


def test_labels_are_as_short_as_they_can_be():
    assert labels([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert labels([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]


def test_models_in_one_table(make_run, tmp_path, monkeypatch, capsys):
    config = make_run().config
    records = [
        record(config, "original", 0, 1.2, kl=None),
        record(config, "small", 0, 1.5),
        {"model": "broken", "step": 0, "path": "c", "error": "no weights", "settings": settings_fingerprint(config)},
    ]
    monkeypatch.setattr(models, "evaluate_models", lambda *args, **kwargs: records)
    with pytest.raises(UserError, match="broken could not be measured: no weights"):
        compare_models(["small", "broken"], config, tmp_path / "out", teacher="original")
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["teacher"] == "original" and found["results"] == json.loads(json.dumps(records))
    assert [row[0] for row in found["tables"]["Held-out text and tasks"]["rows"]] == ["original", "small"]
    assert "25 ± 11 %" in (tmp_path / "out" / "evaluation.md").read_text()
    assert "4.48" in capsys.readouterr().out


def test_a_lost_task_of_a_model_is_said(make_run, tmp_path, monkeypatch):
    records = [record(make_run().config, "small", 0, 1.5)]
    monkeypatch.setattr(models, "evaluate_models", lambda *args, **kwargs: records)
    with pytest.raises(UserError, match="task wikitext of small could not be measured: ConnectionError: no network"):
        compare_models(["small"], Config(), tmp_path / "out")


def test_a_loss_that_is_not_finite_is_said(make_run):
    first, second = make_run(), make_run(name="other")
    append_result(second.evals_dir, record(second.config, "student", 50, math.nan))
    (line,) = sections(first, second)["findings"].text
    assert line == "other and run do not compare: the loss of other is not finite."


def test_a_table_of_different_text_says_so(make_run):
    first, second = make_run(), make_run(name="other")
    second.config.evaluation.perplexity.max_samples = 3
    second.config.seed = 1
    append_result(second.evals_dir, record(second.config, "student", 50, 1.0, tokens=1533, sequences=3))
    write(second.path / "config.yaml", second.config)
    (table,) = sections(first, second)["quality"].tables
    assert table.note == "Not all on the same text (1,533 to 3,066 held-out tokens); ± is the standard error."
