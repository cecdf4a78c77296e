"""The teacher cache in figures: bytes per token, and tokens per core-second written and read against those trained on.

    python benchmarks/cache.py                                 # the reference MoE on its validation text
    python benchmarks/cache.py --vocabulary 151936             # made-up logits over a large vocabulary
    python benchmarks/cache.py --sequences 8 --repeats 1       # quick

Written is what encoding and HDF5 take once the teacher's logits are there; the forward pass that makes them is a line
of its own. Read is random access, decoding included, in this process alone. Times are those of the CPU, summed over
threads, so that other work on the machine hardly matters. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_compress.config import DatasetConfig
from moe_compress.data import Row, rows_in_memory
from moe_compress.distillation.data import TrainingOrder, collate
from moe_compress.distillation.encoders import Encoder, SampleEncoder, TopKEncoder
from moe_compress.distillation.losses import distillation_loss
from moe_compress.distillation.manifest import FORMAT_VERSION, write_manifest
from moe_compress.distillation.reader import TeacherCache
from moe_compress.distillation.writer import write_file
from moe_compress.evaluation.machine import describe_machine
from moe_compress.modeling import load_model, load_tokenizer

LENGTH = 512
BATCH = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=32, help=f"sequences of {LENGTH} tokens (default 32)")
    parser.add_argument("--vocabulary", type=int, help="made-up logits over so many ids instead of the reference MoE")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many timings counts (default 3)")
    options = parser.parse_args()
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['threads']} threads, torch {torch.__version__}\n")
    if options.vocabulary:
        rows, logits = made_up(options.sequences, options.vocabulary)
    else:
        rows, logits = of_reference(options.sequences, options.repeats)
    vocabulary = logits[0].shape[-1]
    print("| encoder | compression | bytes per token | written | read |")
    print("|---|---|---|---|---|")
    encoders: list[tuple[str, Encoder]] = [
        ("topk, k=32", TopKEncoder(32, vocabulary)),
        ("topk, k=64", TopKEncoder(64, vocabulary)),
        ("sample, 50 draws", SampleEncoder(50, 1.0, 0, vocabulary)),
    ]
    for name, encoder in encoders:
        for compression in ("gzip", "lzf", "none"):
            size, written, read = measure(encoder, compression, rows, logits, options.repeats)
            print(f"| {name} | {compression} | {size:.0f} | {written:,.0f} | {read:,.0f} |", flush=True)


def of_reference(sequences: int, repeats: int) -> tuple[list[Row], list[Tensor]]:
    """Validation text and the reference MoE's logits `[length, vocabulary]`; prints how fast it runs and trains."""
    tokenizer = load_tokenizer("reference")
    dataset = DatasetConfig(split="validation", max_length=LENGTH, max_samples=sequences)
    rows = rows_in_memory(dataset, tokenizer, seed=0)
    model = load_model("reference", dtype="float32")
    batches = [collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [row for batch in batches for row in model(input_ids=batch["input_ids"], use_cache=False).logits]

    seconds, logits = best(forward, repeats)
    print(f"teacher forward: {len(rows) * LENGTH / seconds:,.0f} tokens per core-second")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    encoder = TopKEncoder(64, logits[0].shape[-1])
    records = [encoder.encode(row, 0) for row in logits[:BATCH]]
    targets = encoder.decode({name: torch.from_numpy(np.stack([r[name] for r in records])) for name in records[0]})

    def step() -> None:
        batch = batches[0]
        outputs = model(input_ids=batch["input_ids"], use_cache=False)
        distillation_loss(outputs.logits, batch["labels"], targets, alpha=0.5, temperature=1.0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds, _ = best(step, repeats)
    print(f"training consumes: {len(batches[0]['labels']) * LENGTH / seconds:,.0f} tokens per core-second\n")
    return rows, logits


def made_up(sequences: int, vocabulary: int) -> tuple[list[Row], list[Tensor]]:
    """Random ids, and logits whose probabilities fall about as 1 / rank^1.5, in an order that changes by token."""
    choose = np.random.default_rng(0)
    by_rank = -1.5 * torch.arange(1, vocabulary + 1).log()
    coprime = [factor for factor in choose.integers(1, vocabulary, 1000).tolist() if math.gcd(factor, vocabulary) == 1]
    rows, logits = [], []
    for _ in range(sequences):
        ids = choose.integers(0, vocabulary, LENGTH, dtype=np.int32)
        rows.append({"input_ids": ids, "documents": np.zeros(LENGTH, np.int32), "labelled": np.ones(LENGTH, bool)})
        orders = zip(choose.choice(coprime, LENGTH), choose.integers(0, vocabulary, LENGTH), strict=True)
        ranks = torch.arange(vocabulary)
        sharpness = torch.from_numpy(choose.uniform(0.7, 1.3, (LENGTH, 1))).float()
        logits.append(sharpness * torch.stack([by_rank[(ranks * int(m) + int(c)) % vocabulary] for m, c in orders]))
    return rows, logits


def measure(
    encoder: Encoder, compression: str, rows: list[Row], logits: list[Tensor], repeats: int
) -> tuple[float, float, float]:
    """Bytes per token, tokens per core-second written, tokens per core-second read."""
    tokens = len(rows) * LENGTH
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)

        def records() -> Iterator[Any]:
            for number, row in enumerate(logits):
                yield encoder.encode(row, number)

        def write() -> Any:
            return write_file(
                directory / "logits-000000.h5",
                start=0,
                rows=rows,
                length=LENGTH,
                encoder=encoder,
                vocab_size=encoder.vocab_size,
                compression=compression,
                records=records(),
            )

        written, file = best(write, repeats)
        header = {
            "format_version": FORMAT_VERSION,
            "num_sequences": len(rows),
            "sequence_length": LENGTH,
            "encoder": encoder.name,
            **{key: value for key, value in vars(encoder).items() if key != "name"},
        }
        write_manifest(directory, header, [file])

        def read() -> None:
            cache = TeacherCache(directory)
            order = TrainingOrder(cache, seed=0, first=0, count=len(cache))
            for start in range(0, len(order), BATCH):
                batch = collate([order[index] for index in range(start, min(start + BATCH, len(order)))])
                cache.encoder.decode(batch["teacher"])

        seconds, _ = best(read, repeats)
        return file.bytes / tokens, tokens / written, tokens / seconds


def best(action: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The shortest time in seconds of a core, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = action()
        times.append(time.process_time() - start)
    return min(times), result


if __name__ == "__main__":
    main()
