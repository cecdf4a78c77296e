"""Model cards: what the hub reads, what a person reads, and that refreshing one leaves the checkpoint whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from moe_compress.compression.card import inherited, model_card, read_metadata, write_card
from moe_compress.evaluation.results import link_best
from moe_compress.report.cards import refresh_cards
from moe_compress.report.collect import collect

from .conftest import compression

ORIGINAL = """---
license: other
license_name: some-license
license_link: LICENSE
language: [en]
tags: [theirs]
---
# The original
"""


@pytest.fixture
def run(make_run):
    run = make_run()
    for step in (0, 20, 50):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "config.json").write_text("{}")
        card = model_card(compression(0.25), {"license": "mit"}, title="x")
        (run.checkpoint(step) / "README.md").write_text(card)
    link_best(run.path, run.checkpoint(50))
    return run


def test_a_card_is_what_the_hub_reads(tmp_path):
    (tmp_path / "README.md").write_text(ORIGINAL)
    metadata = inherited(read_metadata(tmp_path), "org/model")
    card = ModelCard(model_card({**compression(0.25), "model": "org/model"}, metadata, title="small"))
    assert card.data.base_model == "org/model" and card.data.library_name == "transformers"
    assert (card.data.license, card.data.license_name, card.data.language) == ("other", "some-license", ["en"])
    assert "moe-compress" in card.data.tags and "theirs" not in card.data.tags
    assert "| bytes | 4,000 | 1,000 | 25.0 % |" in card.content and "`org/model` (OlmoeForCausalLM)" in card.content


@pytest.mark.parametrize(
    ("cores", "basis", "calibrated", "form"),
    [
        ((0, 0), 0, False, "low-rank factors of its own, fitted by closed_form on the weights alone."),
        ((1, 1), 0, True, "of its own beside a core shared by all experts, fitted by closed_form on what the experts"),
        ((4, 1), 0, True, "of its own beside a core shared by a group of experts, fitted"),
        ((0, 0), 8, True, "of its own, some on a basis of the inputs that all experts of the layer share, fitted"),
        ((0, 1), 8, True, "of its own, some beside a core shared by all experts, some on a basis of the inputs that"),
    ],
)
def test_a_card_says_what_the_experts_became(cores, basis, calibrated, form):
    facts = {**compression(0.25), "calibrated": calibrated}
    for layer in facts["layers"].values():
        up, down = ({**own, "cores": number} for own, number in zip(layer["projections"].values(), cores, strict=True))
        layer["projections"] = {"gate_up_proj": {**up, "basis": basis}, "down_proj": {**down, "basis": 0}}
    text = model_card(facts, {}, title="x")
    assert form in text and ("shared-core" in ModelCard(text).data.tags) == (max(cores) > 0)


@pytest.mark.parametrize(
    "text", [None, "# no metadata", "---\n[broken\n---\n", "---\n- a list\n---\n", "x\n---\na: 1\n---"]
)
def test_an_original_without_metadata(tmp_path, text):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert read_metadata(tmp_path) == {}
    assert inherited({}, str(tmp_path)) == {}  # a local path is nothing to link to


def test_cards_are_refreshed_with_what_was_measured(run):
    assert refresh_cards(run, collect(run)) == 3
    card = ModelCard.load(run.checkpoint(50) / "README.md")
    assert card.data.license == "mit"
    results = {(result.dataset_type, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert results["stdlib", "perplexity"] == pytest.approx(2.718281828**1.5, abs=1e-5)
    assert results["stdlib", "kl"] == 0.3 and results["stdlib_next_line", "acc"] == 0.41
    assert "Trained for 50 steps" in card.content and "best by perplexity" in card.content
    assert "| this model | 4.48 ± 0.05 |" in card.content
    zero_shot = (run.checkpoint(0) / "README.md").read_text()
    assert "Trained for" not in zero_shot and "7.39 ± 0.05" in zero_shot
    assert refresh_cards(run, collect(run)) == 0  # nothing new, nothing written
    assert sorted(path.name for path in run.checkpoint(50).iterdir()) == ["README.md", "config.json"]


def test_a_deleted_checkpoint_is_not_made_again(run):
    shutil.rmtree(run.checkpoint(20))
    assert refresh_cards(run, collect(run)) == 2
    assert not run.checkpoint(20).exists()
    assert not write_card(run.checkpoint(20), "text") and not run.checkpoint(20).exists()


def test_a_card_that_may_not_be_written_stops_nothing(run, monkeypatch):
    def refuse(directory: Path, text: str) -> bool:
        raise PermissionError(directory)

    monkeypatch.setattr("moe_compress.report.cards.write_card", refuse)
    assert refresh_cards(run, collect(run)) == 0
