"""moe-compress: one shared core per MoE layer and a low-rank wrapper per expert.

Importing this package registers the `shared_core` plug-in, so that `AutoModelForCausalLM.from_pretrained` reads
compressed checkpoints. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_compress import _plugin
from moe_compress.errors import UserError
from moe_compress.lazy import lazy_names

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

__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "modeling"))

_plugin.register()
