"""Models on the hub: of one that is only planned, headers are downloaded, unless its weights are there already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo, filter_repo_objects

from moe_compress.compression.checkpoint import Checkpoint
from moe_compress.errors import UserError
from moe_compress.modeling import resolve_model_path
from moe_compress.modeling.checkpoint import weight_files

Hub = Callable[[Path], Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """Makes a directory the repository `someone/model`, and returns its place in the cache."""

    def serve(source: Path) -> Path:
        cache = tmp_path / "cache"

        def snapshot_download(repository: str, *, allow_patterns: list[str], **_: Any) -> str:
            assert repository == "someone/model"
            cache.mkdir(exist_ok=True)
            for name in filter_repo_objects([file.name for file in source.iterdir()], allow_patterns=allow_patterns):
                shutil.copy(source / name, cache / name)
            return str(cache)

        def get_safetensors_metadata(repository: str, *, revision: str | None) -> SafetensorsRepoMetadata:
            headers = {file.name: read_header(file) for file in source.glob("*.safetensors")}
            files = {
                name: SafetensorsFileMetadata(
                    header.pop("__metadata__"), {k: TensorInfo(**v) for k, v in header.items()}
                )
                for name, header in headers.items()
            }
            return SafetensorsRepoMetadata(None, True, {}, files)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", get_safetensors_metadata)
        return cache

    return serve


def read_header(file: Path) -> dict[str, Any]:
    raw = file.read_bytes()
    header: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header


@pytest.mark.parametrize("size", ["30KB", "5GB"])
def test_headers_stand_for_the_weights(size: str, hub: Hub, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny_model("olmoe").save_pretrained(source, max_shard_size=size)
    cache = hub(source)
    path = resolve_model_path("someone/model", headers=tmp_path / "headers")
    assert path == tmp_path / "headers" and not list(cache.glob("*.safetensors"))
    assert (path / "config.json").read_bytes() == (source / "config.json").read_bytes()
    left, right = Checkpoint(source), Checkpoint(path)
    assert {name: (left[name].shape, left[name].dtype) for name in left} == {
        name: (right[name].shape, right[name].dtype) for name in right
    }
    assert resolve_model_path("someone/model") == cache  # now with weights
    assert len(weight_files(cache)) == len(weight_files(path)) == len(list(source.glob("*.safetensors")))
    assert resolve_model_path("someone/model", headers=tmp_path / "again") == cache
    assert resolve_model_path(source, headers=tmp_path / "again") == source


def test_what_cannot_be_read_is_told(
    hub: Hub, tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model"
    tiny_model("olmoe").save_pretrained(source)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    hub(source)
    pickled = "no safetensors weights of someone/model .*pickled.*save_pretrained"
    with pytest.raises(UserError, match=pickled):
        resolve_model_path("someone/model")
    for error, words in (
        (NotASafetensorsRepoError("none"), pickled),
        (ConnectionError("no"), "the hub cannot be reached"),
        (RuntimeError("refused\nfor some reason"), "someone/model cannot be read from the hub: refused"),
    ):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", fail)
        with pytest.raises(UserError, match=words) as told:
            resolve_model_path("someone/model", headers=tmp_path / "headers")
        assert "\n" not in str(told.value)
