"""Tiny random MoE models on disk, text to calibrate on, and settings for both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_compress.config import Config, DatasetConfig

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 16, "num_experts": 8},
    "mixtral": {"intermediate_size": 16, "num_local_experts": 8},
    "qwen3_moe": {
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {"intermediate_size": 16, "num_local_experts": 8, "head_dim": 8, "sliding_window": 8},
    "granitemoe": {"intermediate_size": 16, "num_local_experts": 8},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["moe", "attention", "moe", "attention"],
        "head_dim": 8,
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
    },
}
# Made by name only; not among the families that everything is tried with.
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
}


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random MoE of a family, with experts strong enough that any change of them shows in the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **{**FAMILIES, **OTHERS}[family], **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    return tiny_model


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Path]:
    """family -> directory of its tiny model with tokenizer and extra files, in shards of a few tensors; made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            tiny_model(family).save_pretrained(path, max_shard_size="40KB")
            tokenizer.save_pretrained(path)
            (path / "NOTICE.txt").write_text("comes along\n")
            (path / "pytorch_model.bin").write_bytes(b"old weights in another format stay behind")
            made[family] = path
        return made[family]

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token per letter."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz .,\n"
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    sentence = "the quick brown fox jumps over the lazy dog, and the cat sleeps. "
    path.write_text("".join(json.dumps({"text": sentence[shift:] * 3}) + "\n" for shift in range(20)))
    return path


@pytest.fixture
def settings(text_file: Path, tmp_path: Path) -> Callable[..., Config]:
    """Settings for a tiny model: one core, the same share for all; `calibrate` switches calibration on (without Fisher
    information), keyword arguments are fields of the compression group."""

    def make(model: Path | str, *, calibrate: bool = False, **compression: Any) -> Config:
        config = Config()
        config.model.name = str(model)
        config.compression.rank = 2
        config.compression.iterations = 2
        config.compression.cores, config.compression.input_basis = 1, 0.0
        config.compression.allocation = "uniform"
        config.compression.calibration.fisher = False
        config.compression.device = "cpu"
        config.compression.calibration.enabled = calibrate
        config.compression.calibration.batch_size = 3
        config.compression.calibration.dataset = DatasetConfig(name=str(text_file), max_length=32, max_samples=10)
        for key, value in compression.items():
            setattr(config.compression, key, value)
        return config

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 33, (2, 16), generator=torch.Generator().manual_seed(1))
