"""Transformers models: finding experts, replacing them by shared cores, loading, saving, counting, dense export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_compress.lazy import lazy_names

if TYPE_CHECKING:
    from moe_compress.modeling.compress import compress_in_memory, fold_in_memory
    from moe_compress.modeling.config import SharedCoreConfig
    from moe_compress.modeling.count import ParameterCount, count_parameters
    from moe_compress.modeling.experts import SharedCoreExperts, find_shared_cores
    from moe_compress.modeling.export import export_dense, materialize_in_memory
    from moe_compress.modeling.find import (
        ExpertsModule,
        expert_weights,
        experts_per_token,
        find_experts,
        set_expert_weights,
    )
    from moe_compress.modeling.load import load_model, load_tokenizer, resolve_model_path
    from moe_compress.modeling.tensors import factor_tensors

# Lazy, because the plug-in (`quantizer`) is imported while Transformers itself is still being imported.
_HOME = {
    "compress_in_memory": "compress",
    "fold_in_memory": "compress",
    "SharedCoreConfig": "config",
    "ParameterCount": "count",
    "count_parameters": "count",
    "SharedCoreExperts": "experts",
    "find_shared_cores": "experts",
    "export_dense": "export",
    "materialize_in_memory": "export",
    "ExpertsModule": "find",
    "expert_weights": "find",
    "experts_per_token": "find",
    "find_experts": "find",
    "set_expert_weights": "find",
    "load_model": "load",
    "load_tokenizer": "load",
    "resolve_model_path": "load",
    "factor_tensors": "tensors",
}

__all__ = [
    "ExpertsModule",
    "ParameterCount",
    "SharedCoreConfig",
    "SharedCoreExperts",
    "compress_in_memory",
    "count_parameters",
    "expert_weights",
    "experts_per_token",
    "export_dense",
    "factor_tensors",
    "find_experts",
    "find_shared_cores",
    "fold_in_memory",
    "load_model",
    "load_tokenizer",
    "materialize_in_memory",
    "resolve_model_path",
    "set_expert_weights",
]

__getattr__ = lazy_names(__name__, _HOME)
