"""The compressed checkpoint: shards of layers and of copied tensors, their index, config.json and the small files.

Every shard says in its own metadata by which settings it was made, so that an interrupted run knows what it may keep,
and what `compression.json` reports can be read back from the shards.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_compress.compression.checkpoint import DTYPES, read_header, read_tensor
from moe_compress.compression.layer import LayerResult
from moe_compress.compression.planning import Plan
from moe_compress.compression.shards import disk_source, split_by_size, tensor_source, write_shard
from moe_compress.compression.source import SourceModel
from moe_compress.errors import UserError
from moe_compress.factorization import Factors
from moe_compress.files import fingerprint, write_json
from moe_compress.modeling import SharedCoreConfig
from moe_compress.modeling.checkpoint import INDEX_FILE
from moe_compress.modeling.side_files import copy_side_files
from moe_compress.modeling.tensors import Layout, factors_from_tensors

SHARD_BYTES = 5_000_000_000  # of copied tensors
_METADATA = "moe_compress"


@dataclass(frozen=True)
class LayerRecord:
    """What is known of a written layer.

    Attributes:
        layouts: what each projection became, see `SharedCoreConfig.layers`.
        errors: see `LayerResult.errors`.
        load: tokens per expert in the calibration, or None.
    """

    layouts: dict[str, Layout]
    errors: dict[str, dict[str, Any]]
    load: list[int] | None


class CheckpointWriter:
    """Writes the compressed checkpoint of `source` into a directory, where shards of an earlier attempt may lie."""

    def __init__(self, directory: Path, source: SourceModel) -> None:
        self.directory = directory
        self.source = source
        self.layers = len(source.map.layers)
        sizes = ((name, source.checkpoint[name].nbytes) for name in source.map.passthrough)
        self.copied = split_by_size(sizes, SHARD_BYTES)

    def layer_file(self, index: int) -> Path:
        return self.directory / f"model-{index + 1:05d}.safetensors"

    def copied_file(self, number: int) -> Path:
        return self.directory / f"model-{self.layers + number + 1:05d}.safetensors"

    def clean(self) -> None:
        """Remove temporary files that a killed attempt left."""
        for file in self.directory.glob(".*.tmp"):
            file.unlink()

    def record(self, index: int, made_by: str) -> LayerRecord | None:
        """What is known of a layer if its shard is complete and was made by the settings `made_by`, else None."""
        facts = self._facts(self.layer_file(index), made_by)
        return None if facts is None else LayerRecord(facts["layouts"], facts["errors"], facts["load"])

    def write_layer(self, index: int, result: LayerResult, made_by: str) -> LayerRecord:
        """Write one compressed layer as one shard, atomically."""
        record = LayerRecord(result.layouts, result.errors, result.load)
        facts = {"made_by": made_by, "layer": result.name, **asdict(record)}
        sources = {name: tensor_source(tensor) for name, tensor in result.tensors().items()}
        write_shard(self.layer_file(index), sources, {_METADATA: json.dumps(facts)})
        return record

    def layer_parameters(self, index: int) -> tuple[dict[str, Factors], dict[str, torch.Tensor]]:
        """Read a written layer back: the factors of each projection, and the biases by `<projection>_bias`."""
        prefix = f"{self.source.map.layers[index].name}."
        header = read_header(self.layer_file(index))
        tensors = {name.removeprefix(prefix): read_tensor(entry) for name, entry in header.entries.items()}
        factors = {}
        for projection, layout in json.loads(header.metadata[_METADATA])["layouts"].items():
            groups = torch.tensor(layout["groups"]) if "groups" in layout else None
            factors[projection] = factors_from_tensors(projection, tensors, groups)
        return factors, {name: tensor for name, tensor in tensors.items() if name.endswith("_bias")}

    def copy_others(self, number: int) -> None:
        """Copy one of the groups `copied` of tensors outside the experts, byte for byte, unless it is there already.

        Raises:
            UserError: a tensor that the model loads holds NaN or infinity.
        """
        checkpoint = self.source.checkpoint
        names = self.copied[number]
        made_by = fingerprint({"source": checkpoint.fingerprint, "names": names})
        if self._facts(self.copied_file(number), made_by) is None:
            unused = set(self.source.map.unused)
            sources = {name: disk_source(checkpoint, name, finite=name not in unused) for name in names}
            write_shard(self.copied_file(number), sources, {_METADATA: json.dumps({"made_by": made_by})})

    def finish(self, plan: Plan, records: list[LayerRecord]) -> int:
        """Write the index, config.json and the small files; returns the bytes of all tensors.

        Args:
            plan: what was done.
            records: of all layers.

        Raises:
            UserError: a tensor would be stored twice.
        """
        shards = [self.layer_file(index) for index in range(self.layers)]
        shards += [self.copied_file(number) for number in range(len(self.copied))]
        weight_map: dict[str, str] = {}
        size = parameters = 0
        for shard in shards:
            for name, entry in read_header(shard).entries.items():
                if name in weight_map:
                    raise UserError(f"tensor {name} of {self.source.path} has the name of a compressed tensor")
                weight_map[name] = shard.name
                size += entry.nbytes
                parameters += entry.numel
        for file in self.directory.glob("model-*.safetensors"):  # of an attempt with other settings
            if file not in shards:
                file.unlink()
        copy_side_files(self.source.path, self.directory)
        metadata = {"total_parameters": parameters, "total_size": size}
        write_json(self.directory / INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
        write_json(self.directory / "config.json", self._config(plan, records))
        return size

    def _config(self, plan: Plan, records: list[LayerRecord]) -> dict[str, Any]:
        layers = {layer.name: record.layouts for layer, record in zip(plan.layers, records, strict=True)}
        config = dict(self.source.raw_config)
        config["dtype"] = _dtype_name(self.source, config.pop("torch_dtype", None) or config.get("dtype"), plan)
        config["quantization_config"] = SharedCoreConfig(
            layers=layers,
            parameterization=plan.parameterization,  # type: ignore[arg-type]
        ).to_dict()
        return config

    def _facts(self, file: Path, made_by: str) -> dict[str, Any] | None:
        """The facts in a shard's metadata if it is complete and was made by `made_by`, else None."""
        if not file.exists():
            return None
        try:
            facts = json.loads(read_header(file).metadata[_METADATA])
        except (UserError, KeyError, ValueError):
            return None
        return facts if facts.get("made_by") == made_by else None


def _dtype_name(source: SourceModel, declared: str | None, plan: Plan) -> str:
    """The type that config.json names, in which `dtype="auto"` loads the whole model.

    The type of the source, unless the factors are stored in a wider one: then loading must not round them.
    """
    if declared is None:
        entries = [source.checkpoint[name] for name in source.map.passthrough]
        floats = [DTYPES[entry.dtype] for entry in entries if entry.dtype in ("F32", "BF16", "F16", "F64")]
        declared = str(max(floats, key=floats.count, default=torch.float32))
    dtype: torch.dtype = getattr(torch, declared.removeprefix("torch."))
    for layer in plan.layers:
        for projection in layer.projections:
            dtype = torch.promote_types(dtype, getattr(torch, projection.dtype))
    return str(dtype).removeprefix("torch.")
