"""The report of a synthetic run: all parts, nothing from outside, nothing invented; findings follow the numbers."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from moe_compress.evaluation.results import append_result
from moe_compress.report import write_report
from moe_compress.report.build import build
from moe_compress.report.collect import collect
from moe_compress.report.page import provenance
from moe_compress.report.plots import bar_plot, line_plot
from moe_compress.report.tables import MISSING, Table, count, significant, size, with_error
from moe_compress.report.verdict import compare, sentences

from .conftest import read_json, record


class Page(HTMLParser):
    """What a browser would find on the page."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src", "srcset", "action", "data"):
                self.links.append(value)
            if "url(" in (value or ""):
                self.links += re.findall(r"url\(([^)]*)\)", value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(make_run):
    run = make_run()
    write_report(run)
    return Page((run.path / "report.html").read_text(encoding="utf-8"))


def test_the_page_has_every_part(page):
    parts = [
        "findings",
        "sizes",
        "quality",
        "errors",
        "training",
        "speed",
        "routing",
        "samples",
        "settings",
        "provenance",
    ]
    assert [name for name in page.ids if name in parts] == parts
    assert page.tags.count("svg") == 8  # perplexity, two of errors, three of training, speed, routing
    assert page.open == []  # every element is closed
    for text in (
        "moe-compress, distilled",
        "per-expert SVD, zero-shot",
        "Test CPU",
        "ConnectionError: no network",
        "0.410 ± 0.030",
    ):
        assert text in page.text


def test_the_page_refers_to_nothing_outside(make_run):
    run = make_run()
    write_report(run)
    text = (run.path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?:|@import|//[a-z]", text)
    assert not {"script", "iframe", "img", "object"} & set(page.tags)
    inside = {f"#{name}" for name in page.ids} | {"data:,"}
    assert page.links and set(page.links) <= inside
    assert len(page.ids) == len(set(page.ids))  # several figures on one page must not share ids


def test_what_a_model_writes_is_text_not_markup(page):
    assert "<b>teacher</b>(self):" in page.text and "<demo> & co" in page.text
    assert "script" not in page.tags


def test_markdown_and_json_hold_the_same_figures(make_run):
    run = make_run()
    write_report(run)
    markdown = (run.path / "report.md").read_text(encoding="utf-8")
    assert "| **moe-compress, distilled** | **4.48 ± 0.05** |" in markdown
    assert "    def <b>teacher</b>(self):" in markdown
    data = read_json(run)
    assert data["tables"]["Held-out text and tasks"]["rows"][2][1] == "4.48 ± 0.05"
    assert data["shared_core_against_svd"]["distilled"]["winner"] == "moe-compress"
    assert data["shared_core_against_svd"]["distilled"]["difference"] == pytest.approx(0.1)
    assert {(entry["model"], entry["step"]) for entry in data["results"]} == {
        ("teacher", 0), ("student", 0), ("student", 20), ("student", 50), ("svd", 0), ("svd", 50),
    }  # fmt: skip


def test_the_summary_is_printed(make_run, capsys):
    run = make_run()
    write_report(run)
    printed = capsys.readouterr().out
    for text in (
        "Size",
        "Held-out text and tasks",
        "One MoE layer",
        "beats plain per-expert SVD",
        str(run.path / "report.html"),
    ):
        assert text in printed.replace("\n", " ") or text in printed


def test_brackets_are_printed_as_they_are(make_run, capsys):
    run = make_run()
    error = "no such file: [/mnt/x] [bold]"
    append_result(run.evals_dir, record(run.config, "student", 99, 0.0) | {"error": error})
    write_report(run)
    assert error in capsys.readouterr().out.replace("\n", " ")
    table = Table("[T]", ["", "[/a]"], [["models/[v2]", "[red]1"]], note="[note]")
    Console(width=80).print(table.to_rich())
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("[T]", "[/a]", "models/[v2]", "[red]1", "[note]"))


def test_missing_parts_are_left_out(make_run):
    run = make_run(core=None, svd=None, with_speed=False)
    write_report(run)
    page = Page((run.path / "report.html").read_text(encoding="utf-8"))
    assert not {"training", "speed", "samples"} & set(page.ids)
    assert {"findings", "sizes", "quality", "errors"} <= set(page.ids)
    assert "distilled" not in page.text.replace("distillation", "") and "SVD" not in page.text
    data = read_json(run)
    assert data["shared_core_against_svd"] == {"zero_shot": None, "distilled": None}
    assert "before any distillation" in data["findings"][0]


def test_a_run_with_nothing_but_settings(tmp_path):
    from moe_compress.config import Config
    from moe_compress.run import Run

    run = Run.create(tmp_path / "run", Config())
    write_report(run)
    assert "settings" in Page((run.path / "report.html").read_text(encoding="utf-8")).ids


def findings(run) -> str:
    return " ".join(sentences(collect(run)))


def test_if_svd_wins_the_report_says_so(make_run):
    text = findings(make_run(core=1.60, svd=1.50))
    assert "After the same distillation, at equal bytes" in text
    assert "plain per-expert SVD beats moe-compress: perplexity 4.95 ± 0.05 against 4.48 ± 0.05 (SVD)" in text
    assert "moe-compress beats" not in text.replace("SVD beats moe-compress", "")


def test_if_the_core_wins_the_report_says_so(make_run):
    text = findings(make_run(core=1.50, svd=1.60))
    assert "After the same distillation, at equal bytes (4.70 MB and 4.70 MB of experts), moe-compress beats" in text
    # zero-shot, SVD is better in these figures
    assert (
        "Right after compression, at equal bytes (4.70 MB and 4.70 MB of experts), plain per-expert SVD beats" in text
    )


def test_a_difference_within_the_noise_is_a_draw(make_run):
    config = make_run().config
    noisy = [1.5 + gap for gap in (0.3, -0.3, 0.2, -0.2, 0.1, 0.1)]
    core = record(config, "student", 50, 1.5, sequence_losses=[1.5] * 6)
    assert compare(core, record(config, "svd", 50, sum(noisy) / 6, sequence_losses=noisy)).winner == "draw"
    paired = record(config, "svd", 50, 1.501, sequence_losses=[1.5009, 1.5011, 1.501, 1.501, 1.501, 1.501])
    assert compare(core, paired).winner == "moe-compress"
    assert compare(core, paired).stderr == pytest.approx(2.582e-5, rel=1e-3)


def test_sequences_weigh_as_much_as_they_have_tokens(make_run):
    config = make_run().config
    counts = {"sequence_tokens": [1, 99] * 2}
    core = record(config, "student", 50, 1.5, sequence_losses=[1.5] * 4, **counts)
    svd = record(config, "svd", 50, 1.5149, sequence_losses=[2.5, 1.5, 1.5, 1.52], **counts)
    gaps, weights, mean = [1.0, 0.0, 0.0, 0.02], [0.02, 1.98] * 2, 0.0149
    by_hand = sum((weight * (gap - mean)) ** 2 for weight, gap in zip(weights, gaps, strict=True)) / 3 / 4
    assert compare(core, svd).stderr == pytest.approx(by_hand**0.5)


def test_without_sequences_the_errors_add_up(make_run):
    config = make_run().config
    core, svd = (
        record(config, model, 50, loss, sequence_losses=[]) for model, loss in (("student", 1.5), ("svd", 1.55))
    )
    assert compare(core, svd).stderr == pytest.approx(0.02 * 2**0.5)
    assert compare(core, svd).winner == "draw"
    assert compare(core, svd | {"loss": None}) is None


def test_unequal_bytes_are_said(make_run):
    run = make_run(svd=None)
    append_result(run.evals_dir, record(run.config, "svd", 50, 1.4, expert_bytes=5_000_000))
    assert "with 6.4 % more bytes for SVD" in findings(run)


def test_speed_below_one_is_said(make_run):
    assert "2.0x at 1 token and 0.80x at 512 tokens (below 1x is slower)" in findings(make_run())


def test_a_task_that_was_not_measured_is_said_once(make_run):
    (section, *_) = build(collect(make_run()))
    lost = [line for line in section.text if "wikitext" in line]
    assert lost == ["Task wikitext was not measured: ConnectionError: no network"]


def test_failures_are_shown(make_run):
    run = make_run()
    append_result(run.evals_dir, record(run.config, "student", 99, 0.0) | {"error": "truncated shard"})
    write_report(run)
    assert "Not measured: student at step 99: truncated shard" in (run.path / "report.md").read_text()


def test_measurements_with_other_settings_are_not_mixed_in(make_run):
    run = make_run()
    append_result(run.evals_dir, record(run.config, "student", 70, 0.1) | {"settings": "other"})
    assert collect(run).distilled()["step"] == 50


def test_what_was_measured_of_other_weights_is_left_out(make_run):
    run = make_run()
    (run.checkpoint(50)).mkdir(parents=True, exist_ok=True)
    (run.checkpoint(50) / "config.json").write_text("{}")
    append_result(run.evals_dir, record(run.config, "student", 50, 0.1) | {"weights": "before it was trained again"})
    assert collect(run).distilled()["step"] == 20


def test_provenance_lists_stages_and_versions(make_run):
    run = make_run()
    with run.stage("compress"):
        pass
    rows = dict((row[0], row[1]) for row in provenance(collect(run)).rows)
    assert "stage compress" in rows and rows["torch"] and rows["threads"] == "2"


def test_figures_draw_what_they_are_given():
    plot = line_plot(
        "one", {"a": ([0, 1], [1, 2]), "b": ([0, 1], [2, 1])}, x="step", y="loss", levels={"c": 1.5}, log=True
    )
    assert all(f">{text}</text>" in plot for text in ("step", "loss", "a", "b", "c"))
    assert plot.startswith("<svg") and plot.endswith("</svg>") and "currentColor" in plot and "#010203" not in plot
    bars = bar_plot("two", ["x", "y"], {"a": [1.0, 2.5]}, y="speed", unit="x", level=1.0)
    assert ">2.5x</text>" in bars and 'id="two-' in bars and 'id="one-' not in bars


def test_figures_name_runs_as_they_are_named():
    names = ["_old", "$x$ and $\\new$"]
    plot = line_plot("one", dict.fromkeys(names, ([0, 1], [1, 2])), x="step", y="loss")
    assert all(f">{text}</text>" in plot.replace("> _", ">_") for text in names)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (size(999), "999 B"), (size(18_874_368), "18.9 MB"), (size(None), MISSING), (count(2_300_000), "2.30 M"),
        (count(30_530_000_000), "30.5 B"), (significant(1234.5), "1,234"), (significant(0.01234), "0.0123"),
        (significant(0.0), "0"), (significant(float("nan")), MISSING), (with_error(1.0, None, 2), "1.00"),
        (with_error(None, 0.1), MISSING), (with_error(1.0, 0.25, 2), "1.00 ± 0.25"),
    ],
)  # fmt: skip
def test_numbers(made, expected):
    assert made == expected


def test_one_table_three_ways():
    table = Table("T", ["", "a|b"], [["x", "1"], ["y", "2"]], note="noted", emphasis=[1])
    assert table.to_markdown() == ("### T\n\n|  | a\\|b |\n| :--- | ---: |\n| x | 1 |\n| **y** | **2** |\n\nnoted\n")
    assert table.to_json()["rows"] == [["x", "1"], ["y", "2"]]
    assert table.to_rich().row_count == 2


def test_a_table_too_wide_for_the_terminal_is_turned():
    table = Table("T", ["", "first", "second", "third"], [["x", "1", "2", "3"], ["y", "4", "5", "6"]])
    assert [column.header for column in table.to_rich(80).columns] == ["", "first", "second", "third"]
    turned = table.to_rich(20)
    assert [column.header for column in turned.columns] == ["", "x", "y"] and turned.row_count == 3
    assert list(turned.columns[2].cells) == ["4", "5", "6"]
