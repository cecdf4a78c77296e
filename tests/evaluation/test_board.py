"""The state of a run read from its files, as a table and as lines."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from moe_compress.evaluation.board import View, states, table_of
from moe_compress.evaluation.claims import claimed
from moe_compress.evaluation.evaluator import student_targets
from moe_compress.evaluation.results import append_result, link_best, settings_fingerprint
from moe_compress.run import Run


@pytest.fixture
def run(make_run) -> Run:
    run = make_run(0, 2, 4, 6)
    settings = settings_fingerprint(run.config)
    common = {"model": "student", "settings": settings}
    append_result(run.evals_dir, {**common, "step": 0, "path": "a", "perplexity": 12.5, "kl": 0.25, "seconds": 3})
    append_result(run.evals_dir, {**common, "step": 2, "path": "b", "error": "no memory"})
    append_result(run.evals_dir, {**common, "step": 1, "path": "gone", "perplexity": 11.0, "seconds": 3})
    append_result(run.evals_dir, {**common, "step": 4, "path": "c", "settings": "others"})
    link_best(run.path, run.checkpoint(0))
    return run


def claim(run: Run, step: int):
    target = next(target for target in student_targets(run) if target.step == step)
    return claimed(run.evals_dir / "claims", target.claim(settings_fingerprint(run.config)), device="cuda:2")


def test_every_state(run):
    with claim(run, 4):
        found = states(run, student_targets(run))
    assert [(state.key[1], state.state) for state in found] == [
        (0, "done"), (1, "done"), (2, "failed"), (4, "evaluating"), (6, "waiting"),
    ]  # fmt: skip
    assert found[2].detail == "no memory" and found[3].detail.startswith("cuda:2, process ")


def test_the_table(run):
    console = Console(file=io.StringIO(), width=120)
    with claim(run, 4):
        console.print(table_of(run, states(run, student_targets(run)), "writing samples"))
    text = console.file.getvalue()
    for words in ("done (best)", "12.5", "0.25", "failed no memory", "evaluating cuda:2", "waiting", "writing samples"):
        assert words in text, words


def test_brackets_of_an_error_are_shown(run):
    error = "[enforce fail at alloc_cpu.cpp:128] no such file: [/mnt/x]"
    common = {"model": "student", "step": 6, "path": "d", "settings": settings_fingerprint(run.config)}
    append_result(run.evals_dir, {**common, "error": error})
    console = Console(file=io.StringIO(), width=200)
    console.print(table_of(run, states(run, student_targets(run)), "writing to [/mnt/y]"))
    assert error in console.file.getvalue() and "writing to [/mnt/y]" in console.file.getvalue()


def test_lines_as_it_changes_where_there_is_no_terminal(run, capsys):
    view = View(run, lambda: student_targets(run), Console(file=io.StringIO()))
    with view.shown():
        view.say("watching")
        view.update()
        with claim(run, 4):
            view.update()
            view.update()
        append_result(
            run.evals_dir,
            {
                "model": "student", "step": 4, "settings": settings_fingerprint(run.config), "path": "c", "seconds": 2,
                "perplexity": 10.0, "tasks": {"wikitext": {"error": "no network"}},
            },
        )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "watching" and lines[1].startswith("evaluating student at step 4 (cuda:2, process ")
    assert lines[2:] == ["  student at step 4: perplexity 10 (2 s)", "  task wikitext not measured: no network"]


def test_a_file_that_goes_away_while_it_is_read_ends_nothing(run, capsys):
    def gone():
        raise FileNotFoundError

    for console in (Console(file=io.StringIO()), Console(file=io.StringIO(), force_terminal=True)):
        with View(run, gone, console).shown() as view:
            view.update()


def test_on_a_terminal_the_table_stays_and_other_output_goes_to_a_log(run, capsys):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with View(run, lambda: student_targets(run), console).shown() as view:
        view.say("measuring speed")
        view.update()
        print("a progress bar", file=sys.stderr)
    assert "12.5" in console.file.getvalue()
    assert capsys.readouterr() == ("", "")
    assert "a progress bar" in (run.logs_dir / "evaluation.log").read_text()
