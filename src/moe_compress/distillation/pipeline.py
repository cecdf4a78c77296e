"""The stage `distill` of a run: every stage of the training in turn, from wherever an earlier attempt ended.

Each stage starts by loading the student from the newest checkpoint, so that crossing a boundary between stages and
resuming at it are the same thing.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from transformers import TrainingArguments

from moe_compress.config import Config
from moe_compress.data import rows_in_memory
from moe_compress.distillation.checkpoints import TRAINING_STATE, load_master_weights, stored_dtypes
from moe_compress.distillation.data import TrainingOrder, collate
from moe_compress.distillation.fingerprints import tokenizer_fingerprint
from moe_compress.distillation.parameters import group_table, parameter_groups, set_trainable
from moe_compress.distillation.reader import TeacherCache
from moe_compress.distillation.stages import Stage, resolve_stages
from moe_compress.distillation.teachers import (
    CachedTeacher,
    LiveTeacher,
    TeacherSource,
    common_vocabulary,
    expected_header,
    load_teacher,
    teacher_path,
    vocabulary_size,
)
from moe_compress.distillation.trainer import TRAIN_LOG, DistillationTrainer
from moe_compress.errors import UserError
from moe_compress.files import write_atomically, write_json
from moe_compress.modeling import load_model, load_tokenizer

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
    with run.stage("distill"):
        _distill(run)


def _distill(run: Run) -> None:
    config = run.config
    training = config.distillation.training
    checkpoints = run.checkpoints()
    if not checkpoints or checkpoints[0][0] != 0:
        raise UserError(f"{run.checkpoint(0)} does not exist or is not complete; run `moe-compress compress` first")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if config.fsdp.enabled and world < 2:
        raise UserError("fsdp.enabled=true needs several processes; start with torchrun, or set fsdp.enabled=false")
    if config.fsdp.enabled and not torch.cuda.is_available():
        _say("note: accelerate shards on GPUs only; here every rank holds the whole model")
    source, teacher = _data_and_teacher(run)
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * world
    stages = resolve_stages(config.distillation, sequences=len(source), sequences_per_step=per_step)
    latest = checkpoints[-1][0]
    if latest > stages[-1].last_step:
        raise UserError(
            f"{run.path} has a checkpoint of step {latest}, beyond the {stages[-1].last_step} steps of its stages"
        )
    if latest:
        _say(f"distillation: goes on from checkpoint-{latest}")
    if _is_main():
        _forget_lines_after(run.logs_dir / TRAIN_LOG, latest)
    started = time.perf_counter()
    for stage in stages:
        if latest < stage.last_step:
            order = TrainingOrder(
                source, seed=config.seed, first=stage.first_step * per_step, count=stage.steps * per_step
            )
            _train_stage(run, stage, order, teacher, latest)
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


def _train_stage(run: Run, stage: Stage, order: TrainingOrder, teacher: TeacherSource | None, latest: int) -> None:
    """Train one stage to its end, from checkpoint `latest`, which may lie inside it."""
    config = run.config
    checkpoint = run.checkpoint(latest)
    model, dtypes = load_student(checkpoint, config, resumed=latest > 0)
    arguments = training_arguments(config, stage, run.checkpoints_dir)
    groups = parameter_groups(
        list(model.named_parameters()),
        trainable=stage.trainable,
        multipliers=config.distillation.parameter_lr_multipliers,
        default_multiplier=config.distillation.default_lr_multiplier,
        stage=stage.name,
    )
    set_trainable(model, groups)
    if _is_main():
        title = f"stage {stage.name}: steps {stage.first_step + 1} to {stage.last_step}"
        Console().print(group_table(model, groups, title=title, learning_rate=stage.learning_rate))
        if stage.warmup_steps >= stage.steps and stage.lr_scheduler_type != "constant":
            _say(
                f"note: {stage.warmup_steps} warm-up steps in a stage of {stage.steps}: the full rate is never reached"
            )
    trainer = DistillationTrainer(
        run=run,
        stage=stage,
        groups=groups,
        teacher=teacher if stage.alpha > 0 else None,
        loss=config.distillation.loss,
        dtypes=dtypes,
        model=model,
        args=arguments,
        train_dataset=order,
        data_collator=partial(collate, isolate=config.distillation.dataset.packing == "isolate"),
    )
    inside = latest > stage.first_step
    trainer.train(resume_from_checkpoint=str(checkpoint / TRAINING_STATE) if inside else None)


def load_student(checkpoint: Path, config: Config, *, resumed: bool) -> tuple[Any, dict[str, torch.dtype]]:
    """The student in fp32, and the types its tensors are stored in.

    Args:
        checkpoint: the checkpoint to load.
        config: the settings of the run.
        resumed: whether training wrote it, so that its fp32 weights are there too.
    """
    model = load_model(str(checkpoint), dtype="auto", trust_remote_code=config.model.trust_remote_code)
    dtypes = stored_dtypes(model)
    model.float()
    if resumed:
        load_master_weights(model, checkpoint)
    return model, dtypes


def training_arguments(config: Config, stage: Stage, output_dir: Path) -> TrainingArguments:
    """The Trainer's arguments for one stage."""
    training = config.distillation.training
    if "wandb" in training.report_to:
        os.environ.setdefault("WANDB_PROJECT", config.wandb_project)
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        run_name=config.experiment_name,
        max_steps=stage.steps,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.lr_scheduler_type,
        warmup_steps=stage.warmup_steps,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=training.bf16,
        use_cpu=not cuda,
        activation_checkpointing=training.gradient_checkpointing,
        save_strategy="steps",
        save_steps=training.save_steps,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        report_to=list(training.report_to),
        seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=2 if cuda else 0,
        dataloader_pin_memory=cuda,
        fsdp=cast(Any, config.fsdp.enabled),  # declared as str for its command line
        fsdp_config=_fsdp(config) if config.fsdp.enabled else None,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs are for torchrun: DataParallel would replicate the student at every step
    if config.fsdp.enabled:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=getattr(torch, config.fsdp.param_dtype),
            reduce_dtype=getattr(torch, config.fsdp.reduce_dtype),
            output_dtype=torch.float32,
        )
    return arguments


