"""Gram matrices of what each expert really sees, collected by running text through the original model.

For the inputs x of expert e and their routing weights g, G_e = sum of g^2 x x^T: then tr(D G_e D^T) is the squared
error that a change D of the expert's weights causes in the output of the layer (DESIGN 2.5). `gate_up_proj` sees the
hidden states of the tokens routed to the expert, `down_proj` its gated activations.

With `compression.calibration.fisher` the text also runs backward, from the log-likelihood of tokens sampled from the
model itself, and the gradients d of each expert's outputs take the place of g: G_e = sum of |d|^2 x x^T and
S_e = sum of d d^T (see `factorization.grams`). What runs the text layer by layer is in `walk` and `backward`; here is
what all share, and the run with the whole model in memory.

The sums are collected by an experts implementation registered with Transformers, so that any architecture that
dispatches its experts (`@use_experts_implementation`) is covered without touching its code. They are kept in fp32
whatever the model's type: bf16 sums were seen to be off by factors (DESIGN 5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_compress.compression.checkpoint import made_by, read_header, read_tensor
from moe_compress.compression.predictions import run_backward
from moe_compress.compression.shards import split_by_size, tensor_source, write_shard
from moe_compress.config import Config
from moe_compress.data import packed_dataset
from moe_compress.errors import UserError
from moe_compress.files import fingerprint
from moe_compress.modeling import ExpertsModule, find_experts, load_model, load_tokenizer

IMPLEMENTATION = "moe_compress_calibrate"
_OUT = "_out"  # what the names of output matrices end on in a file
GRAM_BYTES_AT_ONCE = 8 << 30  # layers whose matrices exceed this together are collected in several passes


@dataclass
class LayerGrams:
    """What one MoE layer saw.

    Attributes:
        grams: projection name to [E, in, in], fp32; the sum of g^2 x x^T over the tokens routed to each expert, or of
            |d|^2 x x^T where there are `out_grams`.
        out_grams: projection name to [E, out, out], fp32; the sum of d d^T. Empty without Fisher information.
        tokens: [E], int64; how many tokens were routed to each expert.
    """

    grams: dict[str, Tensor]
    tokens: Tensor
    out_grams: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(
        cls,
        experts: ExpertsModule,
        device: torch.device | str,
        *,
        fisher: bool = False,
        counts_only: bool = False,
    ) -> LayerGrams:
        """Nothing seen yet; with `counts_only` tokens will be counted, and nothing else kept."""

        def squares(side: int) -> dict[str, Tensor]:
            return {
                projection: torch.zeros(shape[0], shape[side], shape[side], dtype=torch.float32, device=device)
                for projection, shape in experts.projections.items()
            }

        tokens = torch.zeros(experts.num_experts, dtype=torch.int64, device=device)
        if counts_only:
            return cls({}, tokens)
        return cls(squares(2), tokens, squares(1) if fisher else {})

    def add(self, projection: str, expert: int, inputs: Tensor, weights: Tensor) -> None:
        """Add the inputs [n, in] of one expert, weighted by their routing weights [n]."""
        if projection not in self.grams:
            return
        scaled = inputs.float() * weights.float()[:, None]
        self.grams[projection][expert].addmm_(scaled.mT, scaled)

    def add_gradients(self, projection: str, expert: int, inputs: Tensor, gradients: Tensor) -> None:
        """Add the inputs [n, in] of one expert and the gradients [n, out] of what it makes of them."""
        gradients = gradients.float()
        scaled = inputs.float() * gradients.norm(dim=1, keepdim=True)
        self.grams[projection][expert].addmm_(scaled.mT, scaled)
        self.out_grams[projection][expert].addmm_(gradients.mT, gradients)


def gram_bytes(experts: ExpertsModule, *, fisher: bool = False) -> int:
    """Bytes of the Gram matrices of one experts module."""
    return sum(
        4 * count * (inputs * inputs + (outputs * outputs if fisher else 0))
        for count, outputs, inputs in experts.projections.values()
    )


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
        inner = linear(inputs, up_name, expert)
        hidden = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        outputs = linear(hidden, "down_proj", expert)
        if sums is not None and sums.out_grams:
            # The gradients of the outputs, before the weights multiply them, have the weights in them.
            _on_gradient(inner, partial(sums.add_gradients, up_name, expert, inputs.detach()))
            _on_gradient(outputs, partial(sums.add_gradients, "down_proj", expert, hidden.detach()))
        elif sums is not None:
            sums.add(up_name, expert, inputs, weights)
            sums.add("down_proj", expert, hidden, weights)
        output.index_add_(0, tokens, (outputs * weights[:, None]).float())
    if sums is not None:
        sums.tokens += counts
    return output.to(hidden_states.dtype)


def _on_gradient(tensor: Tensor, add: Callable[[Tensor], None]) -> None:
    """Call `add` with the gradient of a tensor when it is known; the gradient is not changed."""

    def hook(gradient: Tensor) -> None:
        add(gradient.detach())

    tensor.register_hook(hook)


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


def collect_grams(
    model: PreTrainedModel,
    experts: list[ExpertsModule],
    batches: Iterable[Tensor],
    on_batch: Callable[[], None] = lambda: None,
    *,
    fisher_seed: int | None = None,
    counts_only: bool = False,
) -> dict[str, LayerGrams]:
    """Run batches of token ids [B, L] through a model and sum the Gram matrices of some of its experts modules.

    Args:
        fisher_seed: also collect the gradients; seed of the tokens that are sampled from the model's predictions.
        counts_only: count the tokens of each expert, and keep nothing else.

    Returns:
        Module name to its sums, on the device of the module.
    """
    fisher = fisher_seed is not None
    sums = {
        found.name: LayerGrams.zeros(
            found, next(found.module.parameters()).device, fisher=fisher, counts_only=counts_only
        )
        for found in experts
    }
    by_module = {found.module: sums[found.name] for found in experts}
    training = model.training
    model.eval()
    with collect_into(by_module, by_module):
        if fisher_seed is not None:
            run_backward(model, batches, on_batch, fisher_seed)
        else:
            with torch.inference_mode():
                for batch in batches:
                    # Without the language-model head, whose logits nobody needs here.
                    model.base_model(input_ids=batch.to(model.device), use_cache=False)
                    on_batch()
    model.train(training)
    return sums


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
