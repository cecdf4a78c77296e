"""Data parallelism (FSDP2 and DDP) with one process: compressed models train, also without cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gloo group of this process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(model: torch.nn.Module, ids: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_fsdp2_trains_like_one_process_and_saves(
    all_saved: dict[tuple[str, str], Path], variant: str, ids: Tensor, tmp_path: Path
) -> None:
    path = all_saved["gpt_oss", "delta"] if variant == "delta" else all_saved["olmoe", variant]
    check_fsdp2(path, ids, tmp_path)


def test_fsdp2_with_two_cores(tiny_model: Any, compressed: Any, ids: Tensor, tmp_path: Path) -> None:
    compressed(tiny_model("olmoe"), "grouped").save_pretrained(tmp_path / "student")
    check_fsdp2(tmp_path / "student", ids, tmp_path / "trained")


def check_fsdp2(path: Path, ids: Tensor, tmp_path: Path) -> None:
    plain, sharded = (AutoModelForCausalLM.from_pretrained(path).requires_grad_(True) for _ in range(2))
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert train(sharded, ids) == pytest.approx(train(plain, ids), rel=1e-4)
    full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    sharded.save_pretrained(tmp_path, state_dict=dict(full))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-3, atol=1e-4)


def test_fsdp2_computes_in_the_type_of_its_policy(all_saved: dict[tuple[str, str], Path], ids: Tensor) -> None:
    for kind in ("no_core", "wrapper"):
        model = AutoModelForCausalLM.from_pretrained(all_saved["olmoe", kind])
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        losses = train(model, ids)
        assert losses[-1] < losses[0]
        assert model.model.layers[0].mlp.experts.down_proj_u_in.dtype == torch.float32 if kind == "wrapper" else True


@pytest.mark.parametrize("loaded", [True, False])
def test_ddp_trains_although_all_parameters_are_asked_for(
    all_saved: dict[tuple[str, str], Path], tiny_model: Any, compressed: Any, variant: str, ids: Tensor, loaded: bool
) -> None:
    def make() -> Any:
        if loaded:
            return AutoModelForCausalLM.from_pretrained(all_saved["mixtral", variant])
        return compressed(tiny_model("mixtral"), variant)

    plain, parallel = (make().requires_grad_(True) for _ in range(2))
    assert train(DistributedDataParallel(parallel), ids) == pytest.approx(train(plain, ids), rel=1e-4)
