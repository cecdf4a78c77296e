"""A teacher sharded over two gloo ranks: the cache, and the training beside it, of one that is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_compress.distillation import TeacherCache, distill, generate_teacher_logits
from moe_compress.errors import UserError
from moe_compress.freeze import store
from moe_compress.run import Run

from .conftest import MakeRun
from .test_distributed import torchrun
from .test_training import log_of

SCRIPT = """
import json, sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moe_compress.distillation import distill, generate_teacher_logits
from moe_compress.distillation import generate
from moe_compress.distillation.teachers import load_teacher
from moe_compress.run import Run

fresh, resumed, live, out = map(Path, sys.argv[1:])
passes = []
run_forward = generate.HeadlessModel.run

def count(self, model, inputs, at_head):
    passes.append(int(inputs["input_ids"].shape[0]))
    return run_forward(self, model, inputs, at_head)

generate.HeadlessModel.run = count
generate_teacher_logits(Run.open(fresh))
first = list(passes)
passes.clear()
generate_teacher_logits(Run.open(resumed))
second = list(passes)
run = Run.open(live)
distill(run)
parameters = list(load_teacher(run.config).model.layers.parameters())
held = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
facts = {"first": first, "second": second, "held": held, "all": sum(p.numel() for p in parameters)}
(out / f"{dist.get_rank()}.json").write_text(json.dumps(facts))
dist.barrier()
dist.destroy_process_group()
"""


def test_a_sharded_teacher_says_the_same(make_run: MakeRun, filled_cache: Path, tmp_path: Path) -> None:
    def sharded(name: str) -> Run:
        run = make_run(name, per_device_train_batch_size=1, max_steps=3)
        config = run.config
        config.distillation.teacher.fsdp = True
        config.distillation.teacher.use_cached_logits = name != "live"
        store(run.path, config)
        return run

    fresh, resumed, live = (sharded(name) for name in ("fresh", "resumed", "live"))
    # What a kill left: all files but one, so that one rank has nothing left to do.
    shutil.copytree(filled_cache, resumed.teacher_logits_dir)
    for name in ("manifest.json", "logits-000004.h5"):
        (resumed.teacher_logits_dir / name).unlink()
    with pytest.raises(UserError, match="start with torchrun"):
        generate_teacher_logits(fresh)

    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    torchrun(script, fresh.path, resumed.path, live.path, tmp_path)
    whole = TeacherCache(filled_cache)
    for run in (fresh, resumed):
        cache = TeacherCache(run.teacher_logits_dir)
        assert [file.sha256 for file in cache.files] == [file.sha256 for file in whole.files]
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    # Files of 5 sequences in batches of 3 and 2: rank 0 has two files, rank 1 has three, the last of 2 sequences.
    assert one["first"] == [3, 2, 3, 2, 1] and other["first"] == [3, 2, 3, 2, 2]
    assert one["second"] == [1] and other["second"] == [2]
    for facts in (one, other):
        assert facts["held"] <= 0.6 * facts["all"]

    alone = make_run("alone", per_device_train_batch_size=2, max_steps=3)
    alone.config.distillation.teacher.use_cached_logits = False
    distill(alone)
    for mine, theirs in zip(log_of(alone), log_of(live), strict=True):
        for key in ("loss", "ce", "kl", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4)
