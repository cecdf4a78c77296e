"""Questions about held-out files of the Python standard library, the same on every machine with the same library.

Both kinds of question are made from the test split only, at lines that occur in no file of the training split,
so that having seen a line before helps nobody. Questions come in an order drawn from a hash, so that the first
n (lm_eval's `limit`) are a fair sample of all files.
"""

from __future__ import annotations

import hashlib
import io
import keyword
import random
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from moe_compress.reference.data import stdlib_files, stdlib_root

CONTEXT_LINES = 8
CHOICES = 4
MAX_QUESTIONS = 500
_SHORTEST, _LONGEST = 12, 100


def next_line(**_: Any) -> dict[str, Any]:
    """The data set of `stdlib_next_line`, as lm_eval's `custom_dataset` wants it (it passes the task's metadata)."""
    from datasets import Dataset

    return {"test": Dataset.from_list(list(next_line_questions()))}


def identifier(**_: Any) -> dict[str, Any]:
    """The data set of `stdlib_identifier`, as lm_eval's `custom_dataset` wants it."""
    from datasets import Dataset

    return {"test": Dataset.from_list(list(identifier_questions()))}


@lru_cache(maxsize=2)
def next_line_questions(root: Path | None = None) -> tuple[dict[str, Any], ...]:
    """Some lines of a file, and four candidates for the next: the true one and three from other test files.

    The distractors get the indentation of the true line and are close to it in length, so that neither gives the
    answer away.

    Args:
        root: the library to ask about (default: the running interpreter's).

    Returns:
        Dicts with `file`, `context`, `choices` (4 lines) and `label` (the index of the true one).
    """
    seen = _training_lines(root)
    files = _test_files(root)
    pool: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for name, lines in files:
        for line in lines:
            if _is_telling(line, seen):
                pool[len(line.strip())].append((line.strip(), name))
    questions = []
    for name, lines in files:
        own = {line.strip() for line in lines}
        for number in range(CONTEXT_LINES, len(lines)):
            answer = lines[number].strip()
            if not _is_telling(lines[number], seen):
                continue
            key = f"{name}:{number}"
            distractors = _distractors(answer, name, own, pool, random.Random(key))
            if len(distractors) < CHOICES - 1:
                continue
            label = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % CHOICES
            choices = [*distractors[:label], answer, *distractors[label:]]
            indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
            context = "\n".join(lines[number - CONTEXT_LINES : number]) + "\n"
            questions.append(
                {"file": key, "context": context, "choices": [indent + choice for choice in choices], "label": label}
            )
    return tuple(_sample(questions))


@lru_cache(maxsize=2)
def identifier_questions(root: Path | None = None) -> tuple[dict[str, Any], ...]:
    """Some lines of a file up to a name that those lines use already: which name is it?

    Args:
        root: the library to ask about (default: the running interpreter's).

    Returns:
        Dicts with `file`, `context` (ends right before the name) and `identifier`.
    """
    seen = _training_lines(root)
    questions = []
    for name, lines in _test_files(root):
        for row, column, word in _names(lines):
            if row < CONTEXT_LINES or not _is_telling(lines[row], seen):
                continue
            above = lines[row - CONTEXT_LINES : row]
            before = lines[row][:column]
            if not before.strip() or not re.search(rf"\b{re.escape(word)}\b", "\n".join(above)):
                continue
            questions.append(
                {"file": f"{name}:{row}:{column}", "context": "\n".join([*above, before]), "identifier": word}
            )
    return tuple(_sample(questions))


def _test_files(root: Path | None) -> list[tuple[str, list[str]]]:
    base = root or stdlib_root()
    return [
        (path.relative_to(base).as_posix(), [line.rstrip() for line in text.splitlines()])
        for path, text in _texts(stdlib_files("test", root))
    ]


def _training_lines(root: Path | None) -> set[str]:
    return {line.strip() for _, text in _texts(stdlib_files("train", root)) for line in text.splitlines()}


def _texts(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    for path in paths:
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def _is_telling(line: str, seen: set[str]) -> bool:
    """Whether a line says enough to be asked for: neither trivial nor a comment nor known from training."""
    text = line.strip()
    return (
        _SHORTEST <= len(text) <= _LONGEST
        and not text.startswith("#")
        and any(character.isalpha() for character in text)
        and text not in seen
    )


def _distractors(
    answer: str, name: str, own: set[str], pool: dict[int, list[tuple[str, str]]], rng: random.Random
) -> list[str]:
    """Three different lines of other files, within four characters of the answer's length (none if there are fewer)."""
    near = (entry for length in range(len(answer) - 4, len(answer) + 5) for entry in pool.get(length, ()))
    texts = list(dict.fromkeys(text for text, source in near if source != name and text not in own))
    return rng.sample(texts, CHOICES - 1) if len(texts) >= CHOICES - 1 else []


def _names(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """Row, column and text of each name of at least five letters; a file that does not tokenize ends early."""
    try:
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
            if token.type == tokenize.NAME and len(token.string) >= 5 and not keyword.iskeyword(token.string):
                yield token.start[0] - 1, token.start[1], token.string
    except (tokenize.TokenError, SyntaxError):
        return


def _sample(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MAX_QUESTIONS`, in an order that depends on the names of the questions only."""
    return sorted(questions, key=lambda question: hashlib.sha256(question["file"].encode()).digest())[:MAX_QUESTIONS]
