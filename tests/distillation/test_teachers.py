"""Teachers of another vocabulary size, of another encoder, and larger than memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_compress.config import Config
from moe_compress.distillation import TeacherCache, distill, generate_teacher_logits
from moe_compress.distillation.generate import fill_cache
from moe_compress.distillation.losses import distillation_loss
from moe_compress.distillation.targets import DenseTargets
from moe_compress.distillation.teachers import common_vocabulary, input_device, load_spread_teacher
from moe_compress.errors import UserError
from moe_compress.modeling import load_tokenizer
from moe_compress.settings import compose

from .conftest import VOCABULARY, MakeRun, save_model
from .test_training import log_of


def test_only_padding_may_differ(make_run: MakeRun) -> None:
    tokenizer = load_tokenizer(make_run("unused").config.model.name)  # uses all of 97 ids
    assert common_vocabulary(128, 97, tokenizer) == common_vocabulary(97, 128, tokenizer) == 97
    assert common_vocabulary(90, 90, tokenizer) == 90  # what works today, odd as it is, is not refused
    with pytest.raises(UserError, match="vocabulary of 96 tokens and the student one of 128.* uses 97"):
        common_vocabulary(96, 128, tokenizer)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("larger", ["teacher", "student"])
def test_padded_vocabularies_distil(
    make_run: MakeRun, tmp_path: Path, words: list[str], larger: str, cached: bool
) -> None:
    padded = str(save_model(tmp_path / "padded", 1, words, vocab_size=VOCABULARY + 31))
    run = make_run(max_steps=1, save_steps=1)
    config = run.config
    config.distillation.teacher.use_cached_logits = cached
    if larger == "teacher":
        config.distillation.teacher.model_path = padded
    else:
        config.distillation.teacher.model_path = config.model.name
        config.model.name = padded
        for path in Path(padded).iterdir():
            (run.checkpoint(0) / path.name).write_bytes(path.read_bytes())
    generate_teacher_logits(run)
    if cached:
        assert TeacherCache(run.teacher_logits_dir).vocab_size == VOCABULARY
    distill(run)
    (line,) = log_of(run)
    assert np.isfinite(line["loss"]) and line["kl"] > 0


def test_a_narrow_teacher_is_compared_on_its_own_ids() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 9, 20), torch.randn(1, 9, 15)
    options = {"alpha": 1.0, "temperature": 2.0}
    labels = torch.randint(0, 15, (1, 9))
    whole = distillation_loss(student, labels, DenseTargets(teacher), **options)
    cut = distillation_loss(student[..., :15], labels, DenseTargets(teacher), **options)
    torch.testing.assert_close(whole.kl, cut.kl)
    assert whole.ce > cut.ce  # cross-entropy still keeps the student from the ids that no token uses


def test_draws_train_like_the_whole_distribution(make_run: MakeRun) -> None:
    """With very many draws the loss is that of the live teacher; with few it is so in expectation (test_encoders)."""
    sampled, live = make_run("sampled", max_steps=2), make_run("live", max_steps=2)
    live.config.distillation.teacher.use_cached_logits = False
    for run in (sampled, live):
        run.config.distillation.loss.temperature = 1.0
        generation = run.config.distillation.teacher.generation
        generation.encoder, generation.samples = "sample", 20000
    generate_teacher_logits(sampled)
    for run in (sampled, live):
        distill(run)
    for one, other in zip(log_of(sampled), log_of(live), strict=True):
        assert one["ce"] == pytest.approx(other["ce"], rel=2e-3)
        assert one["kl"] == pytest.approx(other["kl"], abs=0.02)


def test_temperatures_that_draws_cannot_serve_are_refused_at_once(make_run: MakeRun) -> None:
    sample = "distillation.teacher.generation.encoder=sample"
    with pytest.raises(UserError, match="temperature .* is 2, but .* serves 1 and sample_temperature=1 alone"):
        compose([sample, "distillation.loss.temperature=2"])
    compose([sample, "distillation.loss.temperature=1"])
    compose([sample, "distillation.loss.temperature=2", "distillation.teacher.generation.sample_temperature=2"])
    compose([sample, "distillation.loss.temperature=2", "distillation.teacher.use_cached_logits=false"])
    with pytest.raises(UserError, match="is 3, but"):
        compose([sample, "distillation.loss.temperature=1", "distillation.stages=[{steps: 1, temperature: 3}]"])
    for unasked in ("alpha: 0", "kind: blockwise"):
        compose([sample, f"distillation.stages=[{{steps: 1, temperature: 3, {unasked}}}]"])


@pytest.fixture
def config(make_run: MakeRun) -> Config:
    return make_run("unused").config


def test_a_teacher_larger_than_memory_writes_the_same_logits(config: Config, tmp_path: Path) -> None:
    fill_cache(config, tmp_path / "whole")
    teacher = config.distillation.teacher
    teacher.device_map = "auto"
    teacher.max_memory = {"cpu": "16KB"}
    teacher.offload_folder = str(tmp_path / "offload")
    model = load_spread_teacher(config)
    places = set(map(str, model.hf_device_map.values()))
    assert "disk" in places and any(parameter.device.type == "meta" for parameter in model.parameters())
    assert input_device(model) == torch.device("cpu")
    fill_cache(config, tmp_path / "offloaded")
    whole, offloaded = TeacherCache(tmp_path / "whole"), TeacherCache(tmp_path / "offloaded")
    for index in range(22):
        for name, array in whole[index].items():
            np.testing.assert_allclose(array.astype(float), offloaded[index][name].astype(float), atol=2e-3)


def test_inputs_go_to_the_first_accelerator() -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": 1, "model.layers.1": 0, "lm_head": "disk"}
    assert input_device(SimpleNamespace(hf_device_map=places)) == torch.device("cuda:1")


def test_spreading_is_not_for_several_ranks(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.distillation.teacher.device_map = "auto"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="GPUS_PER_WORKER"):
        load_spread_teacher(config)


def test_memory_per_device_is_a_setting() -> None:
    teacher = compose(["distillation.teacher.max_memory={0: 70GiB, cpu: 200GiB}"]).distillation.teacher
    assert teacher.max_memory == {"0": "70GiB", "cpu": "200GiB"}
