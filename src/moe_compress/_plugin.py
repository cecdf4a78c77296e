"""Registers the `shared_core` quantizer with Transformers without importing Transformers.

`transformers.quantizers.auto`, which owns the registry, takes seconds to import (it brings torch). If it is loaded
already the plug-in registers at once; otherwise a finder waits for its import and registers right after it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"
_PLUGIN = "moe_compress.modeling.quantizer"


class _RegisteringLoader(Loader):
    """Runs the real loader, then registers the plug-in."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must not remember the wrapper: tools ask its loader for the source.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _RegistryFinder)]
        importlib.import_module(_PLUGIN)


class _RegistryFinder(MetaPathFinder):
    """Finds only the registry module, as the ordinary path finder does, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register() -> None:
    """Register now, or as soon as Transformers' registry is imported; calling it again does nothing."""
    if _REGISTRY in sys.modules:
        importlib.import_module(_PLUGIN)
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())
