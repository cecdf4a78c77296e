"""The one place where models and tokenizers are loaded, original or compressed, with mistakes told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import moe_compress  # noqa: F401  (registers the plug-in)
from moe_compress.errors import UserError
from moe_compress.modeling.checkpoint import read_config, resolve_model_path, weight_files
from moe_compress.modeling.config import QUANT_METHOD
from moe_compress.modeling.find import find_experts

__all__ = ["load_model", "load_tokenizer", "resolve_model_path"]

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt", "tekken.json")
# Imports fail where a quantized model or a tokenizer needs a package that is not installed.
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError)


def load_model(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    revision: str | None = None,
    require_moe: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a causal language model, original or compressed, in evaluation mode.

    Args:
        path_or_id: `reference`, a local directory or a hub id.
        dtype: `auto` (as stored), a name such as `bfloat16`, or a torch dtype.
        trust_remote_code: run model code that comes with the checkpoint.
        device: where to put the whole model; None leaves it on the CPU (or to `device_map` in `kwargs`).
        revision: branch, tag or commit on the hub.
        require_moe: refuse a model that has neither experts nor shared cores, before its weights are read.
        kwargs: further arguments of `from_pretrained`.

    Raises:
        UserError: whatever is wrong with the checkpoint; nothing is ever left uninitialized.
    """
    path = resolve_model_path(path_or_id, revision)
    raw = read_config(path)
    weight_files(path)
    if require_moe and (raw.get("quantization_config") or {}).get("quant_method") != QUANT_METHOD:
        _check_moe(path, trust_remote_code)
    if device is not None:
        kwargs["device_map"] = {"": device}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **kwargs
        )
    except UserError:
        raise
    except _LOADING_ERRORS as error:
        raise UserError(f"{path} cannot be loaded: {_one_line(error)}") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{path}: {len(missing)} tensors of the model are not in the checkpoint, such as {', '.join(missing[:3])}; "
            "it is incomplete, get it again"
        )
    return model


def load_tokenizer(
    path_or_id: str | Path, *, trust_remote_code: bool = False, revision: str | None = None, **kwargs: Any
) -> Any:
    """Load the tokenizer of a model.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = resolve_model_path(path_or_id, revision)
    # For some architectures Transformers makes an empty tokenizer up where there is none.
    if not any(file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)):
        raise UserError(f"{path} has no tokenizer files; copy those of the original model there")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
    except (*_LOADING_ERRORS, TypeError) as error:
        raise UserError(f"{path} has no tokenizer that can be loaded: {_one_line(error)}") from error


def _check_moe(path: Path, trust_remote_code: bool) -> None:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except _LOADING_ERRORS as error:
        raise UserError(f"{path} cannot be loaded: {_one_line(error)}") from error
    model.config.name_or_path = str(path)
    find_experts(model)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "ignore_mismatched_sizes" in text:
        text = "tensors have other shapes than its config.json says (see the report above)"
    return text if len(text) <= 300 else f"{text[:300]} ..."
