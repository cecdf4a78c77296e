"""What the teacher makes of the held-out text, kept in a file, so that it need not run again for every checkpoint.

Per token: the 64 most probable next tokens, and 32 drawn from all others in proportion to their probability. With them

    KL(teacher || student) = sum_top p log(p / q) + p_tail * E_tail[log(p / q)]

is estimated without bias: the mean over the draws stands for the expectation. A cut-off at the top tokens would be
biased downwards. A vocabulary of 64 or less is kept whole, and the sum is then exact. 768 bytes a token, whatever the
vocabulary, and neither the teacher nor its full distributions are in memory with a student.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from moe_compress.errors import UserError
from moe_compress.evaluation.scores import TextScore

TOP_K = 64
TAIL_SAMPLES = 32
FORMAT = 1


@dataclass
class TeacherRows:
    """The teacher on some rows of the text, `[n, L - 1, ...]`.

    Attributes:
        index: `[n, L - 1, K]`, int64, the kept tokens, the top ones first.
        log_p: `[n, L - 1, K]`, fp32, their log-probabilities.
        weight: `[n, L - 1, K]`, fp32, what each counts in an expectation over the teacher's distribution.
        top: `[n, L - 1]`, int64, the most probable token.
        routing: module name to the experts chosen, `[n * L, k]`.
    """

    index: Tensor
    log_p: Tensor
    weight: Tensor
    top: Tensor
    routing: dict[str, Tensor]

    def divergence(self, row: int, part: slice | Tensor, log_q: Tensor) -> Tensor:
        """KL(teacher || student) of the tokens `part` of one row, `[T]`, estimated; `log_q` is `[T, V]`.

        Ids from V on are left out of the teacher's distribution: a smaller vocabulary has no padding there.
        """
        index, log_p, weight = (tensor[row, part].to(log_q.device) for tensor in (self.index, self.log_p, self.weight))
        # xlogy-like: a token the teacher rules out (-inf) adds nothing, rather than 0 * inf.
        beyond = index >= log_q.shape[-1]
        log_q = log_q.gather(-1, index.masked_fill(beyond, 0))
        terms = weight * (log_p - log_q).masked_fill(log_p.isneginf() | beyond, 0.0)
        rest = 1 - (weight * beyond).sum(-1)
        return terms.sum(-1) / rest - rest.log()


class TeacherText:
    """The file, open for reading; any number of processes may read it at once.

    Attributes:
        rows: `[N, L]`, int64, the text.
        labelled: `[N, L]`, bool, the tokens of it that count.
        score: what the teacher itself scores on it.
        vocabulary: the number of tokens of the teacher's distribution.
        tokenizer: the `tokenizer_fingerprint` of the teacher, where it is known.
    """

    def __init__(self, path: Path, tokenizer: str | None = None) -> None:
        self.path = path
        self.tokenizer = tokenizer
        try:
            # Nobody writes to it any more, and some network file systems have no locks.
            self._file = h5py.File(path, "r", locking=False)
            facts = json.loads(str(self._file.attrs["facts"]))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it, and it is made again") from error
        self.rows = torch.from_numpy(self._file["rows"][:]).long()
        self.labelled = torch.ones_like(self.rows, dtype=torch.bool)
        if "labelled" in self._file:
            self.labelled = torch.from_numpy(self._file["labelled"][:])
        self.score = TextScore(**facts["score"])
        self.vocabulary = int(facts["vocabulary"])

    def read(self, start: int, stop: int) -> TeacherRows:
        """The rows from `start` to `stop`."""
        index, log_p = self._file["index"][start:stop], torch.from_numpy(self._file["log_p"][start:stop])
        weight = log_p.exp()
        if weight.shape[-1] > TOP_K:
            tail = 1 - weight[..., :TOP_K].sum(-1, keepdim=True)
            weight[..., TOP_K:] = tail.clamp(min=0) / TAIL_SAMPLES
        return TeacherRows(
            torch.from_numpy(index).long(),
            log_p,
            weight,
            torch.from_numpy(self._file["top"][start:stop]).long(),
            {
                name: torch.from_numpy(chosen[start:stop]).long().flatten(0, 1)
                for name, chosen in self._file["routing"].items()
            },
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TeacherTextWriter:
    """Writes the file while the teacher is scored (`score_text(..., keep=writer)`); rows come in order."""

    def __init__(self, path: Path, rows: Tensor, seed: int, labelled: Tensor | None = None) -> None:
        self.rows = rows
        self._file = h5py.File(path, "w")
        self._file["rows"] = rows.to(torch.int32).numpy()
        if labelled is not None and not labelled.all():
            self._file["labelled"] = labelled.numpy()
        self._file.create_group("routing")
        self._done = 0
        self._vocabulary = 0
        self._seed = seed

    def add(self, logits: Tensor, routing: dict[str, Tensor]) -> None:
        """Add one row: its logits `[L - 1, V]` and the experts chosen `[L, k]` by module name."""
        self._vocabulary = logits.shape[-1]
        index, log_p, top = kept_tokens(logits, self._seed + self._done)
        self._append("index", index.to(torch.int32))
        self._append("log_p", log_p)
        self._append("top", top.to(torch.int32))
        for name, chosen in routing.items():
            self._append(f"routing/{name}", chosen.to(torch.int16 if chosen.max() < 2**15 else torch.int32))
        self._done += 1

    def finish(self, score: TextScore) -> None:
        """Add what the teacher scores, and close the file."""
        facts = {"format": FORMAT, "score": asdict(score), "vocabulary": self._vocabulary}
        self._file.attrs["facts"] = json.dumps(facts)
        self._file.close()

    def _append(self, name: str, row: Tensor) -> None:
        values: Any = row.cpu().numpy()
        if name not in self._file:
            self._file.create_dataset(name, (len(self.rows), *values.shape), values.dtype)
        self._file[name][self._done] = np.asarray(values)


def kept_tokens(logits: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens to keep of each distribution, their log-probabilities, and the most probable token.

    Args:
        logits: `[T, V]`.
        seed: of the draws from the tail.

    Returns:
        int64 and fp32 `[T, K]`: the `TOP_K` most probable tokens and `TAIL_SAMPLES` draws from the others, or all V
        tokens where there are no more than `TOP_K`; and int64 `[T]`.
    """
    generator = torch.Generator(logits.device).manual_seed(seed)
    indices, values, tops = [], [], []
    for part in logits.split(max(1, 2**23 // logits.shape[-1])):
        log_p = part.float().log_softmax(-1)
        index = log_p.topk(min(TOP_K, log_p.shape[-1]), dim=-1).indices
        if log_p.shape[-1] > TOP_K:
            # A floor, so that there is something to draw where the teacher rules out all others; it weighs nothing.
            tail = log_p.exp().clamp(min=1e-30).scatter(-1, index, 0.0)
            draws = torch.multinomial(tail, TAIL_SAMPLES, replacement=True, generator=generator)
            index = torch.cat([index, draws], dim=-1)
        indices.append(index)
        values.append(log_p.gather(-1, index))
        tops.append(log_p.argmax(-1))
    return torch.cat(indices), torch.cat(values), torch.cat(tops)
