"""Batches of records: masks become labels, padding is not trained on, isolated documents do not see each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_compress.distillation.data import collate
from moe_compress.distillation.records import AXES, ENTRIES, Field, flatten, spread, targets_of, text_fields
from moe_compress.modeling import load_model

HALF = np.dtype(np.float16)


def row(ids: list[int], labelled: list[int], documents: list[int]) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(ids), "labelled": np.array(labelled), "documents": np.array(documents)}


def test_shorter_rows_are_padded_and_masked() -> None:
    rows = [row([5, 6, 7], [0, 1, 1], [0, 0, 0]), row([8, 9], [1, 1], [0, 0])]
    extra = [{**item, "logsumexp": np.ones(len(item["input_ids"]), HALF)} for item in rows]
    batch = collate(extra)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, 9, -100]]
    assert batch["teacher"]["logsumexp"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.keys() == {"input_ids", "labels", "teacher"}


def test_positions_start_anew_at_each_document() -> None:
    batch = collate([row([1] * 6, [1] * 6, [0, 0, 0, 1, 2, 2]), row([1] * 5, [1] * 5, [0] * 5)], isolate=True)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]


def test_an_isolated_document_is_seen_as_if_alone(teacher_dir: Path) -> None:
    model = load_model(teacher_dir, dtype="float32").eval()
    documents = [[3, 4, 5, 6], [7, 8, 9], [10, 11]]
    numbers = [number for number, document in enumerate(documents) for _ in document]
    batch = collate([row([*range(3, 12)], [1] * 9, numbers)] * 2, isolate=True)
    del batch["labels"]
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits
        alone = [model(input_ids=torch.tensor([document]), use_cache=False).logits[0] for document in documents]
        crossing = model(input_ids=batch["input_ids"], use_cache=False).logits
    for index in range(2):
        torch.testing.assert_close(together[index], torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert (crossing[0] - together[0])[4:].abs().max() > 1e-3


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 5), st.randoms(use_true_random=False))
def test_a_record_survives_storing_targets_and_entries_alone(labelled: list[bool], width: int, random: object) -> None:
    choose = np.random.default_rng(random.randint(0, 2**32))  # type: ignore[attr-defined]
    tokens = len(labelled)
    stored = targets_of(np.array(labelled))
    assert stored.tolist() == [*labelled[1:], True]
    fields = {
        **text_fields(1000, tokens),
        ENTRIES: Field((), np.dtype(np.uint8)),
        "indices": Field((width,), np.dtype(np.uint16), "entry"),
        "entropy": Field((2,), HALF),
    }
    entries = choose.integers(1, width + 1, stored.sum())
    record = {
        "input_ids": choose.integers(0, 1000, tokens),
        "documents": np.zeros(tokens, int),
        "labelled": np.array(labelled),
        ENTRIES: entries,
        "indices": np.where(np.arange(width) < entries[:, None], choose.integers(1, 1000, (stored.sum(), width)), 0),
        "entropy": choose.random((stored.sum(), 2)).astype(HALF),
    }
    flat = {name: flatten(name, field, record) for name, field in fields.items()}
    lengths = {"token": tokens, "target": stored.sum(), "entry": entries.sum()}
    for name, field in fields.items():
        assert field.axis in AXES and len(flat[name]) == lengths[field.axis] and flat[name].dtype == field.dtype
    back = spread(fields, lambda name, axis: flat[name])
    for name, field in fields.items():
        if field.axis == "token":
            assert (back[name] == record[name]).all()
        else:
            assert (back[name][stored] == record[name]).all() and not back[name][~stored].any()
            assert back[name].shape == (tokens, *field.shape)
