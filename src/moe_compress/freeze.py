"""Freezing the settings of a run: writing `config.yaml` once, and what a later stage may still change."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from moe_compress import settings
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.manifest import LOCKS_NAME
from moe_compress.schema import flatten, show
from moe_compress.stages import freezing_stages, is_free, is_per_process
from moe_compress.torchrun import rank

CONFIG_NAME = "config.yaml"
_OWN_FILES = re.compile(r"\.?(config\.yaml|manifest\.json)(\.\d+\.tmp)?")


def store(path: Path, config: Config) -> None:
    """Write `config.yaml` without the settings of this process."""
    if rank() == 0:
        defaults = flatten(Config())
        values = flatten(config)
        plain = {key: defaults[key] if is_per_process(key) else value for key, value in values.items()}
        settings.write(path / CONFIG_NAME, settings.from_values(plain))


def reconcile(
    path: Path, frozen: Config, fresh: Config, later: Config, ran: Collection[str]
) -> tuple[Config | None, Config]:
    """Merge the settings given to a later stage into the frozen ones.

    A setting changes only where both `fresh` and `later` differ from the frozen one: repeating the first command,
    presets and all, changes nothing.

    Args:
        path: the run directory, for messages.
        frozen: what `config.yaml` holds.
        fresh: what the command line means for a new run.
        later: what it means on top of the frozen settings.
        ran: the stages that have left something in this run.

    Returns:
        What to write (None: nothing new), and the settings for this process.

    Raises:
        UserError: another value for a setting that a stage has used already.
    """
    old, first = flatten(frozen), flatten(fresh)
    stored, used, refused = dict(old), dict(old), []
    for key, value in flatten(later).items():
        if old[key] in (value, first[key]):
            continue
        used[key] = value
        if is_free(key):
            continue
        if any(stage in ran for stage in freezing_stages(key)):
            refused.append((key, old[key], value))
        else:
            stored[key] = value
    if refused:
        raise frozen_error(path, refused)
    return (settings.from_values(stored) if stored != old else None), settings.from_values(used)


def differences(frozen: Config, given: Config) -> list[tuple[str, Any, Any]]:
    """Key, frozen and given value of every setting that differs, but for those that no result depends on."""
    old = flatten(frozen)
    return [(key, old[key], new) for key, new in flatten(given).items() if new != old[key] and not is_free(key)]


def frozen_error(path: Path, refused: list[tuple[str, Any, Any]]) -> UserError:
    """The error for settings given another value than the frozen one: key, frozen and given value of each."""
    key, frozen, given = refused[0]
    others = f" (the same holds for {', '.join(key for key, _, _ in refused[1:])})" if refused[1:] else ""
    return UserError(
        f"{key} is frozen at {show(frozen)} in {path / CONFIG_NAME} and was given as {show(given)}{others}; "
        "leave it out, or start another run directory with run=PATH"
    )


def made_files(path: Path) -> set[str]:
    """What stages have left below a run directory: every file but settings, manifest, locks and logs."""
    found = set()
    for directory, names, files in os.walk(path):
        top = Path(directory) == path
        if top:
            names[:] = [name for name in names if name not in (LOCKS_NAME, "logs")]
        for file in files:
            if not file.endswith(".lock") and not (
                top and re.fullmatch(r"\.?(config\.yaml|manifest\.json)(\.\d+\.tmp)?", file)
            ):
                found.add(os.path.join(directory, file))
    return found


def refuse_foreign(path: Path) -> None:
    """Refuse a directory that holds something else than a run.

    Raises:
        UserError: it is a file, or not empty and without `config.yaml`.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"run directory {path} is a file")
    if not (path / CONFIG_NAME).is_file() and made_files(path):
        raise UserError(f"{path} is not empty and is not a run (it has no {CONFIG_NAME}); choose another run=PATH")
