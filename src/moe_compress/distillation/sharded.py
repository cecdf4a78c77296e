"""A teacher sharded over the ranks of torchrun (FSDP2): each holds its share of every decoder layer.

A forward pass gathers one layer after another, which takes all ranks. In training all take the same number of passes
by themselves; ranks that write logits may have different amounts left, and are kept together by `Together`.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moe_compress.compression.layerwise import DoesNotFit, layer_list
from moe_compress.errors import UserError
from moe_compress.modeling import find_experts
from moe_compress.torchrun import local_rank, local_world_size, world_size


def need_ranks() -> None:
    """Refuse to shard over one process.

    Raises:
        UserError: there is no other.
    """
    if world_size() < 2:
        raise UserError(
            "distillation.teacher.fsdp=true shards the teacher over the ranks of torchrun; start with torchrun, or set "
            "it to false"
        )


def join_ranks() -> None:
    """Make the ranks of torchrun a process group, where they are none yet."""
    if world_size() > 1 and not dist.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
            backend = "cpu:gloo,cuda:nccl"
        # torchrun ends the ranks that wait if one fails.
        dist.init_process_group(backend, timeout=timedelta(days=30))
        # Not before: the ranks of torchrun can meet only once.
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard_teacher(load: Callable[[], Any]) -> Any:
    """Load a model and shard it over all ranks, decoder layer by decoder layer.

    The ranks of a machine load it one after the other, so that its main memory holds one whole model at a time.
    Embeddings and head stay gathered after the first pass: logits are made from the head when the pass is over.

    Args:
        load: gives the whole model on the CPU.

    Raises:
        UserError: there is one process only, or the model has no list of decoder layers.
    """
    need_ranks()
    join_ranks()
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))
    model = None
    for turn in range(local_world_size()):
        if turn == local_rank():
            model = load().eval().requires_grad_(False)
            _shard(model, mesh)
        dist.barrier()
    return model


def _shard(model: Any, mesh: Any) -> None:
    try:
        layers = model.get_submodule(layer_list(model, [facts.name for facts in find_experts(model)]))
    except DoesNotFit as reason:
        raise UserError(f"distillation.teacher.fsdp=true: the teacher cannot be sharded ({reason})") from None
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


class Together:
    """A forward pass that all ranks make at the same time, as long as one of them has something to run.

    Args:
        forward: the pass; ranks with nothing left call it with two tokens of id 0.
    """

    def __init__(self, forward: Callable[[Mapping[str, Tensor]], Any]) -> None:
        self._forward = forward

    def __call__(self, inputs: Mapping[str, Tensor]) -> Any:
        """The result of the pass for `inputs`."""
        _somebody(True)
        return self._forward(inputs)

    def drain(self) -> None:
        """Make empty passes as long as other ranks need them; every rank calls it when its own work is done."""
        while _somebody(False):
            self._forward({"input_ids": torch.zeros(1, 2, dtype=torch.long)})


def _somebody(works: bool) -> bool:
    """Whether any rank has something to run; every rank asks before each pass."""
    flag = torch.tensor(int(works))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
