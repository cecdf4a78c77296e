"""Conversations to token ids by the tokenizer's chat template, with the assistant's turns told from the prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import Any

import numpy as np

from moe_compress.data.documents import Document
from moe_compress.errors import UserError, first_line

_CONVERSATIONS_PER_BATCH = 64
# Of which no answer is likely to begin or end.
_OTHER_CONTENT = "\u2588"
_GENERATION = re.compile(r"\{%-?\s*generation\b")

Message = dict[str, Any]


def chat_documents(
    conversations: Iterable[Sequence[Message]], tokenizer: Any, *, mask_prompts: bool = True
) -> Iterator[Document]:
    """Yield conversations as token ids; of these the assistant's turns, with the tokens that end them, are labels.

    A template that marks the turns itself (`{% generation %}`) is believed. Elsewhere a turn begins where the template
    would ask the model to answer, and ends where the conversation up to and with it ends.

    Args:
        conversations: messages with `role` and `content`.
        tokenizer: with a chat template.
        mask_prompts: false makes every token a label.

    Raises:
        UserError: no chat template, messages it cannot render, or one in which turns cannot be told from prompts.
    """
    template = chat_template(tokenizer)
    marked = bool(_GENERATION.search(template))
    if mask_prompts and not marked and not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "masking prompts needs a fast tokenizer, or a chat template with {% generation %}; "
            "or set mask_prompts=false to train on whole conversations"
        )

    def render(messages: Sequence[Message], **options: Any) -> Any:
        try:
            return tokenizer.apply_chat_template(list(messages), **{"tokenize": False, **options})
        except UserError:
            raise
        except Exception as error:  # whatever the template raises
            raise UserError(f"the chat template cannot render a conversation: {first_line(error)}") from error

    cleaned = (_clean(messages) for messages in conversations)
    if mask_prompts and marked:
        for messages in cleaned:
            encoded = render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            yield Document(_ids(encoded["input_ids"]), np.asarray(encoded["assistant_masks"], dtype=bool))
        return
    while batch := list(islice(cleaned, _CONVERSATIONS_PER_BATCH)):
        texts = [render(messages) for messages in batch]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False, return_offsets_mapping=mask_prompts)
        for number, (messages, text) in enumerate(zip(batch, texts, strict=True)):
            ids = _ids(encoded["input_ids"][number])
            labelled = np.full(len(ids), not mask_prompts)
            if mask_prompts:
                starts = np.array([start for start, _ in encoded["offset_mapping"][number]], dtype=np.int64)
                for start, end in assistant_spans(messages, text, render):
                    labelled |= (starts >= start) & (starts < end)
            yield Document(ids, labelled)


def chat_template(tokenizer: Any) -> str:
    """The template conversations are rendered by.

    Raises:
        UserError: the tokenizer has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the tokenizer has no chat template to render messages_column with; use text_column instead")
    return str(tokenizer.get_chat_template())


def assistant_spans(messages: Sequence[Message], text: str, render: Callable[..., str]) -> list[tuple[int, int]]:
    """Where in the rendered `text` the assistant's turns are, as characters `[start, end)`.

    Templates may render a turn otherwise when more follow (reasoning is left out of earlier turns). Then what follows
    the content, alone and in the whole, is found by putting another content in its place.

    Raises:
        UserError: a turn cannot be found.
    """
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        changed = [*messages[:number], {**message, "content": _OTHER_CONTENT}, *messages[number + 1 :]]
        before = render(messages[:number], add_generation_prompt=True) if number else ""
        # What asks for an answer may open a block of reasoning that this turn, an earlier one, has not.
        if not number or (not text.startswith(before) and text.startswith(render(messages[:number]))):
            before = text[: _same(text, render(changed))]
        alone = render(messages[: number + 1])
        end = len(alone)
        if not text.startswith(alone):
            behind = _same(text[::-1], render(changed)[::-1])
            ending = _same(alone[::-1], render(changed[: number + 1])[::-1])
            end = len(text) - behind + ending
        if not text.startswith(before) or end < len(before):
            raise UserError(
                "the chat template rewrites earlier turns, so that answers cannot be told from prompts; use one with "
                "{% generation %}, or set mask_prompts=false to train on whole conversations"
            )
        spans.append((len(before), end))
    return spans


def _same(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _clean(messages: Sequence[Message]) -> list[Message]:
    """Messages without the empty fields that a table gives to all of them."""
    cleaned = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError("messages_column holds something other than lists of messages with role and content")
        kept = {key: value for key, value in message.items() if value is not None}
        cleaned.append({"content": "", **kept})
    return cleaned


def _ids(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)
