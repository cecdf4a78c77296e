"""wandb, tensorboard and trackio around a training: one run in each, whatever stages, resumes and other runs there are.

The Trainer's own callbacks send the numbers. What they leave to the environment is set here, while a training runs:
where files go, and a name and id that belong to the run directory, so that a training that goes on does so in the same
run of the tracker.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moe_compress.files import write_atomically
from moe_compress.torchrun import rank

if TYPE_CHECKING:
    from moe_compress.run import Run

# Trackers by their name in `report_to`, and the module that each needs.
TRACKERS = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}

_ID_FILE = "tracker_id"


def tracker_name(run: Run) -> str:
    """What a training is called in its trackers: the run directory's name, and an id made with its first training."""
    return f"{run.path.resolve().name}-{_tracker_id(run)}"


def _tracker_id(run: Run) -> str:
    path = run.logs_dir / _ID_FILE
    if not path.exists() and rank() == 0:
        write_atomically(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8") if path.exists() else ""  # other ranks send nothing


@contextmanager
def tracking(run: Run) -> Iterator[None]:
    """Set the trackers' environment for this block, what the user has set going first, and end their runs after it."""
    chosen = run.config.distillation.training.report_to
    wanted: dict[str, str] = {}
    if "wandb" in chosen:
        wanted |= {"WANDB_PROJECT": run.config.wandb_project, "WANDB_DIR": str(run.logs_dir)}
        wanted |= {"WANDB_RUN_ID": _tracker_id(run), "WANDB_RESUME": "allow"}
    if "tensorboard" in chosen:
        wanted["TENSORBOARD_LOGGING_DIR"] = str(run.logs_dir / "tensorboard" / "training")
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    failed = True
    try:
        yield
        failed = False
    finally:
        for name in added:
            os.environ.pop(name, None)
        wandb = sys.modules.get("wandb")
        if "wandb" in chosen and wandb is not None:
            # The Trainer leaves it open: the next training of this process would write into it.
            wandb.finish(exit_code=int(failed))


def metric_names(patterns: Iterable[str]) -> dict[str, str]:
    r"""For each regular expression a name that trackers take: `\.experts\.` becomes `experts`."""
    names: dict[str, str] = {}
    for pattern in patterns:
        if pattern in names:
            continue
        name = plain = re.sub(r"[^0-9A-Za-z]+", "_", re.sub(r"\\.", "_", pattern)).strip("_") or "all"
        number = 1
        while name in names.values():
            number += 1
            name = f"{plain}_{number}"
        names[pattern] = name
    return names
