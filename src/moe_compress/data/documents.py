"""A tokenized document, and plain texts as such."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from moe_compress.errors import UserError

_TEXTS_PER_BATCH = 64


class Document(NamedTuple):
    """Token ids int32 `[length]` and, for each, whether it is to be learned: bool `[length]`."""

    ids: np.ndarray
    labelled: np.ndarray


def text_documents(texts: Iterable[str], tokenizer: Any) -> Iterator[Document]:
    """Yield texts as token ids, each with end-of-text behind it; every token is a label.

    Raises:
        UserError: the tokenizer has no end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no end-of-sequence token to join documents with; set its eos_token")
    texts = iter(texts)
    while batch := list(islice(texts, _TEXTS_PER_BATCH)):
        for encoding in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            ids = np.asarray([*encoding, end], dtype=np.int32)
            yield Document(ids, np.ones(len(ids), dtype=bool))
