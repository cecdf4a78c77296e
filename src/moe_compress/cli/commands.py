"""What each command does with its arguments: the stages of a run, and the commands beside them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from moe_compress import settings
from moe_compress.cli import pages
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.run import Run, open_run, run_path
from moe_compress.stages import STAGES
from moe_compress.torchrun import rank


@dataclass(frozen=True)
class Command:
    """One command: its action, and what its help shows.

    Attributes:
        summary: one line.
        action: called with the parsed arguments.
        flags: names of its flags, of those in `_FLAGS`.
        reads: whether a setting is listed in its help.
        usage: arguments in the usage line.
    """

    summary: str
    action: Callable[[argparse.Namespace], None]
    flags: tuple[str, ...] = ("--config",)
    reads: Callable[[str], bool] = field(default=lambda key: False)
    usage: str = "[key=value ...]"


_FLAGS: dict[str, dict[str, Any]] = {
    "--config": {
        "metavar": "FILE",
        "type": Path,
        "help": "YAML file of settings, such as another run's config.yaml; key=value arguments win over it",
    },
    "--once": {"action": "store_true", "help": "evaluate the checkpoints that are there and end"},
    "--dense": {
        "metavar": "OUT",
        "type": Path,
        "help": "directory to write a checkpoint of the original architecture to (it saves no memory)",
    },
    "--output": {
        "metavar": "DIR",
        "type": Path,
        "help": "directory for the result (default: inspection, reference-model, evaluation, comparison; bench: none)",
    },
    "--sequences": {
        "metavar": "N",
        "type": int,
        "default": 8,
        "help": "sequences on which `cache verify` asks the teacher again (default 8; 0 checks the files alone)",
    },
    "--json": {"action": "store_true", "help": "print one JSON object instead of tables"},
    "--vs": {"metavar": "TEACHER", "help": "the original to compare models with: 'reference', a directory or a hub id"},
    "--yaml": {"action": "store_true", "help": "print the settings as they would be frozen in config.yaml"},
}


class _Parser(argparse.ArgumentParser):
    """Reports a mistake like every other mistake of the user."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see: {self.prog} --help")


