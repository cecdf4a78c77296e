"""Mistakes with checkpoints are told in one line, and what is whole is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from moe_compress.errors import UserError
from moe_compress.modeling import load_model, load_tokenizer, resolve_model_path
from moe_compress.modeling.checkpoint import weight_files


@pytest.fixture
def checkpoint(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    """An original OLMoE in several shards, with a tokenizer."""
    path = tmp_path / "model"
    tiny_model("olmoe").save_pretrained(path, max_shard_size="30KB")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    return path


def fails(path: Any, match: str, **kwargs: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_model(path, **kwargs)
    assert "\n" not in str(caught.value)


def test_loads_a_whole_checkpoint(checkpoint: Path, tiny_model: Callable[..., Any], ids: torch.Tensor) -> None:
    model = load_model(checkpoint, require_moe=True)
    assert not model.training
    assert torch.equal(model(ids).logits, tiny_model("olmoe")(ids).logits)
    assert load_model(str(checkpoint), dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert load_tokenizer(checkpoint)("b a")["input_ids"] == [2, 1]
    assert len(weight_files(checkpoint)) > 2


def test_loads_a_compressed_checkpoint(
    all_saved: dict[tuple[str, str], Path], architecture: str, ids: torch.Tensor
) -> None:
    path = all_saved[architecture, "wrapper"]
    model = load_model(path, require_moe=True)
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(path)(ids).logits)


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    fails(checkpoint, "has no config.json")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_broken_config(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    fails(checkpoint, "config.json")


def test_an_unknown_architecture(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    fails(checkpoint, "cannot be loaded: .*nothing-known")


def test_a_missing_shard(checkpoint: Path) -> None:
    shard = weight_files(checkpoint)[1]
    shard.unlink()
    fails(checkpoint, f"1 of .* shards are missing, such as {shard.name}")


def test_a_broken_index(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    fails(checkpoint, "not an index of shards")


@pytest.mark.parametrize("keep", [0.9, 0.0])
def test_a_truncated_shard(checkpoint: Path, keep: float) -> None:
    shard = weight_files(checkpoint)[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * keep)])
    fails(checkpoint, f"{shard.name} is truncated or damaged")


def test_a_tensor_that_is_not_in_its_shard(checkpoint: Path) -> None:
    shard = weight_files(checkpoint)[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    fails(checkpoint, f"lacks the tensor {name}")


def test_a_tensor_that_is_nowhere(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Transformers only warns and initializes it at random."""
    tiny_model("olmoe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fails(tmp_path, "1 tensors of the model are not in the checkpoint, such as model.layers.0.self_attn.q_proj.weight")


def test_other_shapes_than_the_config(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    fails(checkpoint, "tensors have other shapes than its config.json says")


def test_no_weights(checkpoint: Path) -> None:
    for file in checkpoint.glob("model*"):
        file.unlink()
    (checkpoint / "training_args.bin").write_bytes(b"")  # the Trainer's, no weights
    fails(checkpoint, "there are no weights to load")


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    for file in checkpoint.glob("model*"):
        file.unlink()
    torch.save({}, checkpoint / "pytorch_model.bin")
    fails(checkpoint, r"only pickled weights \(pytorch_model.bin\).*convert them: ")


def test_a_dense_model_where_an_moe_is_needed(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load_model(tmp_path)
    fails(tmp_path, f"{tmp_path} .*is a dense model", require_moe=True)


@pytest.mark.parametrize("name", ["olmoe", "mixtral"])
def test_no_tokenizer(all_saved: dict[tuple[str, str], Path], name: str) -> None:
    """Transformers makes an empty tokenizer up for OLMoE."""
    with pytest.raises(UserError, match="has no tokenizer files"):
        load_tokenizer(all_saved[name, "delta"])


def test_a_broken_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="has no tokenizer that can be loaded"):
        load_tokenizer(checkpoint)


def test_packages_that_are_not_installed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized models and some tokenizers need their own."""

    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("Using `gptq` requires gptqmodel:\n`pip install gptqmodel`")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    fails(checkpoint, "cannot be loaded: .*requires gptqmodel: `pip install gptqmodel`")
    (checkpoint / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(UserError, match="no tokenizer that can be loaded: .*`pip install gptqmodel`"):
        load_tokenizer(checkpoint)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    fails(tmp_path / "nothing", "no such directory")
    fails("./nothing", "no such directory")
    fails("a/b/c", "no such directory")
    file = tmp_path / "file"
    file.write_text("")
    fails(file, "is a file; give the directory")


class _Response:
    status_code, headers, request, text = 404, {}, None, ""


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (
            hub_errors.RepositoryNotFoundError("no", response=_Response()),
            "neither a local directory nor a model on the",
        ),
        (hub_errors.GatedRepoError("no", response=_Response()), "is gated"),
        (hub_errors.RevisionNotFoundError("no", response=_Response()), "has no revision 'v2'"),
        (hub_errors.HFValidationError("no"), "neither a local directory nor a model on the hub"),
        (hub_errors.LocalEntryNotFoundError("no"), "the hub cannot be reached"),
        (ConnectionError("no"), "the hub cannot be reached"),
    ],
)
def test_hub_ids_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, error: Exception, match: str) -> None:
    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fails("someone/something", match, revision="v2")


def test_hub_ids_are_downloaded_without_pickles(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, **kwargs: Any) -> str:
        asked.update(kwargs, repository=repository)
        return str(shutil.copytree(checkpoint, tmp_path / "cache"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model_path("someone/something", "main") == tmp_path / "cache"
    assert (asked["repository"], asked["revision"]) == ("someone/something", "main")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    files = ["README.md", "LICENSE", "LICENSE.md", "NOTICE", "tekken.json", "docs/README.md"]
    assert list(filter_repo_objects(files, allow_patterns=asked["allow_patterns"])) == files[:-1]


def test_offline_hub_ids_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("someone/surely-not-in-the-cache", "the hub cannot be reached")


def test_the_reference_model(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setattr("moe_compress.reference.REFERENCE_MODEL_DIR", checkpoint)
    assert resolve_model_path("reference") == checkpoint
    (checkpoint / "config.json").unlink()
    fails("reference", "reference model is not in .*reference train")