def _fsdp(config: Config) -> dict[str, Any]:
    return {
        "version": 2,
        "reshard_after_forward": config.fsdp.sharding_strategy == "FULL_SHARD",
        "cpu_offload": config.fsdp.cpu_offload,
        "state_dict_type": "SHARDED_STATE_DICT",
    }


def _data_and_teacher(run: Run) -> tuple[Any, TeacherSource | None]:
    """The sequences to train on, and the teacher of them: from the cache, or text and a live model."""
    config = run.config
    settings = config.distillation
    alphas = [settings.loss.alpha if stage.alpha is None else stage.alpha for stage in settings.stages]
    needed = max(alphas, default=settings.loss.alpha) > 0
    tokenizer = load_tokenizer(str(run.checkpoint(0)), trust_remote_code=config.model.trust_remote_code)
    vocab_size = vocabulary_size(run.checkpoint(0), config)
    if settings.teacher.use_cached_logits and needed:
        cache = TeacherCache(run.teacher_logits_dir, expected_header(config, tokenizer))
        common_vocabulary(cache.vocab_size, vocab_size, tokenizer)
        return cache, CachedTeacher(cache.encoder)
    rows = rows_in_memory(settings.dataset, tokenizer, config.seed)
    if not needed:
        return rows, None
    path = teacher_path(config)
    teachers = load_tokenizer(str(path), trust_remote_code=config.model.trust_remote_code)
    if tokenizer_fingerprint(teachers) != tokenizer_fingerprint(tokenizer):
        raise UserError(f"teacher {path} has another tokenizer than the student; it cannot teach it token by token")
    common_vocabulary(vocabulary_size(path, config), vocab_size, tokenizer)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return rows, LiveTeacher(load_teacher(config, device))


def _forget_lines_after(log: Path, step: int) -> None:
    """Drop what an interrupted run logged beyond the checkpoint it resumes from: those steps are done again."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            write_atomically(log, "".join(f"{line}\n" for line in kept))


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _say(text: str) -> None:
    if _is_main():
        print(text, flush=True)
