"""Where a checkpoint is, and whether it is whole: checks made before any tensor is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moe_compress.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def resolve_model_path(name: str | Path, revision: str | None = None, *, headers: Path | None = None) -> Path:
    """The directory of a model: the reference model's, a local one, or a hub repository's after downloading it.

    Args:
        name: `reference`, a local directory, or a hub id such as `Qwen/Qwen3-30B-A3B`.
        revision: branch, tag or commit on the hub.
        headers: an empty directory that stands for a hub repository whose headers are all that is needed: no weights
            are downloaded then, see `hub.download_headers`.

    Raises:
        UserError: no such directory or repository, or the hub cannot be reached.
    """
    if str(name) == "reference":
        from moe_compress.reference import REFERENCE_MODEL_DIR

        if not (REFERENCE_MODEL_DIR / "config.json").exists():
            raise UserError(
                f"the reference model is not in {REFERENCE_MODEL_DIR}; train it: moe-compress reference train"
            )
        return REFERENCE_MODEL_DIR
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name} is a file; give the directory that holds config.json and the weights")
    text = str(name)
    if text.startswith((".", "~", "/")) or text.count("/") > 1 or "\\" in text:
        raise UserError(f"{name}: no such directory")
    from moe_compress.modeling import hub

    return hub.download(text, revision) if headers is None else hub.download_headers(text, revision, headers)


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a checkpoint directory, as it stands.

    Raises:
        UserError: there is none, or it is not a JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} has no config.json; give the directory of a Hugging Face model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); get the checkpoint again") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object; get the checkpoint again")
    return config


def find_shards(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files that make up a checkpoint, as Transformers chooses them: a single file, else an index.

    Returns:
        The files in order, which need not be there, and the index's map from tensor to file name (empty without one).

    Raises:
        UserError: no such directory, no weights in it, only pickled ones, or an index that is none.
    """
    if not path.is_dir():
        raise UserError(f"checkpoint directory {path} does not exist")
    if (path / SINGLE_FILE).exists():
        return [path / SINGLE_FILE], {}
    index = path / INDEX_FILE
    if not index.exists():
        raise UserError(_no_weights(path))
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [path / name for name in sorted(set(weight_map.values()))], weight_map
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{index} is not an index of shards ({error!r}); get the checkpoint again") from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, in order, after checking that all are there and whole.

    Only headers are read, so this is cheap for the largest checkpoint.

    Raises:
        UserError: see `find_shards`; a shard that the index names but the directory lacks, a truncated file, or a
            tensor that is not in the shard where the index has it.
    """
    shards, weight_map = find_shards(path)
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(shards)} shards are missing, such as {missing[0]}; get them again"
        )
    names = {shard.name: _tensor_names(shard) for shard in shards}
    for tensor, shard in weight_map.items():
        if tensor not in names[shard]:
            raise UserError(
                f"{path / shard} lacks the tensor {tensor} that {INDEX_FILE} names; get the checkpoint again"
            )
    return shards


def _no_weights(path: Path) -> str:
    try:
        names = sorted(file.name for file in path.iterdir())
    except OSError:  # a trainer has just renamed it away
        names = []
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return f"{path} has shards like {shards[0]} but no {INDEX_FILE}; get the checkpoint again"
    # The Trainer's arguments are no weights.
    pickled = [name for name in names if name.endswith(_PICKLE_SUFFIXES) and name != "training_args.bin"]
    if not pickled:
        return f"{path} has no {SINGLE_FILE} and no {INDEX_FILE}; there are no weights to load"
    return f"{path} has only pickled weights ({pickled[0]}), which {not_read_here(path, f'{path}-safetensors')}"


def not_read_here(name: str | Path, output: str) -> str:
    """Why pickled weights are refused, and how to convert those of a directory or hub model `name`."""
    return (
        "can run code when opened and are not read here; if you trust them, convert them: AutoModelForCausalLM."
        f"from_pretrained('{name}', dtype='auto', use_safetensors=False).save_pretrained('{output}')"
    )


def _tensor_names(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or damaged ({error}); get it again") from error
