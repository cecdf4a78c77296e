"""The examples: what their caller gives is what they use."""

import runpy
from pathlib import Path

import pytest

from moe_compress.config import Config
from moe_compress.run import Run

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_overrides_win_over_the_values_of_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def create(path: Path, config: Config) -> Run:
        raise Seen(config)

    monkeypatch.setattr(Run, "create", create)
    main = runpy.run_path(str(EXAMPLES / "distillation_example.py"))["main"]

    def settings_of(*overrides: str) -> Config:
        with pytest.raises(Seen) as seen:
            main(str(tmp_path / "run"), *overrides)
        return seen.value.args[0]

    config = settings_of()
    assert (config.compression.target_ratio, config.evaluation.limit) == (0.25, 20)
    assert [stage.steps for stage in config.distillation.stages] == [20, 20]
    config = settings_of("compression.target_ratio=0.5", "evaluation.limit=7", "distillation.stages.1.steps=300")
    assert (config.compression.target_ratio, config.evaluation.limit) == (0.5, 7)
    assert [stage.steps for stage in config.distillation.stages] == [20, 300]
    assert [stage.name for stage in settings_of("distillation=router_only").distillation.stages] == ["router"]
