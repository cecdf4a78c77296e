"""What is set up around the trackers of a training (none of them is installed where the tests run)."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from moe_compress.distillation.trackers import metric_names, tracker_name, tracking

from .conftest import MakeRun


def test_a_training_is_one_run_of_its_trackers_and_leaves_nothing_behind(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda exit_code: ended.append(exit_code)))
    for name in [name for name in os.environ if name.startswith(("WANDB", "TENSORBOARD"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_PROJECT", "the user's own")
    before = dict(os.environ)
    one, other = (make_run(name, report_to=["wandb", "tensorboard"]) for name in ("one", "other"))
    ids = []
    for run in (one, one, other):
        with tracking(run):
            ids.append(os.environ["WANDB_RUN_ID"])
            assert os.environ["WANDB_RESUME"] == "allow" and os.environ["WANDB_PROJECT"] == "the user's own"
            assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(run.logs_dir / "tensorboard" / "training")
        assert dict(os.environ) == before
    assert ids[0] == ids[1] != ids[2]
    assert tracker_name(one) == f"one-{ids[0]}" and tracker_name(other) == f"other-{ids[2]}"
    with pytest.raises(KeyError), tracking(one):
        raise KeyError
    assert dict(os.environ) == before and ended == [0, 0, 0, 1]


def test_patterns_become_names_of_metrics() -> None:
    patterns = [r"\.experts\.", r"(embed_tokens|lm_head)\.", r"\.experts\.\w*proj$", ".*", r"experts", r"\.experts\."]
    assert metric_names(patterns) == {
        r"\.experts\.": "experts",
        r"(embed_tokens|lm_head)\.": "embed_tokens_lm_head",
        r"\.experts\.\w*proj$": "experts_proj",
        ".*": "all",
        r"experts": "experts_2",
    }
