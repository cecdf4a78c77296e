"""The model that ships: small, loadable, better than a unigram model on text it has not seen, no expert unused."""

import pytest

from moe_compress.evaluation import score_text
from moe_compress.modeling import load_model, load_tokenizer
from moe_compress.reference import REFERENCE_MODEL_DIR
from moe_compress.reference.recipe import packed_ids


@pytest.fixture(scope="module")
def model():
    return load_model("reference", dtype="float32").eval()


def test_it_fits_in_a_package():
    assert sum(file.stat().st_size for file in REFERENCE_MODEL_DIR.iterdir()) < 25e6


def test_it_is_the_model_that_the_issue_names(model):
    config = model.config
    assert (config.model_type, config.num_experts, config.num_experts_per_tok) == ("olmoe", 64, 8)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (4, 192, 64)
    assert config.tie_word_embeddings and config.vocab_size == 4096


def test_it_predicts_unseen_code_and_uses_every_expert(model):
    ids = packed_ids(load_tokenizer("reference"), "test", 256)[:16]
    score = score_text(model, ids, progress=False)
    assert score.loss < 4.0  # a unigram model has 6.5
    assert len(score.routing) == 4
    for layer in score.routing.values():
        assert layer["unused"] == 0 and layer["entropy"] > 0.9


def test_the_tokenizer_is_lossless():
    tokenizer = load_tokenizer("reference")
    text = "def f(x):\n\treturn {'é': x}  # Grüße\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
