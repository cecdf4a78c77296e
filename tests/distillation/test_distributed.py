"""Two gloo ranks under torchrun: the losses and checkpoints of one process; and the fused loss under FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_compress.config import StageConfig
from moe_compress.distillation import distill
from moe_compress.run import Run

from .conftest import MakeRun
from .test_training import log_of, weights

# What each rank does: a run with DDP, as the command line would, and then a few steps of FSDP2 by hand, because
# accelerate does not shard on a CPU.
SCRIPT = """
import json, sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moe_compress.distillation import distill
from moe_compress.distillation.checkpoints import load_student, save_student
from moe_compress.distillation.heads import headless
from moe_compress.distillation.losses import distillation_loss
from moe_compress.distillation.targets import DenseTargets
from moe_compress.run import Run

run = Run.open(Path(sys.argv[1]))
distill(run)
out = Path(sys.argv[2])
rank, world = dist.get_rank(), dist.get_world_size()

ids = torch.randint(2, 97, (4, 16), generator=torch.Generator().manual_seed(0))
teacher = torch.randn(4, 16, 97, generator=torch.Generator().manual_seed(1))

def train(model, rows, factor):
    runner, losses = headless(model), []
    if factor > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        def at_head(hidden, head):
            options = dict(alpha=0.5, temperature=2.0, normalizer=60.0, head=head)
            return vars(distillation_loss(hidden, ids[rows], DenseTargets(teacher[rows]), **options))
        loss = runner.run(model, {"input_ids": ids[rows]}, at_head)["loss"] * factor
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.detach() / factor
        if factor > 1:
            dist.all_reduce(value)
        losses.append(value.item())
    return losses

plain, dtypes = load_student(run.checkpoint(0), run.config, resumed=False)
sharded, _ = load_student(run.checkpoint(0), run.config, resumed=False)
expected = train(plain, slice(None), 1)
found = train(sharded, slice(2 * rank, 2 * rank + 2), world)
state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    out.mkdir()
    save_student(sharded, state, dtypes, out, run.checkpoint(0))
    difference = max((state[name] - tensor).abs().max().item() for name, tensor in plain.state_dict().items())
    (out / "losses.json").write_text(json.dumps({"one": expected, "two": found, "difference": difference}))
dist.barrier()
dist.destroy_process_group()
"""


def torchrun(script: Path, *arguments: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_two_ranks_are_one_process_at_the_same_global_batch(
    make_compressed_run: MakeRun, filled_cache: Path, tmp_path: Path
) -> None:
    stages = [
        StageConfig(name="layers", kind="blockwise", steps=2, lr_scheduler_type="constant"),
        StageConfig(name="factors", trainable=[r"\.experts\."], steps=2),
        StageConfig(name="all", steps=3),
    ]

    def make(name: str, accumulation: int) -> Run:
        return make_compressed_run(
            name, cache=filled_cache, stages=stages, per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip

    one, two = make("one", 4), make("two", 2)
    distill(one)
    script, sharded = tmp_path / "script.py", tmp_path / "sharded"
    script.write_text(SCRIPT, encoding="utf-8")
    torchrun(script, two.path, sharded)

    lines = log_of(one), log_of(two)
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [3, 4, 5, 6, 7]
    for mine, theirs in zip(*lines, strict=True):
        for key in ("loss", "ce", "kl", "grad_norm", "learning_rate"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), (mine["step"], key)
    for name, parameter in weights(one, 7).items():
        torch.testing.assert_close(parameter, weights(two, 7)[name], atol=2e-4, rtol=1e-3, msg=name)
    stored = load_file(two.checkpoint(7) / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(two.checkpoint(7)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())

    result = json.loads((sharded / "losses.json").read_text())
    assert result["two"] == pytest.approx(result["one"], rel=1e-4) and result["one"][2] < result["one"][0]
    assert result["difference"] < 1e-3
    ids = torch.randint(2, 97, (1, 8))
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(sharded)(ids).logits).all()
