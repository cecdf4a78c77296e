"""The arguments of the Transformers Trainer for one stage: optimization, sharding, DeepSpeed, trackers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainingArguments

from moe_compress.config import Config
from moe_compress.distillation.stages import Stage
from moe_compress.distillation.trackers import TRACKERS
from moe_compress.errors import UserError
from moe_compress.torchrun import world_size

DEEPSPEED_DIR = Path(__file__).parent.parent / "conf" / "deepspeed"


def training_arguments(config: Config, stage: Stage, output_dir: Path, name: str) -> TrainingArguments:
    """The Trainer's arguments for one stage; `name` is for the trackers."""
    training = config.distillation.training
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        run_name=name,
        project=config.wandb_project,
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
        torch_compile=training.torch_compile,
        torch_compile_backend=training.torch_compile_backend if training.torch_compile else None,
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
        deepspeed=cast(Any, None if training.deepspeed is None else deepspeed_settings(training.deepspeed)),
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


def deepspeed_settings(name: str) -> dict[str, Any]:
    """A DeepSpeed configuration: one that is shipped (`zero2`, `zero3`), or a JSON file.

    Raises:
        UserError: there is no such file, or it is not JSON.
    """
    path = DEEPSPEED_DIR / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        shipped = ", ".join(sorted(file.stem for file in DEEPSPEED_DIR.glob("*.json")))
        raise UserError(
            f"distillation.training.deepspeed={name} is neither one of {shipped} nor a file that can be read"
        ) from None
    except ValueError as error:
        raise UserError(f"distillation.training.deepspeed={name} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"distillation.training.deepspeed={name} does not hold settings (a JSON object)")
    return settings


def check_training(config: Config) -> None:
    """What must be installed, and what does not go together, before anything is loaded.

    Raises:
        UserError: a tracker or DeepSpeed is not installed, sharding without several processes, or two ways to shard.
    """
    training = config.distillation.training
    if config.fsdp.enabled and world_size() < 2:
        raise UserError("fsdp.enabled=true needs several processes; start with torchrun, or set fsdp.enabled=false")
    for tracker in training.report_to:
        if tracker not in TRACKERS:
            raise UserError(
                f"distillation.training.report_to: '{tracker}' is unknown; there are: {', '.join(TRACKERS)}"
            )
        _need(TRACKERS[tracker], f"distillation.training.report_to={tracker}")
    if training.deepspeed is None:
        return
    deepspeed_settings(training.deepspeed)
    _need("deepspeed", f"distillation.training.deepspeed={training.deepspeed}")
    if config.fsdp.enabled:
        raise UserError("distillation.training.deepspeed and fsdp.enabled both shard the student; keep one of them")
    if training.spikes.action == "skip":
        raise UserError("distillation.training.spikes.action=skip does not work under DeepSpeed; take rollback or none")


def _need(module: str, setting: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{setting} needs {module}, which is not installed; pip install {module}")
