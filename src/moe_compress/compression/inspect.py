"""What a model's experts have to share, measured before any compression: `moe-compress inspect`.

Per layer and projection: the share of the energy (squared norm) in the mean of the experts before and after their
neurons are aligned, the spectrum of what the mean leaves, and the error at equal bytes with and without a shared core.
With calibration, also how the router divides tokens among the experts. One MoE layer is in memory at a time, for the
routing the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from moe_compress.compression.allocate import aligned
from moe_compress.compression.inspect_views import print_inspection, write_plots
from moe_compress.compression.layer import layer_input
from moe_compress.compression.pipeline import fit_device
from moe_compress.compression.source import SourceModel, open_model
from moe_compress.config import Config
from moe_compress.data import packed_dataset
from moe_compress.errors import UserError
from moe_compress.factorization import error_curve
from moe_compress.factorization.budget import Shape
from moe_compress.files import directory_in_progress, write_json
from moe_compress.modeling import find_experts, load_model, load_tokenizer

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)


def inspect(config: Config, output: Path) -> dict[str, Any]:
    """Measure a model, print a table, and write `inspection.json` and plots into the new directory `output`.

    Returns:
        What `inspection.json` holds, see `measure`.

    Raises:
        UserError: the output exists; the model cannot be compressed.
    """
    if output.exists():
        raise UserError(f"{output} exists already; choose another directory with --output")
    console = Console()
    source = open_model(config.model)
    with directory_in_progress(output) as directory:
        facts = measure(source, config, console)
        write_json(directory / "inspection.json", facts)
        write_plots(facts, directory)
    print_inspection(facts, console)
    console.print(f"Plots and inspection.json are in {output}", highlight=False, soft_wrap=True)
    return facts


def measure(source: SourceModel, config: Config, console: Console) -> dict[str, Any]:
    """All measures of a model.

    Returns:
        `model`, `architecture` and `layers`: by module name, `projections` (by name, see `measure_layer`) and `load`
        (tokens per expert, None without calibration).
    """
    device = fit_device(config)
    loads = routing_load(source, config, device, console) if config.compression.calibration.enabled else {}
    layers = {}
    for layer in track(source.map.layers, "inspecting layers", console=console):
        given = layer_input(layer.experts, source.map.load(source.checkpoint, layer))
        weights = {name: weight.to(device) for name, weight in given.weights.items()}
        layers[layer.name] = {
            "projections": measure_layer(weights, interleaved=given.interleaved),
            "load": loads.get(layer.name),
        }
    return {"model": config.model.name, "architecture": type(source.map.model).__name__, "layers": layers}


def measure_layer(weights: dict[str, Tensor], *, interleaved: bool) -> dict[str, dict[str, Any]]:
    """What the experts of one layer share.

    Args:
        weights: `gate_up_proj` (or `up_proj`), then `down_proj`, each [E, out, in].
        interleaved: layout of the rows of gate_up, see `align_neurons`.

    Returns:
        By projection: `shape`; `core_energy_before` and `core_energy_after`, the share of the squared norm in the mean
        of the experts, before and after alignment (1 / E for experts that have nothing in common); `residual_energy`,
        delta rank to the share of the norm of what the (aligned) mean leaves that deltas of this rank hold; and
        `error_with_core`, `error_without_core`: share of the bytes kept to the relative squared error that is left, or
        None where it cannot be reached.
    """
    after = aligned(weights, interleaved=interleaved)
    found = {}
    for name, weight in weights.items():
        experts, rows, columns = weight.shape
        shape = (experts, rows, columns)
        with_core = error_curve(after[name], cores=1)
        without_core = error_curve(weight, cores=0)  # the order of the neurons changes nothing here
        ranks = _powers_of_two(min(rows, columns))
        rest = max(float(with_core[0]), torch.finfo(torch.float32).tiny)
        found[name] = {
            "shape": list(shape),
            "core_energy_before": 1 - float(error_curve(weight, cores=1)[0]),
            "core_energy_after": 1 - float(with_core[0]),
            "residual_energy": {str(rank): 1 - float(with_core[rank]) / rest for rank in ranks},
            "error_with_core": {str(r): error_at(with_core, shape, r, cores=1) for r in RATIOS},
            "error_without_core": {str(r): error_at(without_core, shape, r, cores=0) for r in RATIOS},
        }
    return found


def error_at(curve: Tensor, shape: Shape, ratio: float, *, cores: int) -> float | None:
    """The error of a curve (see `error_curve`) at the largest rank that keeps at most a share of the bytes."""
    experts, rows, columns = shape
    rank = math.floor((ratio * experts - cores) * rows * columns / (experts * (rows + columns)) + 1e-9)
    return float(curve[rank]) if 0 < rank < len(curve) else None


def routing_load(source: SourceModel, config: Config, device: torch.device, console: Console) -> dict[str, list[int]]:
    """Run the calibration text through the model and count the tokens that are routed to each expert.

    Returns:
        Module name to tokens per expert [E].
    """
    settings = config.compression.calibration
    tokenizer = load_tokenizer(str(source.path), trust_remote_code=config.model.trust_remote_code)
    rows = torch.tensor(packed_dataset(settings.dataset, tokenizer, config.seed)["input_ids"])
    model = load_model(
        str(source.path),
        dtype=config.model.dtype,
        trust_remote_code=config.model.trust_remote_code,
        device=str(device),
    ).eval()
    counts: dict[str, Tensor] = {}
    handles = []
    for found in find_experts(model):
        counts[found.name] = torch.zeros(found.num_experts, dtype=torch.int64)
        handles.append(
            found.module.register_forward_pre_hook(_counter(counts[found.name], found.num_experts), with_kwargs=True)
        )
    try:
        with torch.inference_mode():
            for batch in track(rows.split(settings.batch_size), "counting routed tokens", console=console):
                model.base_model(input_ids=batch.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: count.tolist() for name, count in counts.items()}


def _counter(counts: Tensor, experts: int) -> Callable[..., None]:
    """A hook before the experts' forward(hidden_states, top_k_index, top_k_weights); index E is padding."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        counts.add_(torch.bincount(index.reshape(-1).cpu(), minlength=experts + 1)[:experts])

    return hook


def _powers_of_two(limit: int) -> list[int]:
    return [*(2**power for power in range(limit.bit_length()) if 2**power < limit), limit]
