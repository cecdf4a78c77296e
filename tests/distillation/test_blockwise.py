"""Block-wise output matching: every MoE layer by itself, the teacher one layer at a time, resumable layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_compress.config import StageConfig
from moe_compress.data import rows_in_memory
from moe_compress.distillation import distill
from moe_compress.distillation import layerfit as layerfit_module
from moe_compress.distillation.blockwise import BLOCKWISE_LOG
from moe_compress.distillation.data import TrainingOrder
from moe_compress.distillation.layerfit import LayerFit
from moe_compress.errors import UserError
from moe_compress.modeling import find_experts, find_shared_cores, load_model, load_tokenizer
from moe_compress.run import Run

from .conftest import MakeRun
from .test_training import changed, log_of, steps_of, weights


def blockwise(steps: int = 6, **options: Any) -> StageConfig:
    defaults = {"name": "layers", "kind": "blockwise", "learning_rate": 1e-2, "warmup_steps": 0}
    return StageConfig(**{**defaults, "steps": steps, "lr_scheduler_type": "constant", **options})


def lines_of(run: Run) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.logs_dir / BLOCKWISE_LOG).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@torch.no_grad()
def layer_errors(student: Path, teacher: Path, ids: Tensor) -> list[float]:
    """Relative squared error of each compressed experts module on what the whole teacher calls its own with."""
    original, compressed = load_model(str(teacher), dtype="float32"), load_model(str(student), dtype="float32")
    cores, errors = find_shared_cores(compressed), []

    def compare(module: Any, arguments: Any, keywords: Any, output: Tensor) -> None:
        error = (cores[names[module]](*arguments, **keywords) - output).square().sum() / output.square().sum()
        errors.append(float(error))

    names = {facts.module: facts.name for facts in find_experts(original)}
    for module in names:
        module.register_forward_hook(compare, with_kwargs=True)
    original(ids)
    return errors


def test_every_layer_comes_closer_to_the_teachers(make_compressed_run: MakeRun, teacher_dir: Path) -> None:
    ids = torch.randint(2, 97, (8, 16), generator=torch.Generator().manual_seed(0))
    run = make_compressed_run(stages=[blockwise(60)], logging_steps=20, per_device_train_batch_size=4)
    distill(run)  # needs neither a cache nor the whole teacher
    before, after = (layer_errors(run.checkpoint(step), teacher_dir, ids) for step in (0, 60))
    assert len(after) == 2 and all(new < 0.8 * old for old, new in zip(before, after, strict=True))
    lines = lines_of(run)
    assert [(line["layer"][:14], line["step"]) for line in lines] == [
        (f"model.layers.{layer}", step) for layer in (0, 1) for step in (1, 20, 40, 60)
    ]
    assert lines[0]["error"] > lines[3]["error"] and lines[0]["learning_rate"] == 1e-2
    zero, last = run.checkpoint(0), run.checkpoint(60)
    tensors = load_file(zero / "model.safetensors"), load_file(last / "model.safetensors")
    assert changed(*tensors) == {name for name in tensors[0] if ".experts." in name}
    assert not (run.path / "blockwise").exists() or not list((run.path / "blockwise").iterdir())


def test_a_killed_stage_goes_on_with_the_next_layer_and_training_follows(
    make_compressed_run: MakeRun, filled_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [blockwise(4), StageConfig(name="all", steps=2)]
    options: dict[str, Any] = {"cache": filled_cache, "stages": stages, "gradient_accumulation_steps": 2}
    whole = make_compressed_run("whole", **options)
    distill(whole)
    assert steps_of(whole) == [0, 4, 6]
    assert [line["step"] for line in log_of(whole)] == [5, 6]

    broken = make_compressed_run("broken", **options)
    taken: list[int] = []
    step = LayerFit.step

    def dies(self: LayerFit) -> None:
        taken.append(1)
        if len(taken) == 6:  # the second step of the second layer
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(layerfit_module.LayerFit, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            distill(broken)
    assert steps_of(broken) == [0]
    with monkeypatch.context() as patch:
        patch.setattr(layerfit_module.LayerFit, "step", lambda self: (taken.append(1), step(self))[1])
        distill(broken)
    assert len(taken) == 6 + 4  # the first layer is not trained again
    assert changed(weights(whole, 6), weights(broken, 6)) == set()
    assert log_of(broken) == log_of(whole)


@pytest.mark.parametrize("packing", ["isolate", "truncate"])
def test_layers_learn_from_what_the_teacher_does_with_tokens_and_documents(
    make_compressed_run: MakeRun, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    """The whole teacher, called document by document without padding, must see the same in its experts."""
    run = make_compressed_run(stages=[blockwise(2)], per_device_train_batch_size=3)
    run.config.distillation.dataset.packing = packing
    learnt: dict[int, list[Tensor]] = {}

    def look(self: LayerFit, original: Any, arguments: Any, keywords: Any, output: Tensor) -> None:
        rows = self._rows.nonzero().squeeze(-1)
        learnt.setdefault(id(self), []).append(torch.cat([arguments[0][rows], output[rows]], -1).detach().clone())
        see(self, original, arguments, keywords, output)

    see = LayerFit.see
    monkeypatch.setattr(LayerFit, "see", look)
    distill(run)

    dataset = run.config.distillation.dataset
    rows = rows_in_memory(dataset, load_tokenizer(str(teacher_dir)), run.config.seed)
    order = TrainingOrder(rows, seed=run.config.seed, first=0, count=6)
    parts = []
    for row in (order[item] for item in range(6)):
        cuts = np.flatnonzero(np.diff(row["documents"])) + 1
        parts += np.split(row["input_ids"], cuts)
    assert len({len(part) for part in parts}) > 1  # documents of several lengths
    seen: dict[Any, list[Tensor]] = {}

    def record(module: Any, arguments: Any, keywords: Any, output: Tensor) -> None:
        seen.setdefault(module, []).append(torch.cat([arguments[0], output], -1))

    teacher = load_model(str(teacher_dir), dtype="float32")
    for facts in find_experts(teacher):
        facts.module.register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        for part in parts:
            teacher(torch.from_numpy(part).long()[None])
    assert len(learnt) == len(seen) == 2
    for mine, theirs in zip(learnt.values(), seen.values(), strict=True):
        torch.testing.assert_close(torch.cat(mine), torch.cat(theirs), atol=1e-5, rtol=1e-4)


def test_only_what_the_stage_names_trains(make_compressed_run: MakeRun) -> None:
    run = make_compressed_run(stages=[blockwise(2, trainable=[r"delta_out$"])])
    distill(run)
    before, after = weights(run, 0), weights(run, 2)
    assert changed(before, after) == {name for name in before if name.endswith("delta_out")}


def test_what_cannot_be_matched_is_one_line(
    make_run: MakeRun, make_compressed_run: MakeRun, filled_cache: Path
) -> None:
    with pytest.raises(UserError, match="the student has 0 of them and the teacher 2 MoE layers"):
        distill(make_run("plain", stages=[blockwise()]))
    with pytest.raises(UserError, match="nothing of model.layers.0.mlp.experts trains in it"):
        distill(make_compressed_run("norms", stages=[blockwise(trainable=["norm"])]))
    run = make_compressed_run("high", stages=[blockwise(20, learning_rate=1e30)])
    with pytest.raises(UserError, match="the error of model.layers.0.mlp.experts became (nan|inf) at step"):
        distill(run)
    assert steps_of(run) == [0]
