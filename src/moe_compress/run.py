"""The run directory: settings frozen in `config.yaml`, a manifest of the stages, and where their outputs lie.

    RUN/config.yaml    the resolved settings, written by the first stage
    RUN/manifest.json  per stage: status, times, versions, fingerprint of the settings it read, facts it recorded
    RUN/checkpoints/   checkpoint-0 (the zero-shot student) and checkpoint-<step>
    RUN/teacher_logits/  RUN/evals/  RUN/logs/  RUN/best -> checkpoints/checkpoint-<step>

Under torchrun every rank reads the run and rank 0 alone writes it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_compress import settings
from moe_compress.config import Config
from moe_compress.distillation.stages import reads_cache
from moe_compress.errors import UserError
from moe_compress.files import fingerprint
from moe_compress.freeze import (
    CONFIG_NAME,
    differences,
    frozen_error,
    made_files,
    reconcile,
    refuse_foreign,
    store,
)
from moe_compress.manifest import LOCKS_NAME, MANIFEST_NAME, Manifest, locked, timestamp, versions
from moe_compress.modeling.checkpoint import find_shards
from moe_compress.schema import flatten
from moe_compress.stages import STAGES, freezing_stages, is_free
from moe_compress.torchrun import rank

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class Run:
    """A run directory and its settings.

    Attributes:
        path: the directory.
        config: the settings, resolved; with what was given for this process alone, such as a worker's number.
    """

    def __init__(self, path: Path | str, config: Config) -> None:
        """Bind a directory to settings; reads and writes nothing (see `create`, `open` and `open_run`)."""
        self.path = Path(path)
        self.config = replace(config, run=str(self.path))
        self._manifest = Manifest(self.path)

    @classmethod
    def create(cls, path: Path | str, config: Config) -> Run:
        """Freeze settings in a new run directory, or open it when it holds the same ones.

        Raises:
            UserError: the directory holds something else, or a run with other settings (one of them is named).
        """
        path = Path(path)
        if not (path / CONFIG_NAME).is_file():
            refuse_foreign(path)
            store(path, config)
        else:
            differing = differences(settings.read(path / CONFIG_NAME), config)
            if differing:
                raise frozen_error(path, differing)
        return cls(path, config)

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Open an existing run with its frozen settings.

        Raises:
            UserError: no run there, or a damaged `config.yaml`.
        """
        path = Path(path)
        if not (path / CONFIG_NAME).is_file():
            raise UserError(f"{path} is not a run directory (it has no {CONFIG_NAME}); start one with: {_start(path)}")
        return cls(path, settings.read(path / CONFIG_NAME))

    @property
    def checkpoints_dir(self) -> Path:
        """Where the students are."""
        return self.path / "checkpoints"

    @property
    def teacher_logits_dir(self) -> Path:
        """The teacher's cached logits: a directory of this run, or the shared `distillation.teacher.cache_dir`."""
        shared = self.config.distillation.teacher.cache_dir
        return Path(shared) if shared else self.path / "teacher_logits"

    @property
    def evals_dir(self) -> Path:
        """Results of the evaluations."""
        return self.path / "evals"

    @property
    def logs_dir(self) -> Path:
        """Logs of the stages."""
        return self.path / "logs"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step, whether it exists or not; 0 is the zero-shot student."""
        return self.checkpoints_dir / f"checkpoint-{step}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """The complete checkpoints by step: those with a config and every weight file their index names."""
        found = []
        for path in self.checkpoints_dir.glob("checkpoint-*"):
            match = _CHECKPOINT.fullmatch(path.name)
            if match and _is_complete(path):
                found.append((int(match[1]), path))
        return sorted(found)

    def student(self) -> Path:
        """The best checkpoint if one was chosen, else the last.

        Raises:
            UserError: the run has no checkpoint yet.
        """
        best = self.path / "best"
        if best.exists():
            return best.resolve()
        checkpoints = self.checkpoints()
        if not checkpoints:
            raise UserError(f"{self.path} has no checkpoint yet; make one with: {_start(self.path)}")
        return checkpoints[-1][1]

    @contextmanager
    def stage(self, name: str) -> Iterator[Run]:
        """Record a stage in the manifest while its block runs, under a lock that dies with the process.

        A stage that fails before it has left a file counts as not run, so that the settings it read can still be
        mended; one that is killed or fails later can be resumed, with the same settings.

        Raises:
            UserError: another process is running the same stage of this run.
        """
        if rank() != 0:
            yield self
            return
        part = self._part(name)
        with self._locked(name, part):
            if not (self.path / CONFIG_NAME).is_file():
                store(self.path, self.config)
            before = made_files(self.path)
            was = self._manifest.record(name, part).get("status")
            self._manifest.update(
                name,
                part,
                status="running",
                started=timestamp(),
                finished=None,
                seconds=None,
                error=None,
                settings=self._fingerprint(name),
                versions=versions(),
            )
            start = time.monotonic()
            status, error = "finished", None
            try:
                yield self
            except BaseException as exception:
                untouched = was in (None, "failed") and made_files(self.path) <= before
                status = "failed" if untouched else "interrupted"
                error = " ".join(f"{type(exception).__name__}: {exception}".split())
                raise
            finally:
                seconds = round(time.monotonic() - start, 3)
                ended = timestamp() if error is None else None
                self._manifest.update(name, part, status=status, finished=ended, seconds=seconds, error=error)

    def finished(self, stage: str) -> bool:
        """Whether a stage has ended well with the settings of now.

        For teacher logits written by several workers: a worker asks for its own part, anybody else for all parts.
        """
        return self._manifest.finished(stage, self._fingerprint(stage), self._part(stage))

    def has_run(self, stage: str) -> bool:
        """Whether a stage has left something: it is running, was interrupted, or is finished."""
        return self._manifest.has_run(stage)

    def record(self, stage: str, **facts: Any) -> None:
        """Merge JSON facts of a stage into the manifest, atomically."""
        if rank() == 0:
            self._manifest.add_facts(stage, facts)

    def facts(self, stage: str) -> dict[str, Any]:
        """The facts recorded by a stage."""
        return dict(self._manifest.stage(stage).get("facts", {}))

    def discard_if_untouched(self) -> None:
        """Take the settings back if nothing was made from them, so that a command that failed at once can be mended."""
        if rank() == 0 and not made_files(self.path) and not any(self.has_run(name) for name in STAGES):
            for name in (CONFIG_NAME, MANIFEST_NAME):
                (self.path / name).unlink(missing_ok=True)

    def require(self, stage: str) -> None:
        """Refuse to begin a stage before those it builds on are finished.

        Raises:
            UserError: which stage is missing and the command that runs it.
        """
        distillation, needs = self.config.distillation, list(STAGES[stage].needs)
        if stage == "distill" and reads_cache(distillation) and distillation.teacher.cache_dir is None:
            needs.append("teacher-logits")
        for need in needs:
            if not self.finished(need):
                state = "was interrupted" if self.has_run(need) else "has not run"
                raise UserError(
                    f"{stage} needs {need}, which {state} in {self.path}; run first: "
                    f"moe-compress {need} run={self.path}"
                )

    def _part(self, stage: str) -> str | None:
        """Which part of a stage this process does, `worker/total`, or None when it does all."""
        generation = self.config.distillation.teacher.generation
        if stage == "teacher-logits" and generation.total_workers > 1:
            return f"{generation.worker_id}/{generation.total_workers}"
        return None

    def _fingerprint(self, name: str) -> str:
        values = flatten(self.config)
        stage = STAGES.get(name)
        read = {
            key: value
            for key, value in values.items()
            if not is_free(key) and (stage is None or (stage.reads_key(key) and name in freezing_stages(key)))
        }
        return fingerprint(read)

    @contextmanager
    def _locked(self, name: str, part: str | None) -> Iterator[None]:
        path = self.path / LOCKS_NAME / (name if part is None else f"{name}-{part.replace('/', '-of-')}")
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(path, wait=False))
            except BlockingIOError:
                holder = path.read_text(encoding="utf-8").strip() or "unknown"
                raise UserError(f"{name} of {self.path} is already running in process {holder}") from None
            yield


def open_run(stage: str, overrides: Sequence[str] = (), *, file: Path | None = None) -> Run:
    """The run that a command line names, opened for a stage: a new one is frozen, a frozen one is checked.

    Args:
        stage: the stage about to run.
        overrides: settings of the command line.
        file: YAML file of settings below the overrides.

    Raises:
        UserError: bad settings, a directory that is no run, a stage that needs another one first, or another
            value for a frozen setting; nothing is written then.
    """
    fresh = settings.compose(overrides, file=file)
    path = run_path(fresh)
    config_path = path / CONFIG_NAME
    if not config_path.is_file():
        if not STAGES[stage].starts_run:
            raise UserError(f"{stage} needs a run, and {path} holds none yet; run first: {_start(path)}")
        refuse_foreign(path)
        store(path, fresh)
        return Run(path, fresh)
    frozen = settings.read(config_path)
    manifest = Manifest(path)
    ran = {name for name in STAGES if manifest.has_run(name)}
    if not ran and made_files(path):  # the manifest is lost, and with it what the files were made from
        ran = set(STAGES)
    later = settings.compose(overrides, base=frozen, file=file)
    stored, config = reconcile(path, frozen, fresh, later, ran)
    run = Run(path, config)
    run.require(stage)
    if stored is not None:
        store(path, stored)
    return run


def run_path(config: Config) -> Path:
    """The directory of a run: `run`, or `output.base_dir`/`experiment_name`."""
    return Path(config.run) if config.run else Path(config.output.base_dir) / config.experiment_name


def _start(path: Path) -> str:
    return f"moe-compress compress run={path}"


def _is_complete(path: Path) -> bool:
    """Whether a checkpoint has its config and every weight file."""
    try:
        shards, _ = find_shards(path)
    except UserError:
        return False
    return (path / "config.json").is_file() and all(shard.is_file() for shard in shards)
