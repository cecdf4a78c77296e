"""The files of a model directory beside its weights and its config.json: tokenizer, templates, license, code."""

from __future__ import annotations

import shutil
from pathlib import Path

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot"}
_COPIED_DIRECTORIES = ("additional_chat_templates",)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy everything of a model directory that is neither weights nor config.json to another one."""
    files = [*source.iterdir(), *(file for name in _COPIED_DIRECTORIES for file in (source / name).rglob("*"))]
    for file in files:
        if (
            file.is_file()
            and file.suffix not in _WEIGHT_SUFFIXES
            and not file.name.endswith(".index.json")
            and not file.name.startswith(".")
            and file.name != "config.json"
        ):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
