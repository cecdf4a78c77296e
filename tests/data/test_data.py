"""Sources and packing: nothing lost, nothing padded, and errors that name what is wrong."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_compress.config import DatasetConfig
from moe_compress.data import load_documents, packed_dataset, read_rows, rows_in_memory
from moe_compress.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<eos>": 0, "<unk>": 1, **{str(i): i + 2 for i in range(100)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {i} {i}", "other": "x"}) + "\n" for i in range(20)))
    return str(path)


def test_rows_are_full_and_hold_every_document_once(lines, tokenizer):
    rows = packed_dataset(DatasetConfig(name=lines, max_length=8), tokenizer, seed=0)["input_ids"]
    assert [len(row) for row in rows] == [8] * 10
    flat = [token for row in rows for token in row]
    assert sorted(flat) == sorted([0] * 20 + [i + 2 for i in range(20) for _ in range(3)])


def test_order_follows_the_seed(lines):
    def read(seed):
        return list(load_documents(DatasetConfig(name=lines), seed))

    assert read(1) == read(1)
    assert read(1) != read(2)
    assert sorted(read(1)) == sorted(read(2))


def test_streaming_reads_the_same_documents(lines):
    streamed = list(load_documents(DatasetConfig(name=lines, streaming=True), seed=0))
    assert sorted(streamed) == sorted(load_documents(DatasetConfig(name=lines), seed=0))


def test_max_samples_limits_rows(lines, tokenizer):
    assert len(packed_dataset(DatasetConfig(name=lines, max_length=8, max_samples=3), tokenizer, seed=0)) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_file_is_one_document(tmp_path, streaming):
    (tmp_path / "README.md").write_text("two files")
    for name in ("play", "poem"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\nsecond line\n")
    for place, names in ((tmp_path / "play.txt", ["play"]), (tmp_path, ["play", "poem"])):
        documents = sorted(load_documents(DatasetConfig(name=str(place), streaming=streaming), seed=0))
        assert [document.splitlines() for document in documents] == [[name, "second line"] for name in names]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_lists_the_columns(lines, streaming):
    dataset = DatasetConfig(name=lines, text_column="body", streaming=streaming)
    with pytest.raises(UserError, match="no column 'body'.*text, other"):
        list(load_documents(dataset, seed=0))


def test_unknown_split_of_stdlib():
    with pytest.raises(UserError, match="no split 'dev'"):
        list(load_documents(DatasetConfig(split="dev"), seed=0))


def test_unknown_file_type(tmp_path):
    path = tmp_path / "data.xyz"
    path.write_text("x")
    with pytest.raises(UserError, match="unknown type"):
        list(load_documents(DatasetConfig(name=str(path)), seed=0))


def test_too_little_text(lines, tokenizer):
    with pytest.raises(UserError, match="fewer than max_length=1000"):
        packed_dataset(DatasetConfig(name=lines, max_length=1000), tokenizer, seed=0)


def test_document_numbers_follow_the_documents(lines, tokenizer):
    rows = list(read_rows(DatasetConfig(name=lines, max_length=10), tokenizer, seed=0))
    assert [row["documents"].tolist() for row in rows[:2]] == [[0] * 4 + [1] * 4 + [2] * 2, [0] * 2 + [1] * 4 + [2] * 4]
    assert all(row["labelled"].all() for row in rows)


def test_an_isolated_document_does_not_learn_its_first_token(lines, tokenizer):
    rows = list(read_rows(DatasetConfig(name=lines, max_length=10, packing="isolate"), tokenizer, seed=0))
    assert [place for place in range(10) if not rows[0]["labelled"][place]] == [4, 8]
    assert [place for place in range(10) if not rows[1]["labelled"][place]] == [2, 6]


def test_truncated_rows_hold_one_document_each_and_no_padding(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(["7"] * n)}) + "\n" for n in (1, 3, 9)))
    rows = list(read_rows(DatasetConfig(name=str(path), max_length=6, packing="truncate"), tokenizer, seed=0))
    assert sorted(row["input_ids"].tolist() for row in rows) == [[9, 0], [9, 9, 9, 0], [9] * 6]
    assert all(not row["documents"].any() and row["labelled"].all() for row in rows)


def test_calibration_and_evaluation_want_full_rows(lines, tokenizer):
    with pytest.raises(UserError, match="packing=truncate is for distillation"):
        packed_dataset(DatasetConfig(name=lines, max_length=8, packing="truncate"), tokenizer, seed=0)


@pytest.mark.parametrize("read", [rows_in_memory, packed_dataset])
def test_a_stream_is_not_held_without_a_limit(lines, tokenizer, read):
    with pytest.raises(UserError, match="is a stream: set max_samples"):
        read(DatasetConfig(name=lines, max_length=8, streaming=True), tokenizer, seed=0)


def test_parts_of_a_file_have_nothing_in_common(lines):
    parts = [
        list(load_documents(DatasetConfig(name=lines, split=part), seed=0)) for part in ("train[:75%]", "train[75%:]")
    ]
    assert [len(part) for part in parts] == [15, 5] and len({*parts[0], *parts[1]}) == 20


def test_a_stream_is_not_read_whole_in_place_of_a_part(lines):
    with pytest.raises(UserError, match=r"split 'train\[:75%\]'.*Bad split"):
        list(load_documents(DatasetConfig(name=lines, split="train[:75%]", streaming=True), seed=0))
