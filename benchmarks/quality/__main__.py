"""The command line of the quality benchmark: `run`, `table`, `train`, `methods`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.quality.cells import Bench, Protocol, default_cache
from benchmarks.quality.distil import Training, next_rates
from benchmarks.quality.methods import METHODS, Method
from benchmarks.quality.models import RECIPES, find_model, make_model
from benchmarks.quality.product import product
from benchmarks.quality.record import read_record, record_file, write_documents
from benchmarks.quality.table import markdown, plot
from moe_compress.allocator import keep_freed_memory
from moe_compress.errors import UserError
from moe_compress.files import write_atomically

# The product with its default settings; without cores; without the shared basis either; with a core in its place; and
# its plain SVD preset.
OURS = {
    "ours": [],
    "ours-no-core": ["compression.cores=0"],
    "ours-no-basis": ["compression.cores=0", "compression.input_basis=0"],
    "ours-core": ["compression=core"],
    "ours-svd": ["compression=svd"],
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "table"):
        command = commands.add_parser(
            name, help={"run": "measure cells", "table": "print the cells measured so far"}[name]
        )
        command.add_argument("--model", default="reference", help="reference, a test model's name or a checkpoint")
        command.add_argument("--corpus", type=Path, help="directory of {train,validation,test}.jsonl for a checkpoint")
        _protocol_arguments(command)
        command.add_argument("--markdown", type=Path, help="also write the table here")
        command.add_argument("--plot", type=Path, help="write a plot here (.png, .svg)")
        command.add_argument(
            "--docs",
            type=Path,
            help="this directory's quality/MODEL.jsonl holds cells that count as measured; put the new ones there too, "
            "and make of all the model's page, plot and table in QUALITY.md",
        )
        command.add_argument("--cache", type=Path, default=default_cache())
    run = commands.choices["run"]
    run.add_argument("--methods", nargs="+", default=[*OURS, *METHODS], help="default: all")
    run.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=OVERRIDES",
        help="the product with other settings, as one more method: NAME='compression.iterations=10 ...'",
    )
    run.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.25, 0.125])
    run.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    run.add_argument("--zero-shot", action="store_true", help="do not distil")
    run.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        default=list(Training.learning_rates),
        help="the grid: its middle two first, then outwards while the validation loss falls",
    )
    train = commands.add_parser("train", help="train a test model")
    train.add_argument("name", choices=sorted(RECIPES))
    train.add_argument("--steps", type=int, default=600)
    train.add_argument("--cache", type=Path, default=default_cache())
    commands.add_parser("methods", help="list the methods")
    options = parser.parse_args(arguments)
    console = Console()
    keep_freed_memory()
    try:
        if options.command == "methods":
            for method_name in (*OURS, *METHODS):
                console.print(method_name)
        elif options.command == "train":
            console.print(str(make_model(options.name, options.cache, options.steps, console)))
        else:
            _measure(options, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _protocol_arguments(command: argparse.ArgumentParser) -> None:
    defaults = Protocol()
    command.add_argument("--length", type=int, default=defaults.length)
    command.add_argument("--calibration-rows", type=int, default=defaults.calibration_rows)
    command.add_argument("--validation-rows", type=int, default=defaults.validation_rows)
    command.add_argument("--test-rows", type=int, default=defaults.test_rows)
    command.add_argument("--task-limit", type=int, default=defaults.task_limit, help="0: no lm_eval tasks")
    command.add_argument("--steps", type=int, default=Training.steps)
    command.add_argument("--batch-size", type=int, default=Training.batch_size)


def _measure(options: argparse.Namespace, console: Console) -> None:
    training = replace(Training(), steps=options.steps, batch_size=options.batch_size)
    protocol = Protocol(
        options.length,
        options.calibration_rows,
        options.validation_rows,
        options.test_rows,
        options.task_limit,
        training,
    )
    source = find_model(options.model, options.cache, options.corpus)
    record = read_record(record_file(options.docs, source.name)) if options.docs else []
    bench = Bench(source, protocol, options.cache, console, record)
    if options.command == "run":
        methods = _methods(options, bench)
        bench.reference()
        for ratio in options.ratios:
            for method in methods:
                _run_method(bench, method, ratio, options)
    settings = {name: method.settings for name, method in _known(bench).items()}
    cells = [cell for cell in bench.cells() if cell["settings"] == settings.get(cell["method"], cell["settings"])]
    own = [cell for cell in cells if cell["model"] == source.fingerprint]
    text = markdown(own)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if options.markdown:
        write_atomically(options.markdown, text)
    if options.plot:
        plot(own, options.plot)
    if options.docs:
        write_documents(options.docs, source.name, cells)


def _run_method(bench: Bench, method: Method, ratio: float, options: argparse.Namespace) -> None:
    """Search the learning rate with the first seed; the best rate with the others."""
    rates: tuple[float, ...] = () if options.zero_shot else tuple(sorted(options.learning_rates))
    first, *others = options.seeds
    if len(rates) > 1:
        losses: dict[float, float] = {}
        while pending := next_rates(rates, losses):
            bench.run(method, ratio, first, pending)
            for rate in pending:
                cell = bench.cached(method, ratio, first, rate) or {}
                if "error" in cell:
                    return
                losses[rate] = cell["validation"]["loss"]
        rates = (min(losses, key=losses.__getitem__),)
    for seed in (first, *others):
        bench.run(method, ratio, seed, rates)


def _known(bench: Bench) -> dict[str, Method]:
    """The methods by name; what a cache holds of one of them with other settings is no cell of it."""
    return {**METHODS, **{name: product(name, overrides, bench.source) for name, overrides in OURS.items()}}


def _methods(options: argparse.Namespace, bench: Bench) -> list[Method]:
    known = _known(bench)
    unknown = sorted(set(options.methods) - set(known))
    if unknown:
        raise UserError(f"no method {', '.join(unknown)}; choose from {', '.join(sorted(known))}")
    found = [known[name] for name in options.methods]
    for variant in options.variant:
        name, _, overrides = variant.partition("=")
        found.append(product(name, overrides.split(), bench.source))
    return found


if __name__ == "__main__":
    sys.exit(main())
