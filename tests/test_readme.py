"""What README and the documentation promise exists: commands, settings, presets, scripts and links."""

import re
import shlex
from pathlib import Path

import pytest

from moe_compress import settings
from moe_compress.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Commands in blocks of code, fenced or indented, with the lines that they are continued on.
CALLS = [
    (page.name, line.replace("\\\n", " "))
    for page in PAGES
    for line in re.findall(r"^(?: {4})?(moe-compress (?:[^\n]*\\\n)*[^\n]+)", page.read_text(), re.MULTILINE)
]


def test_there_are_commands_to_check():
    assert len(CALLS) >= 20 and len({page for page, _ in CALLS}) >= 5


@pytest.mark.parametrize(("page", "line"), CALLS)
def test_a_documented_command_is_accepted(page, line):
    command, *arguments = shlex.split(line, comments=True)[1:]
    assert command in COMMANDS
    settings.compose([argument for argument in arguments if "=" in argument])


def test_every_command_in_the_table_exists():
    rows = re.findall(r"^\| (`[^|]+`) \|", README, re.MULTILINE)
    named = {name.split()[0] for cell in rows for name in re.findall(r"`([^`]+)`", cell)}
    commands = {name for name in named if not name.endswith("/")}
    assert commands and commands <= set(COMMANDS)


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)", README)) <= targets


def test_every_link_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_every_preset_named_exists():
    line = next(line for line in README.splitlines() if line.startswith("Presets:"))
    for group, first in re.findall(r"`(\w+)=(\w+)`", line):
        assert first in settings.presets(group)
