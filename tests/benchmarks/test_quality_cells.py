"""The harness of the quality benchmark: cells are measured once, methods alike, and end in a table and a plot."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import OlmoeForCausalLM

from benchmarks.quality.__main__ import main
from benchmarks.quality.calibration import find_router
from benchmarks.quality.cells import Bench, Protocol
from benchmarks.quality.distil import Training, distil, loss, next_rates
from benchmarks.quality.methods import METHODS, Method
from benchmarks.quality.models import TestModel, pieces, upcycle
from benchmarks.quality.product import product
from benchmarks.quality.score import score, teacher_log_probs
from benchmarks.quality.table import group, markdown, standing, summary
from moe_compress.modeling import load_tokenizer

PROTOCOL = Protocol(
    length=32,
    calibration_rows=4,
    validation_rows=2,
    test_rows=2,
    task_limit=0,
    training=Training(steps=3, batch_size=2, warmup_steps=1, top_k=8),
)
ARGUMENTS = "--length 32 --calibration-rows 4 --validation-rows 2 --test-rows 2 --task-limit 0 --steps 3 --batch-size 2"


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_olmoe):
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = tiny_olmoe(vocab_size=4096, initializer_range=0.3)  # experts strong enough that their loss shows
    OlmoeForCausalLM(config).save_pretrained(directory)
    load_tokenizer("reference").save_pretrained(directory)
    corpus = directory / "corpus"
    corpus.mkdir()
    for split in ("train", "validation", "test"):
        text = " ".join(f"{split} word{number}" for number in range(200))
        (corpus / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text + str(i)}) for i in range(3)) + "\n")
    return TestModel("tiny", directory, corpus)


def test_cells_are_measured_once_and_the_table_takes_the_best_learning_rate(source, tmp_path):
    bench = Bench(source, PROTOCOL, tmp_path)
    bench.reference()
    for ratio in (0.5, 0.25):
        for seed in (1, 2):
            bench.run(METHODS["svd-llm-joint"], ratio, seed, (1e-4, 1e-2) if seed == 1 else ())
    bench.run(METHODS["hc-smoe"], 0.05, 1, ())
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cells" / "tiny").glob("*.json")}
    assert len(files) == 1 + 2 * (2 + 2) + 1

    def fail(task):
        raise AssertionError("measured again")

    again = Bench(source, PROTOCOL, tmp_path)
    again.run(Method("svd-llm-joint", fail, METHODS["svd-llm-joint"].settings), 0.5, 1, (1e-4, 1e-2))
    with pytest.raises(AssertionError, match="measured again"):
        again.run(Method("svd-llm-joint", fail, {"version": 2}), 0.5, 1, ())
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "cells" / "tiny").glob("*.json")}

    cells = again.cells()
    distilled = group(cells)[True, 0.5, "svd-llm-joint"]
    newer = [{**cell, "settings": {"version": 7}} for cell in cells if cell["ratio"] == 0.25]
    assert {key[1] for key in group([*newer, *cells])} == {0.25} and group([*newer, *cells]) == group(newer)
    both = [cell for cell in cells if cell["training"] and cell["ratio"] == 0.5]
    assert len(both) == 2 and distilled == [min(both, key=lambda cell: cell["validation"]["loss"])]
    assert distilled[0]["test"]["kl"] > 0 and 0.4 < distilled[0]["kept"] <= 0.5
    text = markdown(cells)
    assert text.count("| svd-llm-joint |") == 5 and "hc-smoe at 5.0%: not possible" in text and "±" in text


def test_the_learning_rate_is_searched_outwards_from_the_middle_of_the_grid():
    def search(losses: dict[float, float]) -> list[tuple[float, ...]]:
        seen: dict[float, float] = {}
        rounds = []
        while pending := next_rates(tuple(losses), seen):
            rounds.append(pending)
            seen |= {rate: losses[rate] for rate in pending}
        return rounds

    assert search({1: 4.0, 2: 3.0, 3: 2.0, 4: 2.5}) == [(2, 3), (4,)]
    assert search({1: 1.0, 2: 3.0, 3: 4.0, 4: 0.0}) == [(2, 3), (1,)]
    assert search({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0, 6: 6.0}) == [(3, 4), (2,), (1,)]
    assert search({1: 2.0, 2: 1.0}) == [(1, 2)] and search({1: 2.0}) == [(1,)]


def test_cells_of_another_text_are_other_cells(source: TestModel, tmp_path: Path) -> None:
    def bench(corpus: Path | None) -> Bench:
        return Bench(replace(source, corpus=corpus), Protocol(), tmp_path)

    other = tmp_path / "other"
    shutil.copytree(source.corpus, other)
    method = SimpleNamespace(name="svd", settings={})
    keys = [bench(corpus).key(method, 0.5, 1, None) for corpus in (None, source.corpus, other)]
    assert keys[0] == keys[1] != keys[2]
    (other / "test.jsonl").write_text('{"text": "something else"}\n')
    assert bench(other).key(method, 0.5, 1, None) not in keys


def test_what_is_recorded_is_not_measured_again_and_becomes_the_documents(source, tmp_path, capsys):
    docs, corpus = tmp_path / "docs", ["--model", str(source.path), "--corpus", str(source.corpus)]
    common = [*corpus, "--docs", str(docs), *ARGUMENTS.split(), "--methods", "svd", "--ratios", "0.5"]
    name = source.path.name
    begin, end = f"<!-- table of benchmarks.quality: {name} -->", f"<!-- end of benchmarks.quality: {name} -->"
    docs.mkdir()
    (docs / "QUALITY.md").write_text("# No place\n")
    first = ["run", *common, "--cache", str(tmp_path / "first")]
    search = ["--seeds", "1", "2", "--learning-rates", "1e-5", "1e-4", "1e-3"]
    assert main([*first, *search]) == 2 and "has no place" in capsys.readouterr().err
    (docs / "QUALITY.md").write_text(f"# Before\n{begin}\nold\n{end}\nafter\n")
    assert main([*first, *search]) == 0

    record = docs / "quality" / f"{name}.jsonl"
    cells = [json.loads(line) for line in record.read_text().splitlines()]
    searched = [cell for cell in cells if cell["training"] and cell["seed"] == 1]
    losses = {cell["training"]["learning_rate"]: cell["validation"]["loss"] for cell in searched}
    assert set(losses) == {1e-4, 1e-3} | ({1e-5} if losses[1e-4] < losses[1e-3] else set())
    assert len([cell for cell in cells if cell["training"] and cell["seed"] == 2]) == 1
    assert [cell["method"] for cell in cells].count("teacher") == 1
    text = (docs / "QUALITY.md").read_text()
    assert text.startswith("# Before\n") and text.endswith("\nafter\n") and "| svd |" in text and "old" not in text
    assert "50.0% of the expert bytes, distilled" in (docs / "quality" / f"{name}.md").read_text()
    assert (docs / "quality" / f"{name}-{cells[0]['model'][:8]}.png").stat().st_size > 0

    # Another machine, with an empty cache: nothing is measured, nothing is lost, more is added.
    again = ["run", *common, "--cache", str(tmp_path / "second")]
    before = record.read_text()
    assert main([*again, *search]) == 0 and record.read_text() == before
    assert not list((tmp_path / "second").rglob("*.json"))
    assert main([*again, "--zero-shot", "--seeds", "3"]) == 0
    assert set(before.splitlines()) < set(record.read_text().splitlines())
    assert main([*again, "--test-rows", "1", "--zero-shot", "--seeds", "1"]) == 0
    assert set(before.splitlines()) < set(record.read_text().splitlines())

    # Other weights: their cells stay, and have tables of their own.
    others = before.replace(cells[0]["model"], "f00d")
    record.write_text(others)
    assert main([*again, "--zero-shot", "--seeds", "1"]) == 0
    assert set(others.splitlines()) < set(record.read_text().splitlines())
    page, text = (docs / "quality" / f"{name}.md").read_text(), (docs / "QUALITY.md").read_text()
    assert page.count("## Weights ") == text.count("Weights ") == 2 and "Weights f00d" in text
    assert page.index("Weights f00d") < page.index(f"Weights {cells[0]['model'][:8]}")  # those with most cells first
    printed = capsys.readouterr().out
    assert "zero-shot" in printed and "distilled" not in printed.rpartition("perplexity | 50.0%")[2]


def test_the_summary_marks_the_best_of_each_column():
    def cell(perplexity: float) -> dict:
        return {"test": {"perplexity": perplexity}}

    found = summary(
        {
            (False, 0.25, "first"): [cell(10.0), cell(12.0)],
            (True, 0.25, "first"): [cell(9.0), cell(9.0), cell(9.0)],
            (False, 0.25, "second"): [cell(12.0)],
            (True, 0.25, "second"): [cell(8.0)],
            (False, 0.125, "third"): [cell(20.0)],
        }
    )
    assert found == [
        "| perplexity | 12.5%, zero-shot | 25.0%, zero-shot | 25.0%, distilled |",
        "|---|---:|---:|---:|",
        "| second |  | 12.00 | **8.00** |",
        "| first |  | **11.00 ± 1.41 (2 seeds)** | 9.00 ± 0.00 |",
        "| third | **20.00** |  |  |",
        "",
    ]
    columns = [(True, 0.25), (False, 0.25), (True, 0.125), (False, 0.125)]
    head, *_ = summary({(*column, "one"): [cell(1.0)] for column in columns})
    assert head == "| perplexity | 12.5%, zero-shot | 12.5%, distilled | 25.0%, zero-shot | 25.0%, distilled |"


def test_every_column_that_is_not_won_is_told_with_what_is_better():
    def cell(perplexity: float, kl: float, top1: float) -> dict:
        return {"test": {"perplexity": perplexity, "kl": kl, "top1": top1}}

    found = standing(
        {
            (False, 0.25, "ours"): [cell(10.0, 0.1, 0.9), cell(12.0, 0.3, 0.9)],
            (False, 0.25, "rival"): [cell(11.5, 0.1, 0.9)],
            (True, 0.25, "ours"): [cell(9.0, 0.2, 0.8)],
            (True, 0.25, "rival"): [cell(8.0, 0.3, 0.85)],
            (True, 0.125, "rival"): [cell(1.0, 0.0, 1.0)],  # not measured for ours
        }
    )
    assert found == [
        "* By perplexity `ours` is best in 1 of 2 columns; 25.0%, distilled: rival 8.00, not 9.00.",
        "* By KL to the teacher `ours` is best in 1 of 2 columns; 25.0%, zero-shot: rival 0.1000, not 0.2000 ± 0.1414.",
        "* By top-1 agreement `ours` is best in 1 of 2 columns; 25.0%, distilled: rival 0.850, not 0.800.",
        "",
    ]
    assert standing({(True, 0.125, "rival"): [cell(1.0, 0.0, 1.0)]}) == []


def test_distillation_brings_a_student_nearer_to_its_teacher(source, tmp_path):
    training = Training(steps=40, batch_size=2, warmup_steps=2, top_k=64)
    bench = Bench(source, replace(PROTOCOL, training=training), tmp_path)
    student = bench.compress(METHODS["svd"], 0.25, 1)
    rows, targets = bench.training_data
    reference = teacher_log_probs(bench.teacher, rows)
    before = score(student, rows, reference)
    with torch.no_grad():
        own = bench.teacher(input_ids=rows).logits
        assert loss(own, rows, targets, alpha=1.0).abs() < 1e-4  # off by fp16 alone
        worse = loss(student(input_ids=rows).logits, rows, targets, alpha=1.0)
        assert 0.3 * before["kl"] < worse < before["kl"] * 1.01  # tokens outside of the top-k are told from none
    distil(student, rows, targets, training, 1e-3, seed=1)
    after = score(student, rows, reference)
    assert after["kl"] < 0.7 * before["kl"] and after["top1"] > before["top1"]


def test_the_product_is_one_of_the_methods(source, tmp_path):
    bench = Bench(source, PROTOCOL, tmp_path)
    method = product("ours", ["compression.iterations=2"], source)
    bench.run(method, 0.5, 1, (1e-3,))
    cell = bench.cached(method, 0.5, 1, 1e-3)
    assert 0.4 < cell["kept"] <= 0.5 and cell["settings"]["overrides"] == ["compression.iterations=2"]
    assert bench.cached(product("ours", [], source), 0.5, 1, 1e-3) is None


def test_command_line(source, tmp_path, capsys):
    common = ["--model", str(source.path), "--corpus", str(source.corpus), "--cache", str(tmp_path), *ARGUMENTS.split()]
    plot = tmp_path / "plot.png"
    run = ["run", *common, "--methods", "svd", "--ratios", "0.5", "--seeds", "1", "--zero-shot", "--plot", str(plot)]
    assert main(run) == 0 and "| svd |" in capsys.readouterr().out and plot.stat().st_size > 0
    assert main(["run", *common, "--methods", "nothing"]) == 2
    assert "no method nothing" in capsys.readouterr().err
    assert main(["table", "--model", "coarse", "--cache", str(tmp_path)]) == 2
    assert "not there yet" in capsys.readouterr().err


def test_an_upcycled_model_computes_what_the_dense_one_does():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True, "pad_token_id": 0}
    dense = Qwen3ForCausalLM(Qwen3Config(**shape, **heads, bos_token_id=0, eos_token_id=0)).eval()
    sparse = upcycle(dense, experts=4, top_k=2).eval()
    rows = torch.randint(0, 64, (2, 16))
    torch.testing.assert_close(sparse(input_ids=rows).logits, dense(input_ids=rows).logits, atol=1e-4, rtol=1e-4)
    assert find_router(sparse.model.layers[0].mlp, 4).weight.abs().max() > 0


def test_pieces_of_a_work_are_whole_paragraphs_and_nothing_is_lost():
    work = "\n\n".join(f"paragraph {number} " + "x" * 3000 for number in range(7))
    found = list(pieces(work))
    assert len(found) == 3 and "".join(found).strip() == work
