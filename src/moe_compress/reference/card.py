"""What the reference MoE is worth: losses beside a unigram model's, routing, and the model card that says so."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_compress.evaluation.perplexity import score_text
from moe_compress.files import write_atomically
from moe_compress.reference.data import Split
from moe_compress.reference.recipe import ReferenceRecipe, packed_ids

PROMPT = "class Reader:\n    def __init__(self"


@dataclass(frozen=True)
class ReferenceMeasures:
    """Losses in nats per token; load entropy relative to that of a uniform load, per layer."""

    tokens: dict[str, int]
    losses: dict[str, float]
    unigram_losses: dict[str, float]
    load_entropy: list[float]
    largest_load: list[float]
    dead_experts: list[int]
    sample: str


def unigram_loss(train_ids: torch.Tensor, ids: torch.Tensor, vocab_size: int) -> float:
    """Loss of the add-one unigram model of the training text on the targets of other rows, in nats per token."""
    counts = torch.bincount(train_ids.flatten(), minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[ids[:, 1:]].mean().item()


def measure_reference(model_dir: Path, recipe: ReferenceRecipe, prompt: str = PROMPT) -> ReferenceMeasures:
    """Measure a trained reference MoE on every split; the training loss is taken on a part as large as validation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    rows: dict[Split, torch.Tensor] = {
        split: packed_ids(tokenizer, split, recipe.sequence_length, recipe.seed)
        for split in ("train", "validation", "test")
    }
    losses: dict[str, float] = {}
    unigram: dict[str, float] = {}
    routing: list[dict[str, Any]] = []
    for split, ids in rows.items():
        part = ids[: len(rows["validation"])] if split == "train" else ids
        score = score_text(model, part, progress=False)
        losses[split] = score.loss
        unigram[split] = unigram_loss(rows["train"], ids, recipe.vocab_size)
        if split == "validation":
            routing = list(score.routing.values())
    torch.manual_seed(recipe.seed)
    prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    generated = model.generate(prompt_ids, max_new_tokens=160, do_sample=True, temperature=0.6, top_p=0.9)
    return ReferenceMeasures(
        tokens={split: ids.numel() for split, ids in rows.items()},
        losses=losses,
        unigram_losses=unigram,
        load_entropy=[layer["entropy"] for layer in routing],
        largest_load=[layer["largest"] for layer in routing],
        dead_experts=[layer["unused"] for layer in routing],
        sample=str(tokenizer.decode(generated[0], skip_special_tokens=True)),
    )


def write_card(model_dir: Path, recipe: ReferenceRecipe, measures: ReferenceMeasures) -> None:
    """Write `README.md` of the model directory in the format of the hub."""
    splits = "\n".join(
        f"| {split} | {measures.tokens[split]:,} | {measures.losses[split]:.3f} | "
        f"{math.exp(measures.losses[split]):.1f} | {measures.unigram_losses[split]:.3f} |"
        for split in measures.tokens
    )
    layers = "\n".join(
        f"| {layer} | {entropy:.3f} | {largest:.2f} | {dead} |"
        for layer, (entropy, largest, dead) in enumerate(
            zip(measures.load_entropy, measures.largest_load, measures.dead_experts, strict=True)
        )
    )
    settings = "\n".join(f"| {key} | {value} |" for key, value in asdict(recipe).items())
    trained = recipe.max_steps * recipe.batch_size * recipe.sequence_length
    text = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, olmoe, moe-compress]
---

# Reference MoE of moe-compress

A small Mixture-of-Experts language model of the OLMoE architecture ({recipe.num_experts} experts,
top-{recipe.num_experts_per_tok}, {recipe.num_hidden_layers} layers), trained on the source of the Python
standard library so that compression can be tried, tested and measured without a hub. It writes plausible
Python; it knows nothing else.

Made by `moe-compress reference train`: {recipe.max_steps:,} steps, {trained:,} tokens. Files are split by a
hash of their path, so that the text of validation and test was never trained on.

| split | tokens | loss (nats per token) | perplexity | loss of a unigram model |
|---|---|---|---|---|
{splits}

The training loss is taken on as many rows as validation has.

## Routing on validation text

Entropy is relative to a uniform load (1 is perfectly balanced); the largest load is that of the busiest expert, in
multiples of a fair share.

| layer | load entropy | largest load | dead experts |
|---|---|---|---|
{layers}

## Sample (temperature 0.6, seed {recipe.seed}, top-p 0.9)

```python
{measures.sample}
```

## Recipe

| setting | value |
|---|---|
{settings}
"""
    write_atomically(model_dir / "README.md", text)


def main(output_dir: Path, recipe: ReferenceRecipe | None = None) -> None:
    """Train (or resume training) the reference MoE and write its card: `moe-compress reference train`."""
    from moe_compress.reference.recipe import train_reference

    recipe = recipe or ReferenceRecipe()
    train_reference(output_dir, recipe)
    write_card(output_dir, recipe, measure_reference(output_dir, recipe))
