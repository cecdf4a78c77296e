"""Running a causal language model with something else in the place of its output head, where the head is linear.

What an architecture does to the product of its head (nothing, a scale, a soft cap) is found out by running it once on
two tokens. The replacement runs inside the head's own forward pass, inside the model's: so DDP, FSDP and DeepSpeed see
the parameters used where they expect them, and find the loss in what the model returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compress.distillation.chunks import LinearHead

AtHead = Callable[[Tensor, LinearHead], Any]

# What the head's product is replaced by to see what becomes of it.
_PROBES = (-300.0, -20.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 20.0, 300.0)


class HeadlessModel:
    """A model whose head hands its hidden states to a function when it is called through `run`, and works as ever else.

    Args:
        model: a causal language model whose head `linear_head` has understood.
        scale, softcap: what it found.
    """

    def __init__(self, model: nn.Module, scale: float, softcap: float | None) -> None:
        self._head: Any = output_head(model)
        self._scale = scale
        self._softcap = softcap
        self._at_head: AtHead | None = None
        self._result: Any = None
        self._original = self._head.forward
        self._head.forward = self._forward
        model.register_forward_hook(self._replace_output)

    def run(self, model: Callable[..., Any], inputs: dict[str, Any], at_head: AtHead) -> Any:
        """Run the model on `inputs` and return `at_head(hidden states [batch, length, hidden], head)`.

        Args:
            model: the model itself, or what wraps it (DDP, a compiled module ...).
        """
        self._at_head = at_head
        try:
            return model(**inputs, use_cache=False)
        finally:
            self._at_head = self._result = None

    @torch.compiler.disable
    def _forward(self, hidden: Tensor) -> Tensor:
        if self._at_head is None:
            return self._original(hidden)
        head = LinearHead(self._head.weight, getattr(self._head, "bias", None), self._scale, self._softcap)
        self._result = self._at_head(hidden, head)
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    @torch.compiler.disable
    def _replace_output(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        return output if self._at_head is None else self._result


def output_head(model: Any) -> Any:
    """The module that makes logits from hidden states, or None."""
    return model.get_output_embeddings()


def headless(model: Any) -> HeadlessModel | None:
    """The model made to run without its head, or None where the head is more than a linear layer with scale and cap.

    None too where accelerate fetches the head's weight from elsewhere for every call.
    """
    found = linear_head(model)
    return None if found is None else HeadlessModel(model, *found)


@torch.no_grad()
def linear_head(model: Any) -> tuple[float, float | None] | None:
    """What a model does to the product of its head: scale and soft cap, or None if it is anything else.

    The model runs once on two tokens. Its head's output is compared with the product of its weight, and replaced by
    known numbers, which are compared with the logits that the model returns for them.
    """
    head = output_head(model)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.is_meta:
        return None
    probes = torch.tensor(_PROBES, device=weight.device)
    seen: list[tuple[Tensor, Tensor]] = []

    def replace(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Tensor:
        seen.append((arguments[0], output))
        return probes.expand(*output.shape[:-1], -1)

    training = model.training
    handle = head.register_forward_hook(replace)
    try:
        ids = torch.tensor([[0, 1]], device=weight.device)
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    except (IndexError, RuntimeError, TypeError, ValueError):  # a head that is called otherwise, or looks at its logits
        return None
    finally:
        handle.remove()
        model.train(training)
    if len(seen) != 1:
        return None
    hidden, product = seen[0]
    if hidden.shape[:-1] != (1, 2) or logits.shape != (1, 2, len(_PROBES)):
        return None
    weight = head.weight  # again: of a sharded model it is whole after a forward pass
    if not _close(F.linear(hidden.to(weight.device), weight, getattr(head, "bias", None)), product):
        return None
    middle = len(_PROBES) // 2
    scale = 1.0 if _close(logits, probes.expand_as(logits)) else float(logits[0, 0, middle + 1] / probes[middle + 1])
    caps = (None, getattr(model.config.get_text_config(), "final_logit_softcapping", None))
    for cap in caps:
        if _close(LinearHead(weight, scale=scale, softcap=cap).finish(probes).expand_as(logits), logits):
            return scale, cap
    return None


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-4 if one.dtype == other.dtype == torch.float32 else 2e-2
    return torch.allclose(one.float(), other.float(), rtol=tolerance, atol=1e-6)
