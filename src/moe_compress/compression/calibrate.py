"""Gram matrices of what each expert really sees, collected by running text through the original model.

For the inputs x of expert e and their routing weights g, G_e = sum of g^2 x x^T: then tr(D G_e D^T) is the squared
error that a change D of the expert's weights causes in the output of the layer (DESIGN 2.5). `gate_up_proj` sees the
hidden states of the tokens routed to the expert, `down_proj` its gated activations.

The sums are collected by an experts implementation registered with Transformers, so that any architecture that
dispatches its experts (`@use_experts_implementation`) is covered without touching its code. They are kept in fp32
whatever the model's type: bf16 sums were seen to be off by factors (DESIGN 5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_compress.compression.checkpoint import read_header, read_tensor
from moe_compress.compression.shards import split_by_size, tensor_source, write_shard
from moe_compress.config import Config
from moe_compress.data import packed_dataset
from moe_compress.errors import UserError
from moe_compress.files import fingerprint
from moe_compress.modeling import ExpertsModule, find_experts, load_model, load_tokenizer

IMPLEMENTATION = "moe_compress_calibrate"
GRAM_BYTES_AT_ONCE = 8 << 30  # layers whose matrices exceed this together are collected in several passes


@dataclass
class LayerGrams:
    """What one MoE layer saw.

    Attributes:
        grams: projection name to [E, in, in], fp32; the sum of g^2 x x^T over the tokens routed to each expert.
        tokens: [E], int64; how many tokens were routed to each expert.
    """

    grams: dict[str, Tensor]
    tokens: Tensor

    @classmethod
    def zeros(cls, experts: ExpertsModule, device: torch.device | str) -> LayerGrams:
        grams = {
            projection: torch.zeros(count, inputs, inputs, dtype=torch.float32, device=device)
            for projection, (count, _, inputs) in experts.projections.items()
        }
        return cls(grams, torch.zeros(experts.num_experts, dtype=torch.int64, device=device))

    def add(self, projection: str, expert: int, inputs: Tensor, weights: Tensor) -> None:
        """Add the inputs [n, in] of one expert, weighted by their routing weights [n]."""
        scaled = inputs.float() * weights.float()[:, None]
        self.grams[projection][expert].addmm_(scaled.mT, scaled)


def gram_bytes(experts: ExpertsModule) -> int:
    """Bytes of the Gram matrices of one experts module."""
    return sum(4 * count * inputs * inputs for count, _, inputs in experts.projections.values())


_collecting: dict[nn.Module, LayerGrams] = {}


def _experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The ordinary forward of an experts module, one expert after another, which adds to the module's sums.

    Args:
        hidden_states: [T, H].
        top_k_index: [T, k]; an index equal to `num_experts` is padding.
        top_k_weights: [T, k].

    Returns:
        [T, H].
    """
    sums = _collecting.get(self)
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    assignment = top_k_index.reshape(-1)
    counts = torch.bincount(assignment, minlength=self.num_experts + 1)[: self.num_experts]
    by_expert = assignment.argsort(stable=True).split([*counts.tolist(), len(assignment) - int(counts.sum())])
    output = torch.zeros_like(hidden_states, dtype=torch.float32)

    def linear(inputs: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return functional.linear(inputs, weight.mT if self.is_transposed else weight, bias)

    for expert, slots in enumerate(by_expert[: self.num_experts]):
        if not len(slots):
            continue
        tokens = slots // top_k_index.shape[1]
        weights = top_k_weights.reshape(-1)[slots]
        inputs = hidden_states[tokens]
        hidden = linear(inputs, up_name, expert)
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        if sums is not None:
            sums.add(up_name, expert, inputs, weights)
            sums.add("down_proj", expert, hidden, weights)
        output.index_add_(0, tokens, (linear(hidden, "down_proj", expert) * weights[:, None]).float())
    if sums is not None:
        sums.tokens += counts
    return output.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


@contextmanager
def collect_into(sums: dict[nn.Module, LayerGrams], modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run the experts `modules` through our implementation for the length of the block; those in `sums` add to them."""
    configs: dict[int, Any] = {id(module.config): module.config for module in modules}
    before = {key: config._experts_implementation for key, config in configs.items()}
    try:
        _collecting.update(sums)
        for config in configs.values():
            config._experts_implementation = IMPLEMENTATION
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
        for module in sums:
            _collecting.pop(module, None)


@torch.inference_mode()
def collect_grams(
    model: PreTrainedModel,
    experts: list[ExpertsModule],
    batches: Iterable[Tensor],
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, LayerGrams]:
    """Run batches of token ids [B, L] through a model and sum the Gram matrices of some of its experts modules.

    Returns:
        Module name to its sums, on the device of the module.
    """
    sums = {found.name: LayerGrams.zeros(found, next(found.module.parameters()).device) for found in experts}
    by_module = {found.module: sums[found.name] for found in experts}
    training = model.training
    model.eval()
    with collect_into(by_module, by_module):
        for batch in batches:
            # Without the language-model head, whose logits nobody needs here.
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
            on_batch()
    model.train(training)
    return sums


class Calibration:
    """The Gram matrices of a run, in one safetensors file per MoE layer, so that a killed run does not repeat them."""

    def __init__(self, config: Config, model_path: Path, source_fingerprint: str, directory: Path) -> None:
        """Read the calibration text; nothing is run yet.

        Raises:
            UserError: the data set cannot be read or is too short.
        """
        self.config = config
        self.model_path = model_path
        self.directory = directory
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
            }
        )
        self.sequential = settings.sequential
        self._layers_before: dict[int, str] = {}

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
        if not self.file(index).exists():
            return False
        try:
            return read_header(self.file(index)).metadata.get("fingerprint") == self.key(index)
        except UserError:  # cut short by a full disk, say: make it again
            return False

    def load(self, index: int) -> LayerGrams:
        """Read the matrices of one layer to main memory."""
        entries = dict(read_header(self.file(index)).entries)
        tokens = read_tensor(entries.pop("tokens"))
        return LayerGrams({name: read_tensor(entry) for name, entry in entries.items()}, tokens)

    def run(self, layers: list[int], device: torch.device, progress: Callable[[int, int], None]) -> None:
        """Collect the matrices of some MoE layers, by their index, with the whole model in memory; write their files.

        Args:
            device: where the model runs.
            progress: called with batches done and batches in all.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        settings = self.config.model
        model = load_model(
            str(self.model_path),
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            device=str(device),
        )
        experts = find_experts(model)
        groups = split_by_size(((index, gram_bytes(experts[index])) for index in layers), GRAM_BYTES_AT_ONCE)
        batches = self.batches
        done = 0

        def on_batch() -> None:
            nonlocal done
            done += 1
            progress(done, len(batches) * len(groups))

        for group in groups:
            sums = collect_grams(model, [experts[index] for index in group], batches, on_batch)
            for index in group:
                self.write(index, sums.pop(experts[index].name))

    def write(self, index: int, layer: LayerGrams) -> None:
        """Write the matrices of one layer to its file.

        Raises:
            UserError: they hold NaN or infinity.
        """
        tensors = {**layer.grams, "tokens": layer.tokens}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"calibration met NaN or infinity at the input of {name} in MoE layer {index}; "
                    "try model.dtype=float32 or compression.calibration.enabled=false"
                )
        sources = {name: tensor_source(tensor) for name, tensor in tensors.items()}
        write_shard(self.file(index), sources, {"fingerprint": self.key(index)})
