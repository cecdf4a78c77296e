"""Conversations from file to loss: masked, ragged and isolated rows train alike from a cache and a live teacher."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from moe_compress.distillation import TeacherCache, distill, generate_teacher_logits
from moe_compress.distillation.records import targets_of
from moe_compress.distillation.verify import verify_cache
from moe_compress.modeling import load_tokenizer
from moe_compress.run import Run

from .conftest import MakeRun
from .test_training import log_of

# word0 opens a prompt and word1 an answer; the end of a turn is a word as well.
TEMPLATE = (
    "{% for m in messages %}{{ 'word1 ' if m.role == 'assistant' else 'word0 ' }}{{ m.content }} word2 {% endfor %}"
    "{% if add_generation_prompt %}word1 {% endif %}"
)


@pytest.fixture
def chat_run(make_run: MakeRun, teacher_dir: Path, tmp_path: Path, words: list[str]) -> Run:
    """A run on conversations; teacher and student have a chat template."""
    path = tmp_path / "chats.jsonl"
    choose = random.Random(0)
    turns = [
        [
            {"role": role, "content": " ".join(choose.choices(words[3:], k=choose.randint(1, 6)))}
            for role in ("user", "assistant") * choose.randint(1, 2)
        ]
        for _ in range(30)
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_dir, teacher)
    run = make_run(max_steps=2)
    for directory in (teacher, run.checkpoint(0)):
        tokenizer = load_tokenizer(directory)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(directory)
    run.config.model.name = str(teacher)
    run.config.distillation.dataset.name = str(path)
    run.config.distillation.dataset.messages_column = "messages"
    run.config.distillation.teacher.generation.top_k = 97
    return run


@pytest.mark.parametrize("packing", ["pack", "isolate", "truncate"])
def test_a_cache_trains_as_the_live_teacher_does(chat_run: Run, packing: str) -> None:
    chat_run.config.distillation.dataset.packing = packing
    generate_teacher_logits(chat_run)
    verify_cache(chat_run.teacher_logits_dir, chat_run.config, sequences=5)
    cache = TeacherCache(chat_run.teacher_logits_dir)
    records = [cache[index] for index in range(len(cache))]
    assert {len(record["input_ids"]) for record in records} == {16} or packing == "truncate"
    assert any(not record["labelled"].all() for record in records)
    stored = 0
    for file in cache.files:
        with h5py.File(chat_run.teacher_logits_dir / file.name) as arrays:
            assert len(arrays["input_ids"]) == file.tokens
            stored += len(arrays["indices"])
    assert (
        stored == sum(targets_of(record["labelled"]).sum() for record in records) < sum(f.tokens for f in cache.files)
    )

    distill(chat_run)
    cached = log_of(chat_run)
    shutil.rmtree(chat_run.teacher_logits_dir)
    for path in (chat_run.logs_dir / "train.jsonl", chat_run.path / "training_complete.json"):
        path.unlink()
    for step, path in chat_run.checkpoints():
        if step:
            shutil.rmtree(path)
    chat_run.config.distillation.teacher.use_cached_logits = False
    distill(chat_run)
    for one, other in zip(cached, log_of(chat_run), strict=True):
        for key in ("loss", "ce", "kl"):
            assert one[key] == pytest.approx(other[key], rel=2e-3) and np.isfinite(one[key])
