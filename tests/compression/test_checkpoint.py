"""The lazy reader and the piecewise writer of safetensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_compress.compression.checkpoint import Checkpoint, read_header
from moe_compress.compression.shards import disk_source, split_by_size, tensor_source, write_shard
from moe_compress.errors import UserError
from moe_compress.modeling.checkpoint import weight_files


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(5, 7),
        "b.weight": torch.randn(3, 4, 2).bfloat16(),
        "c.ids": torch.arange(11),
        "d.empty": torch.empty(0, 9, dtype=torch.float16),
        "e.scalar": torch.tensor(2.5, dtype=torch.float64),
        "f.flags": torch.tensor([True, False, True]),
        "g.eight": torch.randn(6).to(torch.float8_e4m3fn),
    }


def sharded(path: Path, tensors: dict[str, torch.Tensor], shards: int = 3) -> Path:
    names = list(tensors)
    weight_map = {name: f"model-{number % shards + 1:05d}.safetensors" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*flat)


def test_reads_what_safetensors_wrote(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    for path in (tmp_path / "one", sharded(tmp_path / "many", tensors)):
        checkpoint = Checkpoint(path)
        assert set(checkpoint) == set(tensors)
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        for name, tensor in tensors.items():
            assert checkpoint[name].shape == tuple(tensor.shape)
            assert same(checkpoint.tensor(name), tensor)


def test_safetensors_reads_what_was_written(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    checkpoint = Checkpoint(tmp_path / "source")
    strided = torch.randn(4, 6).mT
    sources = {name: disk_source(checkpoint, name) for name in tensors}
    write_shard(tmp_path / "copy.safetensors", {**sources, "strided": tensor_source(strided)}, {"made": "here"})
    back = load_file(tmp_path / "copy.safetensors")
    assert set(back) == {*tensors, "strided"}
    assert same(back["strided"], strided)
    for name, tensor in tensors.items():
        assert same(back[name], tensor)
    with safe_open(tmp_path / "copy.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "here"}
    # The order in which tensors come makes no difference.
    reordered = {"strided": tensor_source(strided), **dict(reversed(sources.items()))}
    write_shard(tmp_path / "again.safetensors", reordered, {"made": "here"})
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "copy.safetensors").read_bytes()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> None:
        raise OSError("disk full")

    source = tensor_source(torch.ones(3))
    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path / "x.safetensors", {"a": type(source)("F32", (3,), 12, broken)})
    assert list(tmp_path.iterdir()) == []


def test_missing_and_damaged_shards_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = sharded(tmp_path, tensors)
    shard = path / "model-00002.safetensors"
    content = shard.read_bytes()
    for damaged, message in [
        (content[:-1], "model-00002.safetensors is cut short"),
        (content[:20], "model-00002.safetensors is cut short"),
        (content[:3], "model-00002.safetensors is cut short"),
        (content + b"x", "model-00002.safetensors has 1 bytes too many"),
        (content[:8] + b"[" + content[9:], "model-00002.safetensors has a damaged header"),
        (content.replace(b'"shape":[', b'"shape":[9,', 1), "model-00002.safetensors"),
        (struct.pack("<Q", 1 << 62) + content[8:], "model-00002.safetensors is cut short"),
    ]:
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            Checkpoint(path)
    shard.unlink()
    with pytest.raises(UserError, match="model-00002.safetensors is missing"):
        Checkpoint(path)


def test_index_and_shards_must_agree(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = sharded(tmp_path, tensors)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["nowhere.weight"] = "model-00001.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00001.safetensors lacks the tensor nowhere.weight"):
        Checkpoint(path)
    (path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="not an index of shards"):
        Checkpoint(path)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors\.index\.json"):
        Checkpoint(path)


def test_a_single_file_comes_before_an_index(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As in Transformers, and for every reader alike."""
    path = sharded(tmp_path, tensors)
    save_file({"only.weight": torch.zeros(2)}, path / "model.safetensors")
    assert list(Checkpoint(path)) == ["only.weight"]
    assert weight_files(path) == [path / "model.safetensors"]


def test_pickle_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained"):
        Checkpoint(tmp_path)


def test_empty_and_absent_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no weights to load"):
        Checkpoint(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Checkpoint(tmp_path / "absent")


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_values_that_are_no_numbers_are_named(tmp_path: Path, value: float, word: str) -> None:
    weight = torch.randn(8, 8)
    weight[3, 5] = value
    save_file({"fine": torch.rand(4).half() * 60000, "bad.weight": weight}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(UserError, match=f"bad.weight in .*model.safetensors holds {word}"):
        checkpoint.finite_tensor("bad.weight")
    with pytest.raises(UserError, match=f"bad.weight in .*model.safetensors holds {word}"):
        list(checkpoint.finite_chunks("bad.weight"))
    assert b"".join(checkpoint.finite_chunks("fine")) == checkpoint.tensor("fine").numpy().tobytes()


def test_fingerprint_is_of_the_content(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    prints = []
    for name, change in [("one", 0.0), ("two", 0.0), ("three", 1.0)]:
        (tmp_path / name).mkdir()
        changed = {**tensors, "a.weight": tensors["a.weight"] + change}
        save_file(changed, tmp_path / name / "model.safetensors")
        prints.append(Checkpoint(tmp_path / name).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_header_of_a_single_file(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors", {"key": "value"})
    assert read_header(tmp_path / "x.safetensors").metadata == {"key": "value"}
    with pytest.raises(UserError, match="is missing"):
        read_header(tmp_path / "y.safetensors")


def test_splitting_by_size() -> None:
    assert split_by_size([("a", 4), ("b", 4), ("c", 3), ("d", 20), ("e", 1)], 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert split_by_size([], 8) == []
