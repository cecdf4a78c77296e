"""Results in the trackers: keyed by the checkpoint's step in any order, and never able to stop a measurement."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moe_compress.evaluation.trackers import Trackers
from moe_compress.run import Run

RECORD = {
    "model": "student",
    "perplexity": 9.0,
    "kl": 0.5,
    "tasks": {"stdlib_next_line": {"acc": 0.5, "acc_stderr": 0.1, "few_shot": 0}},
}


class Board(ModuleType):
    """Stands for wandb and trackio: remembers what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, (args, kwargs)))
            return self

        return call

    def sent(self) -> list[dict[str, float]]:
        return [args[0] for name, (args, _) in self.calls if name == "log"]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def trackers(tmp_path, config, said):
    def make(*names: str) -> Trackers:
        config.distillation.training.report_to = list(names)
        return Trackers(Run.create(tmp_path / "run", config), said.append)

    return make


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_results_are_keyed_by_the_step_of_the_checkpoint(trackers, monkeypatch, name, said):
    board = Board(name)
    monkeypatch.setitem(sys.modules, name, board)
    opened = trackers(name)
    assert board.calls == []  # with nothing to log no run is made
    for step in (500, 200):
        opened.log({**RECORD, "step": step})
    opened.log({"model": "student", "step": 300, "error": "no memory"})
    opened.close()
    assert [name for name, _ in board.calls].count("init") == 1 and board.calls[-1][0] == "finish"
    expected = {"eval/perplexity": 9.0, "eval/kl": 0.5, "eval/stdlib_next_line/acc": 0.5}
    assert board.sent() == [{**expected, "checkpoint_step": step} for step in (500, 200)]
    project = next(kwargs["project"] for name, (_, kwargs) in board.calls if name == "init")
    assert project == "moe-compression" and said == []


def test_tensorboard_gets_scalars_by_step(trackers, monkeypatch, tmp_path):
    written: list[Any] = []
    writer = SimpleNamespace(
        add_scalar=lambda *args: written.append(args), flush=lambda: None, close=lambda: written.append("closed")
    )
    directories: list[str] = []
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda directory: directories.append(directory) or writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    opened = trackers("tensorboard")
    opened.log({**RECORD, "step": 500})
    opened.log({**RECORD, "step": 0, "model": "teacher", "tasks": {}})
    opened.close()
    assert ("eval/perplexity", 9.0, 500) in written and ("eval/teacher/perplexity", 9.0, 0) in written
    assert written[-1] == "closed" and directories[0].startswith(str(tmp_path / "run" / "logs" / "tensorboard"))


def test_what_is_not_there_costs_one_line(trackers, monkeypatch, said):
    monkeypatch.setitem(sys.modules, "wandb", None)
    opened = trackers("none", "wandb", "mlflow")
    opened.log({**RECORD, "step": 500})
    opened.log({**RECORD, "step": 600})
    opened.close()
    assert said == [
        "results are not sent to wandb: not installed (pip install 'moe-compress[wandb]')",
        "results are not sent to 'mlflow'; known are: tensorboard, wandb, trackio",
    ]


def test_a_tracker_that_fails_stops_nothing(trackers, monkeypatch, said):
    board = Board("trackio")
    monkeypatch.setitem(sys.modules, "trackio", board)
    opened = trackers("trackio")
    opened.log({**RECORD, "step": 1})
    monkeypatch.setattr(board, "log", lambda *_, **__: 1 / 0, raising=False)
    opened.log({**RECORD, "step": 2})
    assert said == ["trackio did not take a result: division by zero"]
