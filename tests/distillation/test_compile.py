"""Training under torch.compile. The backend is `aot_eager`, which traces forward and backward but generates no code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from moe_compress.distillation import distill
from moe_compress.modeling import find_shared_cores, load_model

from .conftest import MakeRun
from .test_training import Killed, kill_at, log_of, weights


def test_a_compiled_student_trains_and_resumes_as_one_that_is_not(
    make_compressed_run: MakeRun, filled_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_compressed_run("plain", cache=filled_cache, max_steps=3)
    distill(plain)
    compiled = make_compressed_run(
        "compiled", cache=filled_cache, max_steps=3, torch_compile=True, torch_compile_backend="aot_eager"
    )
    torch._dynamo.reset()
    counters.clear()
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        with pytest.raises(Killed):
            distill(compiled)
    assert counters["frames"]["ok"] > 0
    distill(compiled)
    assert len(log_of(plain)) == len(log_of(compiled)) == 3
    for one, other in zip(log_of(plain), log_of(compiled), strict=True):
        for key in ("loss", "ce", "kl", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)
    for name, parameter in weights(plain, 3).items():
        torch.testing.assert_close(parameter, weights(compiled, 3)[name], atol=1e-4, rtol=1e-3)
    zero, last = (load_file(compiled.checkpoint(step) / "model.safetensors") for step in (0, 3))
    assert set(last) == set(zero)
    assert find_shared_cores(load_model(str(compiled.checkpoint(3))))
