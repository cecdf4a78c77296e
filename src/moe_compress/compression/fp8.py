"""Checkpoints quantized to fp8 in blocks, as DeepSeek-V3 is published, read as if they were bfloat16.

Each fp8 matrix `X` comes with fp32 factors `X_scale_inv`, one for a block of (usually) 128 x 128 values; the weight is
their product (DeepSeek-V3, arXiv 2412.19437, section 3.3). Every fp8 tensor is dequantized, those outside the experts
too: a model has one quantization in its config.json, and that of the compressed one is ours. So attention and dense
layers take twice the bytes they had; the experts, nearly all of such a model, are compressed anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compress.compression.checkpoint import COPY_BYTES, Checkpoint, TensorEntry, read_tensor
from moe_compress.errors import UserError

SCALE_SUFFIX = "_scale_inv"
_FP8 = ("F8_E4M3", "F8_E5M2")
_STORED = torch.bfloat16


def is_fp8(quantization: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of the kind that is read here."""
    return quantization.get("quant_method") == "fp8"


class Fp8Checkpoint(Checkpoint):
    """A checkpoint whose fp8 tensors are dequantized to bfloat16 when they are read; the scales are not to be seen.

    Raises:
        UserError: an fp8 tensor without a scale, or a scale of another shape than its blocks ask for.
    """

    def __init__(self, path: Path, quantization: Mapping[str, Any]) -> None:
        """Open the headers; `quantization` is the `quantization_config` of config.json."""
        super().__init__(path)
        size = quantization.get("weight_block_size")
        self._block: tuple[int, int] | None = None if size is None else (int(size[0]), int(size[1]))
        self._stored = self.entries
        self.entries = {}
        for name, entry in self._stored.items():
            if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in self._stored:
                continue
            if entry.dtype in _FP8:
                self._check(entry)
                entry = replace(entry, dtype="BF16", nbytes=entry.numel * _STORED.itemsize)
            self.entries[name] = entry

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, dequantized where it is fp8."""
        stored = self._stored[name]
        if stored.dtype not in _FP8:
            return read_tensor(stored)
        return self._dequantize(read_tensor(stored), read_tensor(self._stored[name + SCALE_SUFFIX]).float())

    def chunks(self, name: str) -> Iterator[bytearray | memoryview]:
        """Yield the bytes of one tensor, dequantized where it is fp8."""
        if self._stored[name].dtype not in _FP8:
            yield from super().chunks(name)
            return
        view = self.tensor(name).reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(view), COPY_BYTES):
            yield view[start : start + COPY_BYTES]

    def _dequantize(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The product of fp8 values [..., out, in] and their factors [..., blocks of out, blocks of in] (or one)."""
        if self._block is None:
            return (weight.float() * scale.reshape(())).to(_STORED)
        result = torch.empty(weight.shape, dtype=_STORED)
        rows, columns = self._block
        for index in range(scale.shape[-2]):  # one row of blocks at a time: no copy of the whole in fp32
            here = slice(index * rows, (index + 1) * rows)
            factors = scale[..., index, :].repeat_interleave(columns, -1)[..., : weight.shape[-1]]
            result[..., here, :] = (weight[..., here, :].float() * factors.unsqueeze(-2)).to(_STORED)
        return result

    def _check(self, entry: TensorEntry) -> None:
        scale = self._stored.get(entry.name + SCALE_SUFFIX)
        if scale is None:
            raise UserError(f"{entry.file} has the fp8 tensor {entry.name} without {entry.name}{SCALE_SUFFIX}")
        shape: tuple[int, ...] = scale.shape
        if self._block is None:
            if scale.numel != 1:
                raise UserError(
                    f"{scale.name} in {scale.file} has {scale.numel} values, but the quantization_config of "
                    "config.json names no weight_block_size"
                )
            return
        blocks = (-(-length // block) for length, block in zip(entry.shape[-2:], self._block, strict=False))
        expected = (*entry.shape[:-2], *blocks)
        if len(entry.shape) < 2 or shape != expected:
            raise UserError(
                f"{scale.name} in {scale.file} has the shape {list(shape)} where blocks of {list(self._block)} of "
                f"{entry.name} {list(entry.shape)} need {list(expected)}"
            )
