"""The machine and the versions that a measurement was made with, and the device that an evaluator runs on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moe_compress.config import Config
from moe_compress.errors import UserError

_PACKAGES = ("moe_compress", "torch", "transformers", "lm_eval", "datasets", "accelerate", "safetensors")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads, memory, accelerators and package versions."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def free_bytes(device: torch.device) -> int:
    """Memory of a device that could be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _memory_bytes() // 2


def choose_device(config: Config) -> torch.device:
    """The first of `evaluation.devices`, or else the GPU with the most free memory, or the CPU.

    The command line has made the GPUs of `gpu_ids` the only ones there are, numbered from 0.

    Raises:
        UserError: a device that does not exist.
    """
    if config.evaluation.devices:
        return _existing_device(config.evaluation.devices[0])
    if not torch.cuda.is_available():
        return torch.device("cpu")
    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    return torch.device("cuda", free.index(max(free)))


def placement(config: Config) -> dict[str, Any]:
    """Arguments of `load_model` that put a model where the settings want it, over several GPUs if they say so."""
    device = choose_device(config)
    wanted = config.evaluation.gpus_per_model
    if wanted <= 1 or device.type != "cuda":
        return {"device": device}
    named = [_existing_device(name).index or 0 for name in config.evaluation.devices]
    allowed = (named or list(range(torch.cuda.device_count())))[:wanted]
    if len(allowed) < wanted:
        raise UserError(f"evaluation.gpus_per_model is {wanted}, but only {len(allowed)} GPUs may be used")
    free = {index: int(0.9 * torch.cuda.mem_get_info(index)[0]) for index in allowed}
    return {"device_map": "auto", "max_memory": free}


def _existing_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"evaluation.devices names '{name}'; use cpu, cuda, cuda:1 ...")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (count == 0 or (device.index or 0) >= count):
        found = f"has only cuda:0 to cuda:{count - 1}" if count else "has no CUDA device"
        raise UserError(f"evaluation.devices names '{name}', but this machine {found}")
    return device


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
