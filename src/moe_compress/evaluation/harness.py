"""lm_eval tasks on a model in memory: the project's own tasks offline, any task of the harness by name."""

from __future__ import annotations

import difflib
import logging
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compress.config import EvaluationConfig
from moe_compress.errors import UserError
from moe_compress.evaluation.tasks import TASKS_DIR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.tasks import TaskManager

_CPU_BATCH_SIZE = 16
_BOOTSTRAP_ITERATIONS = 1000


def check_tasks(config: EvaluationConfig) -> None:
    """Refuse what can be refused before a model is loaded.

    Raises:
        UserError: an unknown task (the nearest names are given), a missing include_path, a bad batch size.
    """
    _batch_size(config.batch_size, "cpu")
    if config.tasks:
        _task_manager(tuple(config.tasks), config.include_path)


def run_tasks(model: Any, tokenizer: Any, config: EvaluationConfig, seed: int) -> dict[str, dict[str, Any]]:
    """Evaluate a model on every task of the settings.

    A task whose data cannot be had (no network, a gated data set) is reported as `{"error": one line}` and does not
    stop the rest.

    Args:
        model: a causal language model of Transformers, on the device it is to run on.
        tokenizer: its tokenizer.
        config: `tasks` (name to few-shot examples, -1 for the task's own), `limit`, `batch_size`, `include_path`.
        seed: seed of few-shot sampling and bootstrap.

    Returns:
        Task (or group) name to its metrics: `{"acc": 0.41, "acc_stderr": 0.02, ..., "few_shot": 0, "documents": 500}`.

    Raises:
        UserError: see `check_tasks`.
    """
    if not config.tasks:
        return {}
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        manager = _task_manager(tuple(config.tasks), config.include_path)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_batch_size(config.batch_size, model.device.type))
        results: dict[str, dict[str, Any]] = {}
        for name, few_shot in config.tasks.items():
            try:
                manager.load([name])
            except Exception as error:  # data sets raise whatever their builders and the network raise
                results[name] = {"error": _one_line(error)}
                continue
            found = simple_evaluate(
                model=lm,
                tasks=[name],
                num_fewshot=None if few_shot < 0 else few_shot,
                limit=config.limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=_BOOTSTRAP_ITERATIONS,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
            results |= _tidy(name, found)
    return results


def _tidy(name: str, found: Any) -> dict[str, dict[str, Any]]:
    """lm_eval's `{"acc,none": ..., "acc_stderr,none": ...}` as plain metric names; a filter other than none is kept."""
    tidy: dict[str, dict[str, Any]] = {}
    for task, metrics in found["results"].items():
        entry: dict[str, Any] = {}
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if isinstance(value, (int, float)) and filter_name:
                entry[metric if filter_name == "none" else f"{metric}@{filter_name}"] = value
        entry["few_shot"] = found.get("n-shot", {}).get(task)
        entry["documents"] = found.get("n-samples", {}).get(task, {}).get("effective")
        tidy[task] = entry
    return {name: tidy.pop(name), **tidy} if name in tidy else tidy


@lru_cache(maxsize=4)
def _task_manager(tasks: tuple[str, ...], include_path: str | None) -> TaskManager:
    """An index of the tasks; the thousands that come with lm_eval are read only when one of them is asked for."""
    from lm_eval.tasks import TaskManager

    paths = [TASKS_DIR]
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise UserError(f"evaluation.include_path {include_path} is not a directory")
        paths.append(Path(include_path))
    manager = TaskManager(include_path=list(paths), include_defaults=False)
    if any(name not in manager.task_index for name in tasks):
        manager = TaskManager(include_path=list(paths), include_defaults=True)
    for name in tasks:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            hint = f"the nearest names are: {', '.join(near)}" if near else "no task has a similar name"
            raise UserError(f"evaluation.tasks names '{name}', which lm_eval does not know; {hint}")
    return manager


def _batch_size(setting: str, device_type: str) -> int | str:
    # lm_eval's search for the largest batch starts at 64 full-length rows, which takes minutes on a CPU.
    if setting == "auto":
        return _CPU_BATCH_SIZE if device_type == "cpu" else "auto"
    try:
        size = int(setting)
    except ValueError:
        size = 0
    if size < 1:
        raise UserError(f"evaluation.batch_size is '{setting}'; use 'auto' or a whole number above zero")
    return size


@contextmanager
def _quiet() -> Iterator[None]:
    """lm_eval without its narration; its progress bars stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
