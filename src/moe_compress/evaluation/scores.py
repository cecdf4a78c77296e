"""`TextScore`: what a model makes of a text, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TextScore:
    """What a model makes of a text. Standard errors are over sequences, which are independent; tokens are not.

    Attributes:
        loss: mean negative log-likelihood per token that counts (of conversations the answers'), in nats.
        stderr: standard error of `loss`.
        perplexity, perplexity_stderr: exp(loss), and its error by the delta method.
        tokens, sequences: how much text.
        sequence_losses: mean loss of each sequence, for paired comparison of models on the same text.
        sequence_tokens: how many tokens of each count, where not the same of all; else empty.
        kl, kl_stderr: mean KL(teacher || student) per token, in nats; the error includes that of the estimate.
        top1_agreement, top1_stderr: share of tokens where both find the same next token most likely.
        load_entropy: mean over the MoE layers of their `entropy`.
        routing_agreement: mean over the MoE layers of their `agreement`.
        routing: per MoE layer `entropy` (1 is balanced), `largest` load (in fair shares), `unused` experts, and, with a
            teacher, `agreement` (share of the chosen experts that the teacher chooses as well).
    """

    loss: float
    stderr: float | None
    perplexity: float
    perplexity_stderr: float | None
    tokens: int
    sequences: int
    sequence_losses: list[float]
    sequence_tokens: list[int] = field(default_factory=list)
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    top1_stderr: float | None = None
    load_entropy: float | None = None
    routing_agreement: float | None = None
    routing: dict[str, dict[str, Any]] = field(default_factory=dict)
