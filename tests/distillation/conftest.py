"""A tiny random OLMoE with its tokenizer, a text file, and runs made of them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from moe_compress.config import Config, StageConfig
from moe_compress.distillation.generate import fill_cache
from moe_compress.factorization.fit import FitSpec, fit
from moe_compress.modeling import compress_in_memory, expert_weights, find_experts, load_model, load_tokenizer
from moe_compress.run import Run

VOCABULARY = 97
LENGTH = 16
DOCUMENTS = 40

MakeRun = Callable[..., Run]


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; id 0 ends a document."""
    vocabulary = {"<eos>": 0, "<unk>": 1} | {word: number for number, word in enumerate(words, start=2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def save_model(path: Path, seed: int, words: list[str], **changes: int) -> Path:
    """A tiny random OLMoE in bf16, with tied embeddings and a tokenizer of `words`."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.3,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    make_tokenizer(words).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def words() -> list[str]:
    """The vocabulary, without its two special tokens."""
    return [f"word{number}" for number in range(VOCABULARY - 2)]


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """The teacher's checkpoint."""
    return save_model(tmp_path_factory.mktemp("models") / "teacher", 1, words)


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """A student of the teacher's shape with other weights."""
    return save_model(tmp_path_factory.mktemp("models") / "student", 2, words)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """Documents of random words."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    choose = random.Random(0)
    texts = [" ".join(choose.choices(words, k=choose.randint(5, 30))) for _ in range(DOCUMENTS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def base_config(teacher_dir: Path, text_file: Path) -> Config:
    """Settings of a short, exact training on the tiny teacher."""
    config = Config()
    config.model.name = str(teacher_dir)
    config.model.dtype = "float32"
    config.seed = 7
    distillation = config.distillation
    distillation.teacher.generation.top_k = 8
    distillation.teacher.generation.batch_size = 3
    distillation.teacher.generation.sequences_per_file = 5
    distillation.dataset.name = str(text_file)
    distillation.dataset.max_length = LENGTH
    distillation.dataset.max_samples = 22
    training = distillation.training
    training.bf16 = False
    training.per_device_train_batch_size = 2
    training.gradient_accumulation_steps = 1
    training.learning_rate = 1e-2
    training.warmup_steps = 1
    training.logging_steps = 1
    training.save_steps = 2
    training.save_total_limit = 100
    training.max_steps = 4
    return config


@pytest.fixture(scope="session")
def filled_cache(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, text_file: Path) -> Path:
    """The cache of `base_config`."""
    directory = tmp_path_factory.mktemp("cache") / "teacher_logits"
    fill_cache(base_config(teacher_dir, text_file), directory)
    return directory


@pytest.fixture
def make_run(tmp_path: Path, teacher_dir: Path, student_dir: Path, text_file: Path) -> MakeRun:
    """Make a run on the tiny teacher, whose zero-shot student is the tiny student; keywords are training settings."""

    def make(
        name: str = "run", *, stages: list[StageConfig] | None = None, cache: Path | None = None, **training: object
    ) -> Run:
        config = base_config(teacher_dir, text_file)
        for key, value in training.items():
            assert hasattr(config.distillation.training, key)
            setattr(config.distillation.training, key, value)
        config.distillation.stages = stages or []
        config.distillation.teacher.cache_dir = str(cache) if cache else None
        run = Run.create(tmp_path / name, config)
        run.checkpoints_dir.mkdir(parents=True)
        shutil.copytree(student_dir, run.checkpoint(0))
        return run

    return make


@pytest.fixture(scope="session")
def compressed_dir(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path) -> Path:
    """The teacher compressed to a core and deltas of rank 2."""
    path = tmp_path_factory.mktemp("models") / "compressed"
    model = load_model(str(teacher_dir))
    spec = FitSpec(parameterization="delta", delta_rank=2, iterations=2)
    results = {
        facts.name: {name: fit(weight, spec).factors for name, weight in expert_weights(facts.module).items()}
        for facts in find_experts(model)
    }
    compress_in_memory(model, results).save_pretrained(path)
    load_tokenizer(str(teacher_dir)).save_pretrained(path)
    return path


@pytest.fixture
def make_compressed_run(make_run: MakeRun, compressed_dir: Path) -> MakeRun:
    """As `make_run`, with the compressed teacher as the student."""

    def make(*arguments: object, **options: object) -> Run:
        run = make_run(*arguments, **options)
        shutil.rmtree(run.checkpoint(0))
        shutil.copytree(compressed_dir, run.checkpoint(0))
        return run

    return make
