"""A tiny random OLMoE with a byte-level tokenizer, and a run of it with its zero-shot student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

import moe_compress  # noqa: F401
from moe_compress.config import Config, DatasetConfig, ModelConfig
from moe_compress.factorization.factors import DeltaFactors
from moe_compress.modeling import compress_in_memory, find_experts, load_model
from moe_compress.run import Run

LENGTH = 32


def make_model(seed: int = 0) -> OlmoeForCausalLM:
    torch.manual_seed(seed)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=512,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    ).eval()


def mean_core(model: OlmoeForCausalLM, rank: int = 8, cores: int = 1) -> OlmoeForCausalLM:
    """Compress in memory: the mean as core, the truncated SVD of the rest as deltas."""
    results = {}
    for facts in find_experts(model):
        results[facts.name] = {}
        for name in facts.projections:
            weight = getattr(facts.module, name).detach()
            core = weight.mean(0) if cores else None
            u, s, v = torch.linalg.svd(weight - (core if cores else 0), full_matrices=False)
            factors = DeltaFactors(core, u[..., :rank] * s[:, None, :rank], v[:, :rank])
            results[facts.name][name] = factors
    return compress_in_memory(model, results)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["    def name(self, other):\n        return self.name\n" * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", bos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path_factory.mktemp("models") / "teacher"
    make_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def student_dir(teacher_dir: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = teacher_dir.with_name("student")
    mean_core(load_model(teacher_dir)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text("\n".join(f"value_{number} = other.{number % 7} + name" for number in range(60)), encoding="utf-8")
    return path


@pytest.fixture
def config(teacher_dir: Path, text_file: Path) -> Config:
    config = Config(model=ModelConfig(name=str(teacher_dir)))
    config.evaluation.tasks = {}
    config.evaluation.generate_tokens = 8
    config.evaluation.poll_seconds = 0.05
    config.evaluation.perplexity = DatasetConfig(name=str(text_file), max_length=LENGTH, max_samples=6)
    return config


@pytest.fixture
def make_run(tmp_path: Path, config: Config, student_dir: Path) -> Callable[..., Run]:
    """A function that makes a run with a link to the same student at each of the given steps."""

    def make(*steps: int) -> Run:
        run = Run.create(tmp_path / "run", config)
        for step in steps or (0,):
            run.checkpoint(step).parent.mkdir(parents=True, exist_ok=True)
            run.checkpoint(step).symlink_to(student_dir, target_is_directory=True)
        return run

    return make
