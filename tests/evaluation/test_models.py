"""Models side by side: original, compressed and dense export, by the code of the watcher."""

from __future__ import annotations

import shutil

import pytest

from moe_compress.errors import UserError
from moe_compress.evaluation import measure
from moe_compress.evaluation.models import evaluate_models
from moe_compress.evaluation.results import read_results
from moe_compress.modeling import export_dense, load_tokenizer


def test_original_compressed_and_dense(config, teacher_dir, student_dir, tmp_path, monkeypatch):
    export_dense(student_dir, tmp_path / "dense")
    said: list[str] = []
    names = [str(student_dir), str(tmp_path / "dense")]
    original, student, dense = evaluate_models(
        names, config, tmp_path / "out", teacher=str(teacher_dir), say=said.append
    )
    assert [record["model"] for record in (original, student, dense)] == [str(teacher_dir), *names]
    assert original["kl"] is None and student["kl"] > 0.01
    assert dense["loss"] == pytest.approx(student["loss"], abs=1e-4)  # the same function, written out
    assert dense["kl"] == pytest.approx(student["kl"], rel=1e-2)
    assert dense["expert_bytes"] == original["expert_bytes"] > student["expert_bytes"]
    assert len(said) == 3

    monkeypatch.setattr(measure, "load_model", None)  # nothing may be loaded again
    again = evaluate_models(names, config, tmp_path / "out", teacher=str(teacher_dir), say=said.append)
    assert again == [original, student, dense] and len(said) == 3


def test_another_tokenizer_is_not_compared(config, teacher_dir, student_dir, tmp_path):
    other = shutil.copytree(student_dir, tmp_path / "other")
    tokenizer = load_tokenizer(other)
    tokenizer.add_tokens(["self.name"])
    tokenizer.save_pretrained(other)
    names = [str(other), str(student_dir)]
    _, refused, student = evaluate_models(names, config, tmp_path / "out", teacher=str(teacher_dir), say=lambda _: None)
    assert "other has another tokenizer than the teacher" in refused["error"] and student["kl"] > 0


def test_without_a_teacher_nothing_is_compared(config, student_dir, tmp_path):
    (record,) = evaluate_models([str(student_dir)], config, tmp_path, say=lambda text: None)
    assert record["kl"] is None and record["perplexity"] > 1 and not list(tmp_path.glob("*.h5"))


def test_a_model_that_cannot_be_measured_does_not_stop_the_rest(config, student_dir, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    empty = tmp_path / "empty"
    empty.mkdir()
    names = [str(broken), str(empty), str(student_dir)]
    first, second, third = evaluate_models(names, config, tmp_path / "out", say=lambda text: None)
    assert "no tokenizer files" in first["error"] and third["perplexity"] > 1
    assert "no config.json" in second["error"] and len(read_results(tmp_path / "out")) == 3
    with pytest.raises(UserError, match="nowhere: no such directory"):
        evaluate_models(["./nowhere"], config, tmp_path / "out")


def test_what_a_task_lacks_is_measured_again(config, student_dir, tmp_path, monkeypatch):
    tasks = [{"wikitext": {"error": "no network"}}, {"wikitext": {"bits_per_byte": 1.0}}]
    monkeypatch.setattr(measure, "run_tasks", lambda *_: tasks.pop(0))
    for left in (1, 0, 0):
        (record,) = evaluate_models([str(student_dir)], config, tmp_path, say=lambda _: None)
        assert len(tasks) == left
    assert record["tasks"] == {"wikitext": {"bits_per_byte": 1.0}}
