"""`write_report`: RUN/report.html (one file, nothing fetched), report.md, report.json, the model cards, a summary."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from markupsafe import Markup
from rich.console import Console

from moe_compress.evaluation.results import jsonable
from moe_compress.files import write_atomically, write_json
from moe_compress.report.build import Section, build
from moe_compress.report.cards import refresh_cards
from moe_compress.report.collect import RunData, collect
from moe_compress.report.tables import Table
from moe_compress.report.verdict import compare

if TYPE_CHECKING:
    from moe_compress.run import Run

STAGE = "report"
SUMMARY = ("Size", "Held-out text and tasks", "One MoE layer", "Whole model")


def write_report(run: Run) -> None:
    """Write the report of a run from what it has measured so far, and print its tables and findings.

    The model cards of its checkpoints (README.md) are brought up to date as well. What is not there yet (no
    distillation, no speed) is left out. Writing it again replaces it.
    """
    with run.stage(STAGE):
        data = collect(run)
        sections = build(data)
        page = page_of(data, sections)
        write_atomically(run.path / "report.html", render_html(page))
        write_atomically(run.path / "report.md", render_markdown(page))
        write_json(run.path / "report.json", jsonable(as_dict(data, sections)))
        refresh_cards(run, data)
    print_summary(run, sections, Console())


@dataclass
class Page:
    """What is shown, as HTML or as Markdown.

    Attributes:
        title, subtitle: heading.
        sections: tables and figures.
        samples: text that models wrote, grouped by prompt and decoding.
        settings: YAML behind a fold.
        provenance: machine and versions behind a fold.
    """

    title: str
    subtitle: str
    sections: list[Section]
    samples: list[dict[str, Any]] = field(default_factory=list)
    settings: str = ""
    provenance: Table | None = None


def page_of(data: RunData, sections: list[Section]) -> Page:
    """The page of one run."""
    return Page(
        data.name,
        f"{data.config['model']['name']}, compressed by moe-compress",
        sections,
        sample_groups(data),
        yaml.safe_dump(data.config, sort_keys=False, allow_unicode=True),
        provenance(data),
    )


def render_html(page: Page) -> str:
    """The page: one HTML text that refers to nothing outside itself."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moe_compress.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["svg"] = Markup  # figures are ours, drawn by `plots`
    return environment.get_template("report.html.j2").render(page=page)


def render_markdown(page: Page) -> str:
    """The same findings and tables as Markdown, without figures."""
    parts = [f"# {page.title}"]
    for section in page.sections:
        parts.append(f"## {section.title}")
        parts += section.text if section.name != "findings" else ["\n".join(f"- {line}" for line in section.text)]
        parts += [table.to_markdown() for table in (*section.tables, *section.details)]
    for group in page.samples:
        parts.append(f"## Text: {group['decoding']}")
        for sample in group["samples"]:
            # Indented by four, so that whatever a model writes stays code.
            text = "\n".join("    " + line for line in (group["prompt"] + sample["text"]).splitlines())
            parts.append(f"**{sample['model']}**\n\n{text}")
    if page.provenance is not None:
        parts += ["## Machine and versions", page.provenance.to_markdown()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def as_dict(data: RunData, sections: list[Section]) -> dict[str, Any]:
    """The report as data: every figure as measured, and the comparison with per-expert SVD."""
    comparisons = {}
    for name, pick in (("zero_shot", RunData.zero_shot), ("distilled", RunData.distilled)):
        core, svd = pick(data, "student"), pick(data, "svd")
        result = compare(core, svd) if core and svd else None
        comparisons[name] = asdict(result) if result else None
    return {
        "name": data.name,
        "findings": next((section.text for section in sections if section.name == "findings"), []),
        "shared_core_against_svd": comparisons,
        "best": data.best,
        "totals": (data.compression or {}).get("totals"),
        "results": list(data.results.values()),
        "speed": data.speed,
        "tables": {
            table.title: table.to_json() for section in sections for table in (*section.tables, *section.details)
        },
        "manifest": data.manifest,
    }


def print_summary(run: Run, sections: list[Section], console: Console) -> None:
    """Print the main tables and the findings."""
    for section in sections:
        for table in section.tables:
            if table.title in SUMMARY:
                console.print(table.to_rich(console.width))
    for section in sections:
        if section.name == "findings":
            for line in section.text:
                console.print(f"* {line}", highlight=False, markup=False)
    console.print(f"report: {run.path / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def sample_groups(data: RunData) -> list[dict[str, Any]]:
    """Samples of the same prompt and decoding together, to be shown side by side."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for sample in data.samples:
        groups.setdefault((sample["prompt"], sample["decoding"]), []).append(sample)
    return [
        {"prompt": prompt, "decoding": decoding, "samples": samples} for (prompt, decoding), samples in groups.items()
    ]


def provenance(data: RunData) -> Table:
    """Machine, versions, and when each stage ran for how long."""
    rows = []
    for name, stage in data.manifest.get("stages", {}).items():
        if stage.get("seconds") is not None:
            rows.append([f"stage {name}", f"{stage.get('finished') or stage.get('status')}, {stage['seconds']:,.0f} s"])
    versions: dict[str, str] = {}
    for stage in data.manifest.get("stages", {}).values():
        versions |= {name: str(version) for name, version in (stage.get("versions") or {}).items()}
    machine = (data.speed or {}).get("machine", {})
    for key, value in machine.items():
        if key == "versions":
            versions |= value
        elif value not in (None, [], ""):
            rows.append([key.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value)])
    rows += [[name, version] for name, version in versions.items()]
    return Table("Machine and versions", ["", ""], rows)
