"""The recipe at a tiny scale: it trains, resumes to the same weights, and balances its router layer by layer."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from moe_compress.reference import data, recipe
from moe_compress.reference.card import measure_reference, unigram_loss, write_card
from moe_compress.reference.recipe import ReferenceRecipe, load_balancing_loss, train_reference

TINY = ReferenceRecipe(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    sequence_length=32,
    batch_size=2,
    max_steps=4,
    warmup_steps=1,
    save_steps=2,
)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library with files in every split."""
    root = tmp_path / "library"
    root.mkdir()
    for i in range(60):
        (root / f"module{i}.py").write_text(f"def function_{i}(value):\n    return value + {i}\n" * 6)
    monkeypatch.setattr(data, "stdlib_root", lambda: root)
    return root


def test_a_killed_run_resumes_to_the_same_weights(library, tmp_path, monkeypatch):
    straight = train_reference(tmp_path / "straight", TINY)
    compute_loss, calls = recipe._ReferenceTrainer.compute_loss, []

    def killed(self, model, *arguments, **options):
        calls.append(model.training)
        if sum(calls) == 3:
            raise KeyboardInterrupt
        return compute_loss(self, model, *arguments, **options)

    monkeypatch.setattr(recipe._ReferenceTrainer, "compute_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train_reference(tmp_path / "resumed", TINY)
    assert not (tmp_path / "resumed").exists()
    monkeypatch.setattr(recipe._ReferenceTrainer, "compute_loss", compute_loss)
    resumed = train_reference(tmp_path / "resumed", TINY)
    first, second = (load_file(path / "model.safetensors") for path in (straight, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_the_card_says_what_was_measured(library, tmp_path):
    model_dir = train_reference(tmp_path / "model", replace(TINY, max_steps=1))
    measures = measure_reference(model_dir, TINY)
    assert set(measures.losses) == {"train", "validation", "test"}
    assert all(4 < loss < 8 for loss in measures.losses.values())  # one step from random: near log(300) = 5.7
    assert all(0 < entropy <= 1 for entropy in measures.load_entropy) and len(measures.load_entropy) == 2
    write_card(model_dir, TINY, measures)
    card = (model_dir / "README.md").read_text()
    assert card.startswith("---\n") and f"{measures.losses['test']:.3f}" in card and measures.sample in card


def test_load_balancing_is_one_for_an_even_load_and_counts_each_layer():
    even = torch.eye(4).repeat(8, 1) * 1e-3  # every expert first equally often, probabilities almost equal
    assert load_balancing_loss((even,), 1) == pytest.approx(1.0, abs=1e-3)
    left, right = torch.zeros(8, 2), torch.zeros(8, 2)
    left[:, 0], right[:, 1] = 20.0, 20.0  # each layer uses one expert only; pooled over layers they would be balanced
    assert load_balancing_loss((left, right), 1) == pytest.approx(2.0, abs=1e-3)


def test_unigram_loss_of_uniform_text():
    ids = torch.arange(10).repeat(100, 1)
    assert unigram_loss(ids, ids, 10) == pytest.approx(2.302585, abs=1e-3)
