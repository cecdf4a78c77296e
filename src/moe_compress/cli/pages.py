"""The text of `--help` and `moe-compress settings`, made from the schema, the presets and the composed values."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moe_compress.config import Config
from moe_compress.schema import FieldInfo, describe_type, find, flatten, show, walk
from moe_compress.settings import GROUPS, presets

_EXAMPLES = """\
examples:
  moe-compress run run=runs/first                                    all stages on the reference MoE
  moe-compress plan model=Qwen/Qwen3-30B-A3B compression.target_ratio=0.25
  moe-compress compress run=runs/qwen model=qwen3_30b_a3b            a preset of conf/model
  moe-compress distill run=runs/qwen distillation.loss.alpha=0.9     a setting that is not frozen yet
  torchrun --nproc-per-node 8 -m moe_compress distill run=runs/qwen fsdp.enabled=true

The first stage freezes the settings in RUN/config.yaml; later stages read that file and take new values only for what
no stage has used yet. `moe-compress COMMAND --help` lists the settings a command reads, `moe-compress settings` all.
With MOE_COMPRESS_TRACEBACK=1 in the environment, an error of the system, such as a full disk, shows where it arose."""


class Page(NamedTuple):
    """The head of a command's help."""

    name: str
    usage: str
    summary: str


def overview(commands: Mapping[str, str]) -> str:
    """The page of `moe-compress --help`."""
    width = max(map(len, commands)) + 2
    lines = ["usage: moe-compress COMMAND [key=value ...]", ""]
    lines += ["Compress the experts of a Mixture-of-Experts model and recover its quality by distillation.", ""]
    lines += ["commands:", *(f"  {name:<{width}}{summary}" for name, summary in commands.items())]
    return "\n".join([*lines, "", preset_list(), "", _EXAMPLES])


def command(
    page: Page, flags: Sequence[tuple[str, str | None, str]], config: Config, reads: Callable[[str], bool]
) -> str:
    """The page of `moe-compress COMMAND --help`.

    Args:
        page: name, usage and summary.
        flags: flag, placeholder of its value or None, documentation.
        config: the values to show.
        reads: whether the command reads a setting.
    """
    lines = [f"usage: moe-compress {page.name} {page.usage}", "", _sentence(page.summary), ""]
    if flags:
        lines.append("flags:")
        for flag, metavar, text in flags:
            lines.append(f"  {flag + (f' {metavar}' if metavar else ''):<18}{text}")
        lines.append("")
    listing = setting_list(config, reads)
    if listing:
        title = "settings it reads, with the values they have (give key=value to see and use others):"
        lines += [preset_list(), "", title, "", listing]
    return "\n".join(lines).rstrip()


def preset_list() -> str:
    """The presets of every group."""
    lines = ["presets (group=preset):"]
    for group in GROUPS:
        names = ", ".join(name for name in presets(group) if name not in ("any", "unchanged"))
        lines.append(f"  {group:<14}{names}{', or a path or hub id' if group == 'model' else ''}")
    return "\n".join(lines)


def setting_list(config: Config, wanted: Callable[[str], bool]) -> str:
    """Settings with value, type and documentation, those of a group under its heading."""
    values, defaults = flatten(config), flatten(Config())
    lines: list[str] = []
    heading = ""
    for info in walk():
        if not wanted(info.key):
            continue
        group = info.key.rpartition(".")[0]
        if group != heading and "[]" not in info.key:
            heading = group
            about = find(group)
            lines += ["", f"[{group}]", *_wrapped(about.help if about else "", 0), ""]
        lines += _setting(info, values, defaults)
    return "\n".join(lines).strip("\n")


def _setting(info: FieldInfo, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    default = info.default if "[]" in info.key else defaults[info.key]
    value = values.get(info.key, default)
    differs = "" if value == default else f"; {show(default)} without presets"
    if info.element is None or not value:
        text, entries = show(value), []
    else:
        text = f"{len(value)} entries"
        differs = ""
        entries = [f"      - {show({key: item for key, item in one.items() if item is not None})}" for one in value]
    return [f"  {info.key} = {text}   ({describe_type(info)}{differs})", *_wrapped(info.help, 6), *entries]


def _wrapped(text: str, indent: int) -> list[str]:
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    pad = " " * indent
    return textwrap.wrap(text, max(width, 40), initial_indent=pad, subsequent_indent=pad)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
