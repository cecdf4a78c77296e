"""The schema of the settings seen from outside: dotted keys, types in words, values as they are typed.

Derived from the dataclasses of `moe_compress.config`, so that help, suggestions and checks cannot drift from them.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, reduce
from operator import or_
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from moe_compress.config import Config

_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class FieldInfo:
    """One setting or group: its dotted key, its type without `None`, and its documentation."""

    key: str
    type: Any
    optional: bool = False
    help: str = ""
    choices: tuple[Any, ...] | None = None
    default: Any = None

    @property
    def dataclass(self) -> type | None:
        """The dataclass of a group, else None."""
        return self.type if dataclasses.is_dataclass(self.type) else None

    @property
    def element(self) -> Any:
        """The dataclass that a list holds, else None."""
        inner = get_args(self.type)[0] if get_origin(self.type) is list else None
        return inner if dataclasses.is_dataclass(inner) else None


def is_mapping(annotation: Any) -> bool:
    """Whether a setting is a free mapping, such as `evaluation.tasks`."""
    return get_origin(annotation) is dict


def is_text(annotation: Any) -> bool:
    """Whether a setting is a text."""
    return annotation is str


def _required(annotation: Any) -> tuple[Any, bool]:
    """The annotation without `None`, and whether it had it."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [option for option in get_args(annotation) if option is not type(None)]
        return reduce(or_, rest), len(rest) < len(get_args(annotation))
    return annotation, False


@cache
def fields_of(cls: type) -> dict[str, FieldInfo]:
    """The fields of a settings dataclass by name."""
    hints = get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        annotation, optional = _required(hints[field.name])
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[field.name] = FieldInfo(
            field.name,
            annotation,
            optional,
            field.metadata.get("help", ""),
            field.metadata.get("choices"),
            default,
        )
    return found


def find(key: str) -> FieldInfo | None:
    """The schema at a dotted key (`distillation.stages.0.steps`, `evaluation.tasks.wikitext`), None if there is none.

    The empty key is the whole of the settings.
    """
    info = FieldInfo("", Config)
    for part in key.split(".") if key else []:
        if info.dataclass is not None:
            field = fields_of(info.dataclass).get(part)
            if field is None:
                return None
            info = field
        elif get_origin(info.type) is list and part.isdecimal():
            info = FieldInfo(part, *_required(get_args(info.type)[0]))
        elif is_mapping(info.type) and part:
            info = FieldInfo(part, *_required(get_args(info.type)[1]))
        else:
            return None
    return dataclasses.replace(info, key=key)


def walk(prefix: str = "", cls: type = Config) -> Iterator[FieldInfo]:
    """Every setting (no group) with its dotted key, in the order of the schema; list elements are `key[].name`."""
    for name, info in fields_of(cls).items():
        key = prefix + name
        if info.dataclass is not None:
            yield from walk(f"{key}.", info.dataclass)
        else:
            yield dataclasses.replace(info, key=key)
            if info.element is not None:
                yield from walk(f"{key}[].", info.element)


@cache
def known_keys() -> tuple[str, ...]:
    """Every key that can be set, groups included."""
    keys = [info.key for info in walk() if "[]" not in info.key]
    groups = {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}
    return (*keys, *sorted(groups))


def describe_type(info: FieldInfo) -> str:
    """A setting's type or choices in words, such as `integer or null`."""
    if info.choices:
        words = " | ".join(map(str, info.choices))
    elif info.element is not None:
        words = f"list of {{{', '.join(fields_of(info.element))}}}"
    elif is_mapping(info.type):
        words = f"{{name: {_WORDS.get(get_args(info.type)[1], 'value')}}}"
    elif get_origin(info.type) is types.UnionType:
        words = " or ".join(_WORDS[option] for option in get_args(info.type))
    elif get_origin(info.type) is list:
        words = f"list of {_WORDS.get(get_args(info.type)[0], 'values')}s"
    else:
        words = _WORDS.get(info.type, "group of settings")
    return f"{words} or null" if info.optional else words


def show(value: Any) -> str:
    """A value as it is written on the command line: `null`, `true`, `[1, 2]`."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key to value of every setting; lists and mappings are one value, as plain data."""
    plain = dataclasses.asdict(config)

    def value_of(key: str) -> Any:
        value: Any = plain
        for part in key.split("."):
            value = value[part]
        return value

    return {info.key: value_of(info.key) for info in walk() if "[]" not in info.key}
