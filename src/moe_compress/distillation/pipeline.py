"""The stage `distill` of a run: every stage of the training in turn, from wherever an earlier attempt ended.

Each stage starts by loading the student from the newest checkpoint, so that crossing a boundary between stages and
resuming at it are the same thing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import cache as cache_result
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from moe_compress.data import rows_in_memory
from moe_compress.distillation.arguments import check_training, training_arguments
from moe_compress.distillation.balance import balance_factors
from moe_compress.distillation.blockwise import BlockwiseTraining
from moe_compress.distillation.checkpoints import TRAINING_STATE, load_student, write_checkpoint
from moe_compress.distillation.data import TrainingOrder, collate
from moe_compress.distillation.fingerprints import tokenizer_fingerprint
from moe_compress.distillation.live import LiveTeacher
from moe_compress.distillation.parameters import ParameterGroup, group_table, parameter_groups, set_trainable
from moe_compress.distillation.reader import TeacherCache
from moe_compress.distillation.spikes import SPIKE_LOG, RollBack, SpikeDetector, skipped_steps
from moe_compress.distillation.stages import Stage, compares_layers, needs_teacher, reads_cache, resolve_stages
from moe_compress.distillation.teachers import (
    CachedTeacher,
    TeacherSource,
    common_vocabulary,
    expected_header,
    load_teacher,
    teacher_path,
    vocabulary_size,
)
from moe_compress.distillation.trackers import tracker_name, tracking
from moe_compress.distillation.trainer import TRAIN_LOG, DistillationTrainer
from moe_compress.errors import UserError
from moe_compress.files import write_atomically, write_json
from moe_compress.freeze import CONFIG_NAME
from moe_compress.modeling import load_tokenizer
from moe_compress.torchrun import rank, world_size

if TYPE_CHECKING:
    from moe_compress.run import Run

COMPLETE = "training_complete.json"


def distill(run: Run) -> None:
    """Train the student of a run through all its stages; does nothing if that is done, resumes if it was interrupted.

    Leaves `checkpoints/checkpoint-<step>`, `logs/train.jsonl`, and at the end `training_complete.json`.

    Raises:
        UserError: no zero-shot checkpoint, a cache that does not fit, settings out of range, or a loss that is no
            longer finite (the last checkpoint stays).
    """
    if run.finished("distill") and (run.path / COMPLETE).exists():
        _say("distillation: finished already")
        return
    with run.stage("distill"), tracking(run):
        _distill(run)


def _distill(run: Run) -> None:
    config = run.config
    checkpoints = run.checkpoints()
    if not checkpoints or checkpoints[0][0] != 0:
        raise UserError(f"{run.checkpoint(0)} does not exist or is not complete; run `moe-compress compress` first")
    check_training(config)
    if config.fsdp.enabled and not torch.cuda.is_available():
        _say("note: accelerate shards on GPUs only; here every rank holds the whole model")
    source, teacher = _data_and_teacher(run)
    latest = checkpoints[-1][0]
    per_step = _sequences_per_step(run, resumed=latest > 0)
    stages = resolve_stages(config.distillation, sequences=len(source), sequences_per_step=per_step)
    if latest > stages[-1].last_step:
        raise UserError(
            f"{run.path} has a checkpoint of step {latest}, beyond the {stages[-1].last_step} steps of its stages"
        )
    if latest:
        _say(f"distillation: goes on from checkpoint-{latest}")
    if _is_main():
        for log in (TRAIN_LOG, SPIKE_LOG):
            _forget_lines_after(run.logs_dir / log, latest)
    started = time.perf_counter()
    for stage in stages:
        if latest < stage.last_step:
            if stage.kind == "blockwise":
                _train_blockwise(run, stage, source, per_step)
            else:
                _train_stage(run, stage, source, teacher, per_step)
            latest = stage.last_step
    if _is_main():
        facts = {
            "steps": stages[-1].last_step,
            "tokens": stages[-1].last_step * per_step * config.distillation.dataset.max_length,
            "checkpoint": run.checkpoint(stages[-1].last_step).name,
            "stages": [asdict(stage) for stage in stages],
        }
        write_json(run.path / COMPLETE, facts)
        run.record("distill", **facts, seconds=round(time.perf_counter() - started, 1))
    _say(f"distillation: complete, checkpoint-{stages[-1].last_step}")


def _sequences_per_step(run: Run, *, resumed: bool) -> int:
    """Sequences of one optimizer step over all ranks, which must stay what they were: places in the data, and steps
    that follow from epochs or tokens, are counted in them."""
    training, processes = run.config.distillation.training, world_size()
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    count = processes * accumulation * batch
    before = run.facts("distill").get("sequences_per_step", count)
    if resumed and count != before:
        raise UserError(
            f"{run.path} was trained on {before} sequences a step so far, and {processes} (processes) x {accumulation} "
            f"(distillation.training.gradient_accumulation_steps) x {batch} (per_device_train_batch_size) are {count}; "
            f"start as many processes as before, or set these two in {run.path / CONFIG_NAME} to make it {before} again"
        )
    run.record("distill", sequences_per_step=count)
    return count


def _train_blockwise(run: Run, stage: Stage, source: Any, per_step: int) -> None:
    """Train the MoE layers one by one, divided among the processes, and write one checkpoint at the end."""
    latest = run.checkpoints()[-1][0]
    model, dtypes, groups = _student_and_groups(run, stage, latest)
    skipped = skipped_steps(run.checkpoint(latest) / TRAINING_STATE)
    order = _order(run, stage, source, per_step, skipped)
    training = BlockwiseTraining(run, stage, order, model, groups, rank=rank(), world=world_size())
    training.train()
    if _is_main():
        training.load_into(model)
        write_checkpoint(run, stage.last_step, model, dtypes)
        shutil.rmtree(training.directory, ignore_errors=True)
    while not run.checkpoint(stage.last_step).exists():
        time.sleep(0.2)


def _train_stage(
    run: Run, stage: Stage, source: Any, teacher: Callable[[], TeacherSource | None], per_step: int
) -> None:
    """Train one stage to its end from the newest checkpoint, which may lie inside it; again after every rollback."""
    spikes = run.config.distillation.training.spikes
    latest = run.checkpoints()[-1][0]
    skipped = skipped_steps(run.checkpoint(latest) / TRAINING_STATE)
    returns: Counter[int] = Counter()
    while latest < stage.last_step:
        order = _order(run, stage, source, per_step, skipped)
        try:
            _train_from(run, stage, order, teacher(), latest, skipped)
            latest = stage.last_step
        except RollBack as spike:
            latest = run.checkpoints()[-1][0]
            returns[latest] += 1
            if returns[latest] > spikes.limit:
                raise UserError(
                    f"distillation stage '{stage.name}': {returns[latest]} spikes after checkpoint-{latest}, the last "
                    f"at step {spike.step}; try a lower learning rate or more warm-up in a new run"
                ) from None
            # What the steps since the checkpoint have seen is not seen again.
            skipped += spike.step - latest
            if _is_main():
                _forget_lines_after(run.logs_dir / TRAIN_LOG, latest)
            _say(f"distillation: back to checkpoint-{latest}, past the data of steps {latest + 1} to {spike.step}")


def _train_from(
    run: Run, stage: Stage, order: TrainingOrder, teacher: TeacherSource | None, latest: int, skipped: int
) -> None:
    """Train one stage from checkpoint `latest`."""
    config = run.config
    # The student first: from the arguments Transformers learns of ZeRO-3, and would load it in parts.
    model, dtypes, groups = _student_and_groups(run, stage, latest)
    arguments = training_arguments(config, stage, run.checkpoints_dir, tracker_name(run))
    set_trainable(model, groups)
    inside = latest > stage.first_step
    spikes = None
    if config.distillation.training.spikes.action != "none":
        spikes = SpikeDetector(config.distillation.training.spikes)
        if inside:
            spikes.load(run.checkpoint(latest) / TRAINING_STATE)
    trainer = DistillationTrainer(
        run=run,
        stage=stage,
        groups=groups,
        teacher=teacher if stage.alpha > 0 or compares_layers(config.distillation.loss) else None,
        loss=config.distillation.loss,
        dtypes=dtypes,
        spikes=spikes,
        skipped=skipped,
        model=model,
        args=arguments,
        train_dataset=order,
        data_collator=partial(collate, isolate=config.distillation.dataset.packing == "isolate"),
    )
    try:
        trainer.train(resume_from_checkpoint=str(run.checkpoint(latest) / TRAINING_STATE) if inside else None)
    finally:
        trainer.progress.close()


def _student_and_groups(
    run: Run, stage: Stage, latest: int
) -> tuple[Any, dict[str, torch.dtype], list[ParameterGroup]]:
    """The student of checkpoint `latest` in fp32, the types it is stored in, and what of it trains (it is printed)."""
    config = run.config
    model, dtypes = load_student(run.checkpoint(latest), config, resumed=latest > 0)
    if latest == 0 and config.distillation.training.balance_factors:
        balance_factors(model)
    groups = parameter_groups(
        list(model.named_parameters()),
        trainable=stage.trainable,
        multipliers=config.distillation.parameter_lr_multipliers,
        default_multiplier=config.distillation.default_lr_multiplier,
        stage=stage.name,
    )
    if _is_main():
        title = f"stage {stage.name}: steps {stage.first_step + 1} to {stage.last_step}"
        Console().print(group_table(model, groups, title=title, learning_rate=stage.learning_rate))
        if stage.warmup_steps >= stage.steps and stage.lr_scheduler_type != "constant":
            _say(
                f"note: {stage.warmup_steps} warm-up steps in a stage of {stage.steps}: the full rate is never reached"
            )
    return model, dtypes, groups


def _order(run: Run, stage: Stage, source: Any, per_step: int, skipped: int) -> TrainingOrder:
    """The sequences of a stage; `skipped` steps of them were lost to spikes, in it or before."""
    first = (stage.first_step + skipped) * per_step
    return TrainingOrder(source, seed=run.config.seed, first=first, count=stage.steps * per_step)


def _data_and_teacher(run: Run) -> tuple[Any, Callable[[], TeacherSource | None]]:
    """The sequences to train on, and what gives their teacher: from the cache, or a model, loaded when asked for."""
    config = run.config
    settings = config.distillation
    tokenizer = load_tokenizer(str(run.checkpoint(0)), trust_remote_code=config.model.trust_remote_code)
    vocab_size = vocabulary_size(run.checkpoint(0), config)
    if reads_cache(settings):
        if compares_layers(settings.loss):
            raise UserError(
                "distillation.loss.router_weight and hidden_weight compare layers that a cache does not hold; set "
                "distillation.teacher.use_cached_logits=false or both weights to 0"
            )
        cache = TeacherCache(run.teacher_logits_dir, expected_header(config, tokenizer))
        common_vocabulary(cache.vocab_size, vocab_size, tokenizer)
        teacher = CachedTeacher(cache.encoder)
        return cache, lambda: teacher
    rows = rows_in_memory(settings.dataset, tokenizer, config.seed)
    if not needs_teacher(settings):
        return rows, lambda: None
    path = teacher_path(config)
    teachers = load_tokenizer(str(path), trust_remote_code=config.model.trust_remote_code)
    if tokenizer_fingerprint(teachers) != tokenizer_fingerprint(tokenizer):
        raise UserError(f"teacher {path} has another tokenizer than the student; it cannot teach it token by token")
    common_vocabulary(vocabulary_size(path, config), vocab_size, tokenizer)
    return rows, cache_result(lambda: LiveTeacher(load_teacher(config), settings.loss))


def _forget_lines_after(log: Path, step: int) -> None:
    """Drop what an interrupted run logged beyond the checkpoint it resumes from: those steps are done again."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            write_atomically(log, "".join(f"{line}\n" for line in kept))


def _is_main() -> bool:
    return rank() == 0


def _say(text: str) -> None:
    if _is_main():
        print(text, flush=True)
