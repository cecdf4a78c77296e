"""What README promises exists: commands, settings, presets, scripts and links."""

import re
import shlex
from pathlib import Path

import pytest

from moe_compress import settings
from moe_compress.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
CALLS = [line for line in SHELL.splitlines() if line.startswith("moe-compress ")]


def test_there_are_commands_to_check():
    assert len(CALLS) >= 6


@pytest.mark.parametrize("line", CALLS)
def test_a_command_of_the_readme_is_accepted(line):
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
