"""The terms of the loss that compare routers and hidden states, with a live teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

from moe_compress.distillation import distill
from moe_compress.distillation.layers import LayerRecorder, hidden_error, router_divergence
from moe_compress.errors import UserError
from moe_compress.modeling import load_model
from moe_compress.run import Run

from .conftest import MakeRun
from .test_training import log_of, weights


def live(run: Run, **weights: float) -> Run:
    run.config.distillation.teacher.use_cached_logits = False
    for name, value in weights.items():
        setattr(run.config.distillation.loss, f"{name}_weight", value)
    return run


def test_what_is_recorded_is_what_the_model_itself_reports(teacher_dir: Path, compressed_dir: Path) -> None:
    ids = torch.randint(2, 97, (2, 5), generator=torch.Generator().manual_seed(0))
    recorded: dict[str, Any] = {}
    for name, path in (("teacher", teacher_dir), ("student", compressed_dir)):
        model = load_model(str(path), dtype="float32")
        recorder = LayerRecorder(model, routers=True, hidden=True)
        with torch.no_grad(), recorder.recording():
            reported = model(ids, output_router_logits=True, output_hidden_states=True)
        with torch.no_grad():
            model(ids[:, :2])  # not recorded
        assert len(recorder.router_logits) == len(recorder.hidden) == 2
        for mine, theirs in zip(recorder.router_logits, reported.router_logits, strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(recorder.hidden[0], reported.hidden_states[1])
        recorded[name] = recorder
    mine, theirs = recorded["student"], recorded["teacher"]
    rows = torch.tensor([0, 3, 7])
    expected = [
        kl_div(s[rows].log_softmax(-1), t[rows].softmax(-1), reduction="sum")
        for s, t in zip(mine.router_logits, theirs.router_logits, strict=True)
    ]
    torch.testing.assert_close(
        router_divergence(mine.router_logits, theirs.router_logits, rows), sum(expected) / 2, atol=1e-6, rtol=1e-4
    )
    shares = []
    for s, t in zip(mine.hidden, theirs.hidden, strict=True):
        for row in rows.tolist():
            one, other = s.flatten(0, 1)[row], t.flatten(0, 1)[row]
            shares.append((one - other).norm() ** 2 / other.norm() ** 2)
    torch.testing.assert_close(hidden_error(mine.hidden, theirs.hidden, rows), sum(shares) / 2)


def test_the_terms_get_smaller_where_they_are_trained_on(teacher_dir: Path, compressed_dir: Path) -> None:
    ids = torch.randint(2, 97, (2, 16), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(32)
    teacher, student = (load_model(str(path), dtype="float32") for path in (teacher_dir, compressed_dir))
    theirs, mine = (LayerRecorder(model, routers=True, hidden=True) for model in (teacher, student))
    with torch.no_grad(), theirs.recording():
        teacher(ids)
    optimizer = torch.optim.Adam([parameter for parameter in student.parameters() if parameter.numel()], lr=1e-3)
    values = []
    for _ in range(30):
        with mine.recording():
            student(ids)
        terms = (
            router_divergence(mine.router_logits, theirs.router_logits, rows),
            hidden_error(mine.hidden, theirs.hidden, rows),
        )
        sum(terms).backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append([float(term.detach()) for term in terms])
    assert all(last < 0.8 * first for first, last in zip(values[0], values[-1], strict=True))


def test_the_terms_are_part_of_the_loss_and_of_its_gradient(make_compressed_run: MakeRun) -> None:
    logs = []
    for router, hidden in ((1e-6, 1e-6), (5.0, 50.0)):
        run = make_compressed_run(f"run-{router}", max_steps=3, save_steps=50)
        distill(live(run, router=router, hidden=hidden))
        logs.append(log_of(run))
        for line in logs[-1]:
            blended = 0.5 * line["ce"] + 0.5 * 4 * line["kl"]
            assert line["loss"] == pytest.approx(blended + router * line["router"] + hidden * line["hidden"], rel=1e-4)
    without, first = (lines[0] for lines in logs)
    assert all(norm > 2 * without["grad_norms"][kind] for kind, norm in first["grad_norms"].items())
    assert {"factors", "cores", "routers", "others"} == set(first["grad_norms"])
    total = sum(norm**2 for norm in first["grad_norms"].values()) ** 0.5
    assert total == pytest.approx(first["grad_norm"], rel=1e-4)


def test_accumulation_and_recomputed_activations_change_nothing(make_compressed_run: MakeRun) -> None:
    runs = [
        make_compressed_run("plain", max_steps=3, per_device_train_batch_size=4),
        make_compressed_run("parts", max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        make_compressed_run("again", max_steps=3, per_device_train_batch_size=4, gradient_checkpointing=True),
    ]
    for run in runs:
        distill(live(run, router=0.5, hidden=2.0))
    for run in runs[1:]:
        for one, other in zip(log_of(runs[0]), log_of(run), strict=True):
            for key in ("loss", "router", "hidden", "grad_norm"):
                assert one[key] == pytest.approx(other[key], rel=1e-3)
        for name, parameter in weights(runs[0], 3).items():
            torch.testing.assert_close(parameter, weights(run, 3)[name], atol=2e-4, rtol=1e-3)


def test_a_cache_does_not_hold_the_layers(make_run: MakeRun, filled_cache: Path) -> None:
    run = make_run(cache=filled_cache)
    run.config.distillation.loss.router_weight = 0.1
    with pytest.raises(UserError, match="compare layers that a cache does not hold"):
        distill(run)
