"""Names that packages import on first use."""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module

import pytest

import moe_compress

SUBPACKAGES = [f"moe_compress.{found.name}" for found in pkgutil.iter_modules(moe_compress.__path__)]
LAZY = [name for name in ("moe_compress", *SUBPACKAGES) if hasattr(import_module(name), "_HOME")]


@pytest.mark.parametrize("package", LAZY)
def test_a_name_means_the_same_before_and_after_its_module_is_imported(package: str) -> None:
    """Importing a submodule makes it an attribute of its package: a function of that name would be found only once."""
    module = import_module(package)
    for name in module.__all__:
        first = getattr(module, name)
        assert getattr(module, name) is first, name
        assert f"{package}.{name}" not in sys.modules, name
