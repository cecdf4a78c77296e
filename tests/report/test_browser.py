"""The report in a real browser: nothing on the console, every figure drawn, nothing wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from moe_compress.report import compare_runs, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# Leaves what the browser made of the page in the page.
_PROBE = """<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(fold => fold.open = true);
  const drawn = shape => { const box = shape.getBBox(); return box.width + box.height > 0; };
  const figures = [...document.querySelectorAll("svg.figure")].map(figure => {
    const box = figure.getBoundingClientRect();
    return {
      width: box.width,
      height: box.height,
      right: box.right,
      shapes: [...figure.querySelectorAll("path, rect")].filter(drawn).length,
      words: [...figure.querySelectorAll("text")].filter(drawn).length,
    };
  });
  const text = [...document.querySelectorAll("p, li, td, th, pre")];
  const smallest = Math.min(...text.map(element => parseFloat(getComputedStyle(element).fontSize)));
  const page = document.scrollingElement;
  parent.postMessage(JSON.stringify({figures, smallest, width: page.scrollWidth, window: innerWidth}), "*");
});
</script>"""

# A window of Chromium is 500 wide at least; a frame in it is as narrow as a phone.
_FRAME = """<!DOCTYPE html><html><head><link rel="icon" href="data:,"></head><body>
<script>addEventListener("message", message => { document.body.dataset.probe = message.data; });</script>
<iframe src="page.html" style="width: %dpx; height: 900px; border: 0"></iframe></body></html>"""


def looked_at(html: str, directory: Path, width: int) -> tuple[dict[str, Any], list[str]]:
    """What a browser finds on a page in a frame of some width, and what it says on its console."""
    (directory / "page.html").write_text(html.replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
    (directory / "frame.html").write_text(_FRAME % width, encoding="utf-8")
    result = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--enable-logging=stderr", f"--user-data-dir={directory / 'profile'}", "--window-size=1400,1000",
            "--virtual-time-budget=5000", "--dump-dom", (directory / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    probe = re.search(r'data-probe="([^"]*)"', result.stdout)
    assert probe, result.stderr[-2000:]
    return json.loads(unescape(probe[1])), re.findall(r"CONSOLE.*", result.stderr)


def check(html: str, directory: Path, width: int, figures: int) -> None:
    found, console = looked_at(html, directory, width)
    assert console == []
    assert len(found["figures"]) == figures
    for figure in found["figures"]:
        assert figure["width"] > 300 and figure["height"] > 100 and figure["right"] <= width
        assert figure["shapes"] > 10 and figure["words"] > 4
    assert found["window"] == width and found["width"] <= width  # what is wider scrolls within itself
    assert found["smallest"] >= 12


@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_of_a_run(make_run, tmp_path, width):
    run = make_run()
    write_report(run)
    check((run.path / "report.html").read_text(encoding="utf-8"), tmp_path, width, figures=8)


def test_a_comparison_on_a_phone(make_run, tmp_path):
    first, second = make_run(), make_run(core=1.7, name="other")
    compare_runs([first.path, second.path], tmp_path / "comparison")
    check((tmp_path / "comparison" / "report.html").read_text(encoding="utf-8"), tmp_path, 390, figures=4)


def test_the_check_sees_what_is_wrong(tmp_path):
    page = """<!DOCTYPE html><html><head><link rel="icon" href="data:,"></head><body><p style="width: 900px">wide</p>
    <svg class="figure" width="300" height="200"></svg><script>console.error("broken")</script></body></html>"""
    found, console = looked_at(page, tmp_path, 390)
    assert found["width"] > 390 and found["figures"][0]["shapes"] == 0
    assert len(console) == 1 and "broken" in console[0]
