"""Gram matrices of what each expert really sees, collected by running text through the original model.

For the inputs x of expert e and their routing weights g, G_e = sum of g^2 x x^T: then tr(D G_e D^T) is the squared
error that a change D of the expert's weights causes in the output of the layer (DESIGN 2.5). `gate_up_proj` sees the
hidden states of the tokens routed to the expert, `down_proj` its gated activations.

With `compression.calibration.fisher` the text also runs backward, from the log-likelihood of tokens sampled from the
model itself, and the gradients d of each expert's outputs take the place of g: G_e = sum of |d|^2 x x^T and
S_e = sum of d d^T (see `factorization.grams`). What runs the text layer by layer is in `walk` and `backward`, what sums
is in `collect`; here is the text, the files, and the run with the whole model in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress.compression.checkpoint import made_by, read_header, read_tensor
from moe_compress.compression.collect import LayerGrams, collect_grams, gram_bytes
from moe_compress.compression.shards import split_by_size, tensor_source, write_shard
from moe_compress.config import Config
from moe_compress.data import packed_dataset
from moe_compress.errors import UserError
from moe_compress.files import fingerprint
from moe_compress.modeling import find_experts, load_model, load_tokenizer

GRAM_BYTES_AT_ONCE = 8 << 30  # layers whose matrices exceed this together are collected in several passes
_OUT = "_out"  # what the names of output matrices end on in a file


class Calibration:
    """The Gram matrices of a run, in one safetensors file per MoE layer, so that a killed run does not repeat them."""

    def __init__(
        self,
        config: Config,
        model_path: Path,
        source_fingerprint: str,
        directory: Path,
        *,
        counts_only: bool = False,
    ) -> None:
        """Read the calibration text; nothing is run yet.

        Args:
            directory: where the files go.
            counts_only: count the tokens of each expert, without matrices.

        Raises:
            UserError: the data set cannot be read or is too short.
        """
        self.config = config
        self.model_path = model_path
        self.directory = directory
        self.counts_only = counts_only
        settings = config.compression.calibration
        tokenizer = load_tokenizer(str(model_path), trust_remote_code=config.model.trust_remote_code)
        rows = packed_dataset(settings.dataset, tokenizer, config.seed).with_format("numpy")
        self.rows: np.ndarray = np.stack([np.asarray(row, dtype=np.int64) for row in rows["input_ids"]])
        self.fingerprint = fingerprint(
            {
                "source": source_fingerprint,
                "tokens": hashlib.sha256(self.rows.tobytes()).hexdigest(),
                "batch_size": settings.batch_size,
                "model": asdict(config.model),
                "sequential": settings.sequential,
                **({"fisher": config.seed} if settings.fisher else {}),
                "counts_only": counts_only,
            }
        )
        self.sequential = settings.sequential
        self.fisher_seed = config.seed if settings.fisher else None
        self._layers_before: dict[int, str] = {}

    def order(self, count: int) -> list[int]:
        """The indices of `count` MoE layers in the order in which their matrices become known.

        Gradients come to the last layer first. All processes of a team hold to the order, whichever of them calibrates.
        """
        return list(range(count)) if self.fisher_seed is None else list(reversed(range(count)))

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """The calibration text: token ids [B, L], every batch but the last of the same size."""
        return torch.from_numpy(self.rows).split(self.config.compression.calibration.batch_size)

    def follow(self, index: int, before: str) -> None:
        """Say that the MoE layer `index` is to see the outputs of compressed layers, which `before` identifies."""
        self._layers_before[index] = before

    def key(self, index: int) -> str:
        """What decides the matrices of a layer."""
        return fingerprint([self.fingerprint, self._layers_before.get(index)])

    def file(self, index: int) -> Path:
        return self.directory / f"layer-{index:05d}.safetensors"

    def finished(self, index: int) -> bool:
        """Whether the matrices of a layer are on disk and were made from the same model and text."""
        return made_by(self.file(index), self.key(index))

    def load(self, index: int) -> LayerGrams:
        """Read the matrices of one layer to main memory."""
        tensors = {name: read_tensor(entry) for name, entry in read_header(self.file(index)).entries.items()}
        tokens = tensors.pop("tokens")
        out_grams = {name.removesuffix(_OUT): tensors.pop(name) for name in list(tensors) if name.endswith(_OUT)}
        return LayerGrams(tensors, tokens, out_grams)

    def load_model(self, device: torch.device) -> PreTrainedModel:
        """The whole original model."""
        settings = self.config.model
        return load_model(
            str(self.model_path),
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            device=str(device),
        )

    def run(self, layers: list[int], device: torch.device, progress: Callable[[int, int], None]) -> None:
        """Collect the matrices of some MoE layers, by their index, with the whole model in memory; write their files.

        Args:
            device: where the model runs.
            progress: called with batches done and batches in all.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        model = self.load_model(device)
        experts = find_experts(model)
        fisher = self.fisher_seed is not None
        sizes = ((index, 0 if self.counts_only else gram_bytes(experts[index], fisher=fisher)) for index in layers)
        groups = split_by_size(sizes, GRAM_BYTES_AT_ONCE)
        batches = self.batches
        done = 0

        def on_batch() -> None:
            nonlocal done
            done += 1
            progress(done, len(batches) * len(groups))

        for group in groups:
            sums = collect_grams(
                model,
                [experts[index] for index in group],
                batches,
                on_batch,
                fisher_seed=self.fisher_seed,
                counts_only=self.counts_only,
            )
            for index in group:
                self.write(index, sums.pop(experts[index].name))

    def write(self, index: int, layer: LayerGrams) -> None:
        """Write the matrices of one layer to its file.

        Raises:
            UserError: they hold NaN or infinity.
        """
        out_grams = {name + _OUT: gram for name, gram in layer.out_grams.items()}
        tensors = {**layer.grams, **out_grams, "tokens": layer.tokens}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"calibration met NaN or infinity at the input of {name} in MoE layer {index}; "
                    "try model.dtype=float32 or compression.calibration.enabled=false"
                )
        sources = {name: tensor_source(tensor) for name, tensor in tensors.items()}
        write_shard(self.file(index), sources, {"fingerprint": self.key(index)})
