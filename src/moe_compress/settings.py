"""Settings from presets, a YAML file and `key=value` overrides to a checked `Config`, and `config.yaml` back and forth.

Hydra composes the presets of `conf/` (groups model, data, compression, distillation, evaluation); every value, wherever
it comes from, then passes through the typed schema of `moe_compress.config` by one path, so that an unknown key or a
wrong type meets the same one-line error. Settings are resolved here, once: what a stage sees holds no interpolation.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_compress.checks import check_values
from moe_compress.config import Config
from moe_compress.errors import UserError, first_line
from moe_compress.files import write_atomically
from moe_compress.schema import (
    FieldInfo,
    describe_type,
    fields_of,
    find,
    flatten,
    is_mapping,
    is_text,
    known_keys,
    show,
)

CONF_DIR = Path(__file__).parent / "conf"
GROUPS = ("model", "data", "compression", "distillation", "evaluation")
_OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^=\s]+?)(?:=(?P<value>.*))?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One `key=value`, or `~key`, which takes an entry out of a mapping."""

    key: str
    value: Any = None
    delete: bool = False


@cache
def presets(group: str) -> tuple[str, ...]:
    """The names of the presets of a group, sorted."""
    return tuple(sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml")))


def compose(overrides: Sequence[str] = (), *, base: Config | None = None, file: Path | None = None) -> Config:
    """Compose, resolve and check the settings.

    Later sources win: defaults of the schema, presets, `file`, overrides. With `base` (a frozen run), its values take
    the place of the defaults and only the presets that `overrides` name are applied; `group=default` among
    them takes what any preset of its group sets back to the schema.

    Args:
        overrides: `key=value` in Hydra's syntax, `group=preset`, or `model=` a path or hub id.
        base: settings to start from instead of the schema and the default presets.
        file: YAML file of settings, such as the `config.yaml` of another run.

    Raises:
        UserError: an unknown key or preset, or a value of the wrong type or out of range.
    """
    chosen, assignments = parse_overrides(overrides)
    node = OmegaConf.structured(Config)
    if base is not None:
        _assign(node, "", _literal(dataclasses.asdict(base)))
    for values in _preset_values(chosen, fresh=base is None):
        _assign(node, "", values)
    if file is not None:
        _assign(node, "", _load_yaml(file))
    for assignment in assignments:
        if assignment.delete:
            _delete(node, assignment.key)
        else:
            _assign(node, assignment.key, assignment.value)
    return _finish(node)


def from_values(values: Mapping[str, Any]) -> Config:
    """The checked `Config` of a flat mapping, dotted key to value, as `schema.flatten` gives it."""
    node = OmegaConf.structured(Config)
    for key, value in values.items():
        _assign(node, key, _literal(value))
    return _finish(node)


def read(path: Path) -> Config:
    """Read a `config.yaml`; keys that it lacks take their defaults.

    Raises:
        UserError: no such file, no YAML, or not settings of this schema (the message names the file).
    """
    values = _load_yaml(path)
    try:
        node = OmegaConf.structured(Config)
        _assign(node, "", _literal(values))
        return _finish(node)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write(path: Path, config: Config) -> None:
    """Write settings as YAML, atomically; `read` gives the same `Config` back."""
    write_atomically(path, to_yaml(config))


def to_yaml(config: Config) -> str:
    """All settings as YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=120)


def parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, str], list[Assignment]]:
    """Split overrides into presets by group and assignments in their order.

    A value of a text setting is taken as it stands (paths and hub ids need no quotes beyond those of the shell);
    any other value is read by Hydra's grammar: `[1,2]`, `{a: 1}`, `null`, `true`, `1e-3`.
    """
    chosen: dict[str, str] = {}
    assignments: list[Assignment] = []
    for text in overrides:
        match = _OVERRIDE.fullmatch(text)
        if match is None or (match["value"] is None) != (match["sign"] == "~"):
            raise UserError(f"'{text}' is not a setting; write key=value, for example compression.rank=64")
        key, raw = match["key"], match["value"]
        if match["sign"] == "~":
            assignments.append(Assignment(key, delete=True))
        elif key in GROUPS and not raw.lstrip().startswith("{"):
            name = _unquoted(raw)
            if name in presets(key):
                chosen[key] = name
            elif key == "model":
                chosen[key] = "any"
                assignments.append(Assignment("model.name", name))
            else:
                near = suggestion(name, presets(key))
                raise UserError(f"there is no preset {key}={name}{near}; there are: {', '.join(presets(key))}")
        else:
            assignments.append(Assignment(key, _parse_value(key, raw)))
    return chosen, assignments


def _unquoted(raw: str) -> str:
    if len(raw) >= 2 and raw[0] == raw[-1] and raw[0] in "'\"":
        try:
            return str(OverridesParser.create().parse_override(f"key={raw}").value())
        except HydraException:
            return raw
    return raw


def _parse_value(key: str, raw: str) -> Any:
    info = lookup(key)
    if is_text(info.type):
        return None if raw == "null" else _unquoted(raw)
    try:
        override = OverridesParser.create().parse_override(f"key={raw}")
        value = override.value()
    except HydraException as error:
        raise UserError(f"{key}={raw} cannot be read ({first_line(error)}); expected {describe_type(info)}") from error
    if override.is_sweep_override():
        raise UserError(f"{key}={raw} is several values; write a list as {key}=[a,b]")
    return value


def lookup(key: str) -> FieldInfo:
    """The schema of a dotted key.

    Raises:
        UserError: no such setting; the message suggests the nearest one.
    """
    info = find(key)
    if info is None:
        group, _, rest = key.partition(".")
        if not rest and group in GROUPS:
            raise UserError(f"{key} is a group of presets; there are: {', '.join(presets(group))}")
        raise UserError(
            f"unknown setting '{key}'{suggestion(key, known_keys())}; `moe-compress settings` lists them all"
        )
    return info


def suggestion(word: str, known: Sequence[str]) -> str:
    """`, did you mean 'x'?`: the nearest name in the same group, else the same name elsewhere, else the nearest."""
    parent, _, last = word.rpartition(".")
    group = find(parent) if parent else None
    if group is not None and group.dataclass is not None:
        near = difflib.get_close_matches(last, list(fields_of(group.dataclass)), n=1, cutoff=0.6)
        if near:
            return f", did you mean '{parent}.{near[0]}'?"
    same_name = [key for key in known if key.rpartition(".")[2] == last]
    near = difflib.get_close_matches(word, same_name or known, n=1, cutoff=0.0 if same_name else 0.6)
    if not near:
        names = {key.rpartition(".")[2]: key for key in reversed(known)}
        near = [names[name] for name in difflib.get_close_matches(last, list(names), n=1, cutoff=0.6)]
    return f", did you mean '{near[0]}'?" if near else ""


def _preset_values(chosen: Mapping[str, str], *, fresh: bool) -> Iterator[dict[str, Any]]:
    """What the presets set, as nested values. A model preset tunes other groups only when a run is fresh."""
    if fresh:
        yield _hydra("config", *chosen.items())
        return
    others = [(group, name) for group, name in chosen.items() if group != "model"]
    for group, name in others:
        if name == "default":  # it sets nothing by itself, and must not leave what another preset has set
            yield _set_by_presets(group)
    if "model" in chosen:
        yield {"model": _hydra("config", ("model", chosen["model"])).get("model", {})}
    if others:
        yield _hydra("frozen", *others)


def _set_by_presets(group: str) -> dict[str, Any]:
    """The settings that any preset of a group sets, by dotted key, with the values of the schema."""
    nodes = [OmegaConf.create(_hydra("frozen", (group, name))) for name in presets(group)]
    return {
        key: value
        for key, value in flatten(Config()).items()
        if key.startswith(f"{group}.") and any(OmegaConf.select(node, key, default=...) is not ... for node in nodes)
    }


@cache
def _hydra(root: str, *chosen: tuple[str, str]) -> dict[str, Any]:
    """Compose the presets with a root file of `conf/`; the result is shared, not to be changed."""
    try:
        with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
            node = hydra_compose(root, [f"{group}={name}" for group, name in chosen])
    except HydraException as error:
        raise UserError(f"the presets do not compose: {' '.join(str(error).split())}") from error
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold settings (a mapping of keys to values)")
    return values


def _literal(value: Any) -> Any:
    """`value` with every text escaped, so that OmegaConf reads no interpolation into what is already resolved."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    return [_literal(item) for item in value] if isinstance(value, list) else value


def _assign(node: DictConfig, key: str, value: Any) -> None:
    """Set `key`: groups are gone into setting by setting, lists and mappings are replaced as a whole."""
    info = lookup(key)
    if info.dataclass is not None:
        if not isinstance(value, dict):
            raise UserError(f"{key or 'the whole'} is a group of settings and cannot be {show(value)}")
        for name, item in value.items():
            _assign(node, f"{key}.{name}" if key else str(name), item)
        return
    if isinstance(value, list) and info.element is not None:
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                raise UserError(f"{key}.{index} is a group of settings and cannot be {show(item)}")
            for name in item:
                lookup(f"{key}.{index}.{name}")
    if isinstance(value, dict) and is_mapping(info.type):
        value = {str(name): item for name, item in value.items()}  # YAML reads the name 0 as a number
    if type(value) is int and float in get_args(info.type) and int not in get_args(info.type):
        value = float(value)  # OmegaConf does so for a float alone, but not for one of several types
    _check_index(node, key)
    parent, _, child = key.rpartition(".")
    in_mapping = bool(parent) and is_mapping(lookup(parent).type)
    try:
        if in_mapping:
            OmegaConf.update(node, parent, {child: value}, merge=True, force_add=True)
        else:
            OmegaConf.update(node, key, value, merge=not is_mapping(info.type))
    except (OmegaConfBaseException, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{key}={show(value)} is not possible: expected {describe_type(info)} ({first_line(error)})"
        ) from error


def _check_index(node: DictConfig, key: str) -> None:
    """Refuse an index beyond a list, as in `distillation.stages.5.steps` of two stages."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        entries = OmegaConf.select(node, ".".join(parts[:depth]))
        if isinstance(entries, ListConfig) and int(parts[depth]) >= len(entries):
            raise UserError(f"{key}: {'.'.join(parts[:depth])} has {len(entries)} entries, counted from 0")


def _delete(node: DictConfig, key: str) -> None:
    lookup(key)
    parent, _, child = key.rpartition(".")
    if not parent or not is_mapping(lookup(parent).type):
        raise UserError(f"~{key}: only an entry of a mapping can be taken out, such as ~evaluation.tasks.wikitext")
    entries = OmegaConf.select(node, parent)
    if child not in entries:
        raise UserError(f"~{key}: {parent} has no '{child}'; it holds: {', '.join(map(str, entries)) or 'nothing'}")
    del entries[child]


def _finish(node: DictConfig) -> Config:
    for key in known_keys():
        parent, _, name = key.rpartition(".")
        if OmegaConf.is_missing(OmegaConf.select(node, parent) if parent else node, name):
            raise UserError(f"{key} has no value; give {key}=VALUE")
    try:
        config = cast(Config, OmegaConf.to_object(node))  # resolves; resolving twice would read what was escaped
    except OmegaConfBaseException as error:
        raise UserError(f"the settings do not resolve: {' '.join(str(error).split())}") from error
    check_values(config)
    return config
