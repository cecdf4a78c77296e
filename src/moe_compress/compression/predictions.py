"""The log-likelihood of tokens sampled from a model's own predictions: where Fisher information starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def draws_for(batch: Tensor, generator: torch.Generator) -> Tensor:
    """A number from 0 to 1 for each position of a batch [B, L], by which its token is sampled; of the CPU."""
    return torch.rand(batch.numel(), generator=generator).view(batch.shape)


def surprise_of_samples(logits: Tensor, draws: Tensor) -> Tensor:
    """Minus the log-likelihood of one token at each position, sampled from the prediction there.

    Args:
        logits: [B, L, V].
        draws: [B, L], see `draws_for`.

    Returns:
        A scalar, the sum over all positions.
    """
    log_probs = logits.flatten(0, 1).float().log_softmax(-1)
    # Sampled by the inverse of the distribution, from draws of the CPU: the same on every device.
    cumulative = log_probs.detach().exp().cumsum(-1)
    wanted = draws.reshape(-1, 1).to(logits.device) * cumulative[:, -1:]
    sampled = torch.searchsorted(cumulative, wanted).clamp_max(logits.shape[-1] - 1)
    return -log_probs.gather(-1, sampled).sum()


def run_backward(model: PreTrainedModel, batches: Iterable[Tensor], on_batch: Callable[[], None], seed: int) -> None:
    """Forward and backward from the log-likelihood of one token at each position, sampled from the prediction there.

    No gradient of a parameter is formed: the embeddings' outputs are what the graph starts from.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings: Any = model.get_input_embeddings()
    start = embeddings.register_forward_hook(lambda _, __, output: output.detach().requires_grad_())
    try:
        model.requires_grad_(False)
        with torch.enable_grad():
            for batch in batches:
                logits = model(input_ids=batch.to(model.device), use_cache=False).logits
                surprise_of_samples(logits, draws_for(batch, generator)).backward()
                on_batch()
    finally:
        start.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
