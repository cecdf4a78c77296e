"""moe-compress: one shared core per MoE layer and a low-rank wrapper per expert.

Importing this package registers the `shared_core` plug-in, so that `AutoModelForCausalLM.from_pretrained` reads
compressed checkpoints. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moe_compress import _plugin
from moe_compress.errors import UserError

if TYPE_CHECKING:
    from moe_compress.modeling import (
        SharedCoreConfig,
        SharedCoreExperts,
        compress_in_memory,
        count_parameters,
        export_dense,
        find_experts,
        load_model,
        load_tokenizer,
    )

__version__ = "0.1.0"

__all__ = [
    "SharedCoreConfig",
    "SharedCoreExperts",
    "UserError",
    "__version__",
    "compress_in_memory",
    "count_parameters",
    "export_dense",
    "find_experts",
    "load_model",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("moe_compress.modeling"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_plugin.register()