def dispatch(arguments: Sequence[str]) -> None:
    """Run the command that the arguments name, or print help.

    Raises:
        UserError: no such command, or whatever the command finds wrong.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(pages.overview({name: command.summary for name, command in COMMANDS.items()}))
        return
    if arguments[0] == "--version":
        from moe_compress import __version__

        print(f"moe-compress {__version__}")
        return
    name, rest = arguments[0], list(arguments[1:])
    if name not in COMMANDS:
        raise UserError(
            f"unknown command '{name}'{settings.suggestion(name, tuple(COMMANDS))}; see moe-compress --help"
        )
    command = COMMANDS[name]
    if "-h" in rest or "--help" in rest:
        given = [argument for argument in rest if "=" in argument and not argument.startswith("-")]
        page = pages.Page(name, command.usage, command.summary)
        flags = [(flag, _FLAGS[flag].get("metavar"), _FLAGS[flag]["help"]) for flag in command.flags]
        print(pages.command(page, flags, settings.compose(given), command.reads))
        return
    parser = _Parser(prog=f"moe-compress {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("settings", nargs="*")
    for flag in command.flags:
        parser.add_argument(flag, **_FLAGS[flag])
    command.action(parser.parse_intermixed_args(rest))


def _stage(name: str) -> Callable[[argparse.Namespace], None]:
    def action(options: argparse.Namespace) -> None:
        try:
            run = open_run(name, options.settings, file=options.config)
        except UserError:
            if rank() != 0:  # rank 0 says it
                raise SystemExit(2) from None
            raise
        extra = {"once": True} if getattr(options, "once", False) else {}
        try:
            if STAGES[name].reads_key("gpu_ids"):
                _use_gpus(run.config)
            STAGES[name].load()(run, **extra)
        except BaseException:
            run.discard_if_untouched()
            raise

    return action


def _evaluate(options: argparse.Namespace) -> None:
    models = _taken_names(options)
    if not models:
        if options.vs or options.output:
            raise UserError("--vs and --output are for models: moe-compress evaluate MODEL ... --vs TEACHER")
        _stage("evaluate")(options)
        return
    config = _composed(options)
    output = _directory(options.output or Path("evaluation"))
    _use_gpus(config)
    from moe_compress.report import compare_models

    compare_models(models, config, output, teacher=options.vs)


def _report(options: argparse.Namespace) -> None:
    runs = _taken_names(options)
    if len(runs) < 2:
        if options.output:
            raise UserError("--output is for a comparison of several runs; the report of one goes into its directory")
        if runs and any(setting.startswith("run=") for setting in options.settings):
            raise UserError("a run is named and given as run= as well; name each alone: moe-compress report RUN ...")
        options.settings += [f"run={run}" for run in runs]
        _stage("report")(options)
        return
    if options.settings or options.config:
        raise UserError("a comparison takes no settings: moe-compress report RUN_A RUN_B ... [--output DIR]")
    output = _directory(options.output or Path("comparison"))
    from moe_compress.report import compare_runs

    compare_runs([Path(run) for run in runs], output)


def _inspect(options: argparse.Namespace) -> None:
    _name_model(options)
    config = _composed(options)
    _use_gpus(config)
    from moe_compress.compression.inspect import inspect

    inspect(config, options.output or Path("inspection"))


def _plan(options: argparse.Namespace) -> None:
    _name_model(options)
    config = _composed(options)
    from moe_compress.compression import plan

    plan(config)


def _bench(options: argparse.Namespace) -> None:
    _name_model(options)
    config = _composed(options)
    output = _directory(options.output) if options.output else None
    _use_gpus(config)
    from moe_compress.evaluation import bench_model

    bench_model(config, output)


def _export(options: argparse.Namespace) -> None:
    if options.dense is None:
        raise UserError("export needs --dense OUT, the directory to write; see: moe-compress export --help")
    if options.dense.exists():
        raise UserError(f"{options.dense} exists already; choose another directory for --dense")
    chosen, assignments = settings.parse_overrides(options.settings)
    keys = {assignment.key for assignment in assignments} | set(chosen)
    config = settings.compose(options.settings, file=options.config)
    if config.run is not None:
        run = Run.open(config.run)
        source: Path | str = run.student()
        trust = run.config.model.trust_remote_code or config.model.trust_remote_code
    elif keys & {"model", "model.name"}:
        source, trust = config.model.name, config.model.trust_remote_code
    else:
        raise UserError("export needs run=RUN (its best checkpoint) or model=DIR (a compressed checkpoint)")
    _directory(options.dense.parent)
    _use_gpus(config)
    from moe_compress.modeling import export_dense

    export_dense(source, options.dense, trust_remote_code=trust)
    print(f"{options.dense}: dense checkpoint of {source} (the original architecture: it saves no memory)")


def _reference(options: argparse.Namespace) -> None:
    if options.settings != ["train"]:
        raise UserError("the one thing to do is: moe-compress reference train [--output DIR]")
    output = options.output or Path("reference-model")
    if output.exists():
        raise UserError(f"{output} exists already; choose another directory with --output")
    from moe_compress.reference.recipe import train_reference

    print(f"the reference MoE is in {train_reference(output)}")


def _settings(options: argparse.Namespace) -> None:
    prefixes = _taken_names(options)
    config = _composed(options)
    if options.yaml:
        print(settings.to_yaml(config), end="")
        return
    for prefix in prefixes:
        settings.lookup(prefix)

    def wanted(key: str) -> bool:
        return not prefixes or any(key == prefix or key.startswith((f"{prefix}.", f"{prefix}[")) for prefix in prefixes)

    if not prefixes:
        print(pages.preset_list() + "\n")
    print(pages.setting_list(config, wanted))


def _cache(options: argparse.Namespace) -> None:
    action, *rest = options.settings or [""]
    if action not in ("info", "verify") or options.sequences < 0:
        raise UserError("cache needs `info` or `verify`, and a directory or run=RUN; see: moe-compress cache --help")
    named = Path(rest.pop(0)) if rest and "=" not in rest[0] else None
    options.settings = rest
    config = _composed(options)
    if named is None and config.run is None:
        raise UserError(f"cache {action} needs a cache directory, or run=RUN")
    directory = named or Run(run_path(config), config).teacher_logits_dir
    if action == "verify":
        _use_gpus(config)
    from moe_compress.distillation import verify

    if action == "info":
        verify.show_cache(directory, as_json=options.json)
        return
    if config.run is None:
        chosen, assignments = settings.parse_overrides(rest)
        verify.teacher_as_recorded(config, directory, given={*chosen, *(assignment.key for assignment in assignments)})
    verify.verify_cache(directory, config, sequences=options.sequences, as_json=options.json)


def _name_model(options: argparse.Namespace) -> None:
    """Take a first argument that is no key=value for the model: `plan MODEL` is `plan model=MODEL`."""
    first = options.settings[0] if options.settings else ""
    if first and "=" not in first and not first.startswith("~"):
        options.settings[0] = f"model={first}"


def _taken_names(options: argparse.Namespace) -> list[str]:
    """Take the arguments that are no settings, such as names of models or runs, out of the settings."""
    names = [argument for argument in options.settings if "=" not in argument and not argument.startswith("~")]
    options.settings = [argument for argument in options.settings if argument not in names]
    return names


def _composed(options: argparse.Namespace) -> Config:
    """The settings of a command that writes no run; with run=RUN, those of the run, changed at will.

    Raises:
        UserError: see `settings.compose`, or there is no such run.
    """
    fresh = settings.compose(options.settings, file=options.config)
    if fresh.run is None:
        return fresh
    return settings.compose(options.settings, base=Run.open(fresh.run).config, file=options.config)


def _directory(path: Path) -> Path:
    """Make the directory of a result before the work, which would be lost if that failed only at its end."""
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise UserError(f"{path} cannot be written to; choose another directory")
    return path


def _use_gpus(config: Config) -> None:
    """Show this process the GPUs of `gpu_ids` alone; must come before torch is imported.

    Raises:
        UserError: one of them does not exist, for which CUDA would only show fewer, and the CPU take their place.
    """
    if not config.gpu_ids:
        return
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, config.gpu_ids))
    import torch

    if torch.cuda.device_count() < len(config.gpu_ids):
        raise UserError(f"gpu_ids={config.gpu_ids} names GPUs that are not here; give others, or gpu_ids=[] for all")


COMMANDS: dict[str, Command] = {
    "plan": Command(
        "show ranks, bytes and parameters of a compression without doing it",
        _plan,
        reads=STAGES["compress"].reads_key,
        usage="[MODEL] [key=value ...]",
    ),
    "inspect": Command(
        "measure what the experts of a model have to share: table, plots, JSON",
        _inspect,
        flags=("--output", "--config"),
        reads=lambda key: (
            key in ("gpu_ids", "seed", "compression.device") or key.startswith(("model.", "compression.calibration."))
        ),
        usage="[MODEL] [--output DIR] [key=value ...]",
    ),
    **{
        name: Command(
            stage.summary,
            _stage(name),
            flags=("--config", "--once") if name == "watch" else ("--config",),
            reads=stage.reads_key,
            usage="run=RUN [key=value ...]",
        )
        for name, stage in STAGES.items()
    },
    "evaluate": Command(
        STAGES["evaluate"].summary,
        _evaluate,
        flags=("--vs", "--output", "--config"),
        reads=STAGES["evaluate"].reads_key,
        usage="run=RUN [key=value ...] | MODEL ... [--vs TEACHER] [--output DIR] [key=value ...]",
    ),
    "report": Command(
        STAGES["report"].summary,
        _report,
        flags=("--output", "--config"),
        reads=STAGES["report"].reads_key,
        usage="RUN | RUN_A RUN_B ... [--output DIR]",
    ),
    "export": Command(
        "write a compressed checkpoint as a dense one of the original architecture",
        _export,
        flags=("--dense", "--config"),
        reads=lambda key: key in ("run", "model.name"),
        usage="run=RUN | model=DIR --dense OUT",
    ),
    "bench": Command(
        "time one MoE layer and generation, original against compressed",
        _bench,
        flags=("--output", "--config"),
        usage="[MODEL] [--output DIR] [key=value ...]",
        reads=lambda key: (
            key in ("run", "gpu_ids", "seed") or key.startswith(("model.", "compression.", "evaluation."))
        ),
    ),
    "cache": Command(
        "say what a teacher cache holds; check its files, and some sequences against the teacher",
        _cache,
        flags=("--json", "--sequences", "--config"),
        reads=lambda key: (
            key in ("run", "gpu_ids")
            or (key.startswith(("model.", "distillation.teacher.")) and "generation" not in key)
        ),
        usage="info|verify run=RUN | DIR [--json]",
    ),
    "reference": Command(
        "train the reference MoE that ships with the package", _reference, flags=("--output",), usage="train"
    ),
    "settings": Command(
        "list settings with their values and documentation",
        _settings,
        flags=("--yaml", "--config"),
        usage="[PREFIX] [key=value ...]",
    ),
}
