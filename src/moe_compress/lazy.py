"""Public names of a package that are imported on first use, so that importing the package itself stays cheap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """The module-level `__getattr__` (PEP 562) of a package.

    Args:
        package: the package's `__name__`.
        home: public name to the submodule that defines it. No name may be that of a submodule, which takes its place in
            the package as soon as it is imported.

    Returns:
        A function that imports the submodule of a name and returns what it means there, and raises AttributeError for
        a name that is not in `home`.
    """

    def get(name: str) -> Any:
        if name in home:
            return getattr(import_module(f"{package}.{home[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
