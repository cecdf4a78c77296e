"""The project's own lm_eval tasks: how their questions are made, and that lm_eval scores them offline as by hand."""

from __future__ import annotations

import re
from pathlib import Path

import lm_eval.tasks
import pytest
import torch

from moe_compress.config import EvaluationConfig
from moe_compress.errors import UserError
from moe_compress.evaluation import harness
from moe_compress.evaluation.harness import check_tasks, run_tasks
from moe_compress.evaluation.tasks import stdlib
from moe_compress.reference.data import stdlib_documents, stdlib_files, stdlib_root

from .conftest import make_model


@pytest.fixture(scope="module")
def training_lines() -> set[str]:
    return {line.strip() for text in stdlib_documents("train") for line in text.splitlines()}


def test_next_line_questions_are_sound(training_lines):
    root, files = stdlib_root(), {path.relative_to(stdlib_root()).as_posix() for path in stdlib_files("test")}
    questions = stdlib.next_line_questions()
    assert 200 <= len(questions) <= stdlib.MAX_QUESTIONS  # a distribution may leave out parts of the library
    labels = [question["label"] for question in questions]
    assert all(labels.count(label) > 0.15 * len(labels) for label in range(4))
    for question in questions:
        name, number = question["file"].rsplit(":", 1)
        assert name in files
        lines = [line.rstrip() for line in (root / name).read_text(encoding="utf-8").splitlines()]
        answer = lines[int(number)]
        context = question["context"].splitlines()
        assert context == lines[int(number) - stdlib.CONTEXT_LINES : int(number)]
        assert question["choices"][question["label"]] == answer
        assert len(set(question["choices"])) == 4
        own = {line.strip() for line in lines}
        for place, choice in enumerate(question["choices"]):
            assert choice.strip() not in training_lines
            assert len(choice) - len(choice.lstrip()) == len(answer) - len(answer.lstrip())
            assert (choice.strip() in own) == (place == question["label"])


def test_identifier_questions_are_sound(training_lines):
    questions = stdlib.identifier_questions()
    assert 200 <= len(questions) <= stdlib.MAX_QUESTIONS  # a distribution may leave out parts of the library
    for question in questions:
        name, row, column = question["file"].rsplit(":", 2)
        line = (stdlib_root() / name).read_text(encoding="utf-8").splitlines()[int(row)].rstrip()
        assert line.strip() not in training_lines
        assert line[int(column) :].startswith(question["identifier"])
        *above, last = question["context"].split("\n")
        assert last == line[: int(column)]
        assert re.search(rf"\b{re.escape(question['identifier'])}\b", "\n".join(above))


def test_questions_depend_on_nothing_but_the_library(tmp_path):
    text = "\n".join(f"result_{number} = compute(value_{number % 5}, {number})" for number in range(40))
    for number in range(40):  # enough files for some to fall into the test split
        (tmp_path / f"module_{number}.py").write_text(text.replace("compute", f"compute_{number}"), encoding="utf-8")
    first = stdlib.next_line_questions(tmp_path)
    stdlib.next_line_questions.cache_clear()
    assert stdlib.next_line_questions(tmp_path) == first
    assert {question["file"].rsplit(":", 1)[0] for question in first} == {
        path.name for path in stdlib_files("test", tmp_path)
    }


def test_a_line_that_the_file_has_elsewhere_is_no_distractor(tmp_path):
    shared = [f"shared_{number} = compute({number})" for number in range(30)]
    for number in range(40):
        own = [f"own_{number}_{line} = compute({line})" for line in range(10)]
        (tmp_path / f"module_{number}.py").write_text("\n".join([*own, *shared]), encoding="utf-8")
    for path in stdlib_files("train", tmp_path):  # else no shared line would be asked for
        path.unlink()
    questions = stdlib.next_line_questions(tmp_path)
    assert questions
    for question in questions:
        wrong = [choice for place, choice in enumerate(question["choices"]) if place != question["label"]]
        assert not set(wrong) & set(shared)


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    stripped = context.rstrip()
    prefix = len(tokenizer(stripped)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    scores = model(input_ids=ids).logits[0, prefix - 1 : -1].float().log_softmax(-1)
    targets = ids[0, prefix:]
    return scores.gather(-1, targets[:, None]).sum().item(), bool((scores.argmax(-1) == targets).all())


def test_lm_eval_offline_agrees_with_hand_scoring(tokenizer):
    model = make_model()
    config = EvaluationConfig(tasks={"stdlib_next_line": -1, "stdlib_identifier": 0}, limit=12)
    results = run_tasks(model, tokenizer, config, seed=1)
    right, right_by_length = 0, 0
    for question in stdlib.next_line_questions()[:12]:
        scores = [log_likelihood(model, tokenizer, question["context"], choice)[0] for choice in question["choices"]]
        lengths = [len(choice) for choice in question["choices"]]
        by_length = [score / length for score, length in zip(scores, lengths, strict=True)]
        right += scores.index(max(scores)) == question["label"]
        right_by_length += by_length.index(max(by_length)) == question["label"]
    found = results["stdlib_next_line"]
    assert (found["acc"], found["acc_norm"]) == pytest.approx((right / 12, right_by_length / 12))
    assert found["acc_stderr"] > 0 or right in (0, 12)
    assert (found["few_shot"], found["documents"]) == (0, 12)
    greedy = [
        log_likelihood(model, tokenizer, question["context"], question["identifier"])[1]
        for question in stdlib.identifier_questions()[:12]
    ]
    assert results["stdlib_identifier"]["acc"] == pytest.approx(sum(greedy) / 12)


@pytest.fixture
def only_local_tasks(monkeypatch):
    """lm_eval's own thousands of tasks take long to read and have nothing to do with what is tested."""
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path, include_defaults: manager(None, include_path, False)
    )
    harness._task_manager.cache_clear()
    yield
    harness._task_manager.cache_clear()


def test_an_unknown_task_names_the_nearest(only_local_tasks):
    with pytest.raises(UserError, match="'stdlib_nextline'.*nearest names are: stdlib_next_line"):
        check_tasks(EvaluationConfig(tasks={"stdlib_nextline": -1}))
    with pytest.raises(UserError, match="no task has a similar name"):
        check_tasks(EvaluationConfig(tasks={"qqq": -1}))


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="batch_size is 'many'"):
        check_tasks(EvaluationConfig(tasks={}, batch_size="many"))
    with pytest.raises(UserError, match="include_path .* is not a directory"):
        check_tasks(EvaluationConfig(tasks={"stdlib_next_line": -1}, include_path=str(tmp_path / "none")))


def test_a_task_without_its_data_is_an_error_that_stops_nothing(tmp_path: Path, tokenizer):
    yaml = (
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: /nowhere/at/all.json}\n"
        "output_type: loglikelihood\ntest_split: train\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    (tmp_path / "broken.yaml").write_text(yaml, encoding="utf-8")
    config = EvaluationConfig(tasks={"broken": -1, "stdlib_next_line": -1}, include_path=str(tmp_path), limit=2)
    results = run_tasks(make_model(), tokenizer, config, seed=1)
    assert list(results) == ["broken", "stdlib_next_line"]
    assert "/nowhere/at/all.json" in results["broken"]["error"] and "\n" not in results["broken"]["error"]
    assert "acc" in results["stdlib_next_line"]


def test_no_tasks_no_lm_eval(tokenizer):
    assert run_tasks(make_model(), tokenizer, EvaluationConfig(tasks={}), seed=1) == {}
