"""Gram matrices summed as text runs through an experts module, whatever takes the text there.

The sums are collected by an experts implementation registered with Transformers, so that any architecture that
dispatches its experts (`@use_experts_implementation`) is covered without touching its code. They are kept in fp32
whatever the model's type: bf16 sums were seen to be off by factors (DESIGN 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_compress.compression.predictions import run_backward
from moe_compress.modeling import ExpertsModule

IMPLEMENTATION = "moe_compress_calibrate"


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
