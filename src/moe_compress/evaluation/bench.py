"""`moe-compress bench`: how fast a model's MoE layers would be, or are, with a shared core, on this machine.

The layer is timed with random weights of the model's shapes, so that of a model that is not here only the
configuration is needed; the whole model is timed where its weights are at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig

from moe_compress.compression import mapping
from moe_compress.compression.ranks import header_choices
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.evaluation.layer_forms import (
    LayerLayout,
    fill_randomly,
    random_layer,
    random_student,
    same_bytes_layouts,
)
from moe_compress.evaluation.machine import choose_device, describe_machine
from moe_compress.evaluation.model_speed import model_speed
from moe_compress.evaluation.speed import TOKENS, layer_speed
from moe_compress.evaluation.speed_tables import Grid, break_even_lines, layer_grid, model_grid, write_speed
from moe_compress.evaluation.variants import OURS
from moe_compress.factorization import Form
from moe_compress.modeling import (
    ExpertsModule,
    experts_per_token,
    find_experts,
    fold_in_memory,
    load_model,
    resolve_model_path,
)
from moe_compress.modeling.config import QUANT_METHOD
from moe_compress.modeling.cpu_kernel import multiplied_type
from moe_compress.modeling.experts import SharedCoreExperts
from moe_compress.modeling.tensors import form_of, make_layout


def bench_model(config: Config, output: Path | None = None) -> dict[str, Any]:
    """Time `model.name` against its compressed form, print the tables, and return their figures.

    An original model is compared with random factors at the ranks of the settings; a compressed checkpoint with the
    original of its shapes, and as a whole with the teacher that the settings (or its run) name. Of a quantized original
    (fp8, mxfp4) the layers alone are timed, unquantized.

    Args:
        config: the settings.
        output: a directory for `speed.json` and `speed.md`.

    Raises:
        UserError: no such model, a dense model, or a budget that cannot be reached.
    """
    console = Console()
    device = choose_device(config)
    model_config = load_config(config)
    quantization = getattr(model_config, "quantization_config", None) or {}
    layouts = quantization["layers"] if quantization.get("quant_method") == QUANT_METHOD else None
    dtype = _dtype(config, model_config)
    found = describe_conditions(dtype, device)
    found["layers"] = bench_layers(model_config, layouts, config, dtype, device)
    grids: list[Grid] = []
    for layer in found["layers"]:
        grids.append(layer_grid(layer, found))
        console.print(grids[-1].rich())
        console.print("\n".join(break_even_lines(layer)), highlight=False)
    compressed = layouts is not None
    models = _whole_models(config, compressed=compressed, device=device) if compressed or not quantization else None
    if models is None:
        console.print(
            "The whole model is not timed: its weights (or a compressed one's teacher's) are not here or are quantized."
        )
    else:
        found["model"] = model_speed(*models, seed=config.seed)
        grids.append(model_grid(found["model"], found))
        console.print(grids[-1].rich())
    if output is not None:
        write_speed(output, found, grids)
    return found


def describe_conditions(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What a measurement of speed was made with; `cpu_kernel` is whether it could run."""
    return {
        "machine": describe_machine(),
        "device": str(device),
        "dtype": str(dtype)[6:],
        "cpu_kernel": device.type == "cpu" and multiplied_type(dtype) is not None,
    }


def bench_layers(
    model_config: Any,
    layouts: Mapping[str, LayerLayout] | None,
    config: Config,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tokens: Sequence[int] = TOKENS,
    seconds: float = 2.0,
) -> list[dict[str, Any]]:
    """Time one layer of each kind (shapes and ranks) that a model has, beside other forms of the same bytes.

    Args:
        model_config: a Transformers configuration; only shapes are taken from it.
        layouts: the layouts of a compressed checkpoint by module name; None plans them from `config.compression`.
        config: the settings.
        dtype, device: what to time in, and where.
        tokens, seconds: see `layer_speed`.

    Returns:
        A dict per kind: `module` (the first of its kind), `count`, and what `time_layer` gives.
    """
    model = meta_model(model_config, trust_remote_code=config.model.trust_remote_code)
    experts = find_experts(model)
    planned = layouts or plan_layouts(experts, config, dtype)
    kinds: dict[str, list[ExpertsModule]] = {}
    for facts in experts:
        layout = planned[facts.name]
        ranks = [own["delta_rank"] for own in layout.values()]
        kind = repr((facts.projections, forms_of(layout), ranks, experts_per_token(model, facts.name)))
        kinds.setdefault(kind, []).append(facts)
    results = []
    for same in kinds.values():
        facts = same[0]
        top_k = experts_per_token(model, facts.name)
        ours = SharedCoreExperts(facts.module, planned[facts.name])
        rivals = {name: own for name, own in same_bytes_layouts(ours).items() if forms_of(own) != forms_of(ours.layout)}
        timed = time_layer(
            facts, {OURS: planned[facts.name], **rivals}, dtype, device,
            top_k=top_k, tokens=tokens, seconds=seconds, seed=config.seed,
        )  # fmt: skip
        results.append({"module": facts.name, "count": len(same), **timed})
    return results


def time_layer(
    experts: ExpertsModule,
    layouts: Mapping[str, LayerLayout],
    dtype: torch.dtype,
    device: torch.device,
    *,
    top_k: int,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Time a layer with random values, original and in each of the given layouts.

    Args:
        experts: a module on any device; it is left on the meta device.
        layouts: by name of the variant.
        settings: of `layer_speed`.

    Returns:
        `experts`, `top_k`, `hidden_size`, `intermediate_size`; by variant `layouts` and `kept`, the share of the bytes;
        `rows` as `layer_speed` gives them.
    """
    original = experts.module.to_empty(device=device).to(dtype).eval()
    fill_randomly(original, seed)
    layers = {name: random_layer(original, layout, seed) for name, layout in layouts.items()}
    found = {
        "experts": experts.num_experts,
        "top_k": top_k,
        "hidden_size": experts.hidden_size,
        "intermediate_size": experts.intermediate_size,
        "kept": {name: _bytes(layer) / _bytes(original) for name, layer in layers.items()},
        "layouts": {name: layer.layout for name, layer in layers.items()},
        "rows": layer_speed(original, layers, top_k=top_k, seed=seed, roofline=True, **settings),
    }
    original.to_empty(device="meta")
    return found


def plan_layouts(experts: list[ExpertsModule], config: Config, dtype: torch.dtype) -> dict[str, LayerLayout]:
    """The ranks that the settings give, by module name and projection."""
    shapes = {(facts.name, name): shape for facts in experts for name, shape in facts.projections.items()}
    layouts: dict[str, LayerLayout] = {}
    for (module, projection), choice in header_choices(
        shapes, config, bytes_per_value=dtype.itemsize, original_bytes_per_value=dtype.itemsize
    ).items():
        cores, experts_of = choice.form.cores, shapes[module, projection][0]
        groups = [expert % cores for expert in range(experts_of)] if cores > 1 else None
        layouts.setdefault(module, {})[projection] = make_layout(choice.form, choice.delta_rank, groups)
    return layouts


def forms_of(layout: LayerLayout) -> dict[str, Form]:
    """What each projection of a layer is, but for its rank."""
    return {name: form_of(own) for name, own in layout.items()}


def load_config(config: Config) -> Any:
    """The configuration of `model.name`, without its weights.

    Raises:
        UserError: there is none.
    """
    name, revision = config.model.name, config.model.revision
    path = resolve_model_path(name) if is_local(name) else name
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name} has no configuration that can be loaded: {' '.join(str(error).split())}") from error


def is_local(name: str) -> bool:
    """Whether a model needs no download."""
    return name == "reference" or Path(name).is_dir()


def _whole_models(config: Config, *, compressed: bool, device: torch.device) -> tuple[Any, dict[str, Any]] | None:
    """The original model and its compressed forms, or None when the weights are not at hand."""

    def load(name: str) -> Any:
        trust = config.model.trust_remote_code
        return load_model(name, dtype=config.model.dtype, device=device, trust_remote_code=trust).eval()

    if not is_local(config.model.name):
        return None
    if compressed:
        teacher = config.distillation.teacher.model_path or _teacher_of(Path(config.model.name))
        return (load(teacher), {OURS: fold_in_memory(load(config.model.name))}) if teacher else None
    original = load(config.model.name)
    layouts = plan_layouts(find_experts(original), config, original.dtype)
    return original, {OURS: random_student(original, layouts, config.seed)}


def _teacher_of(checkpoint: Path) -> str | None:
    """The original model of a checkpoint that lies in its run directory."""
    settings_file = checkpoint.resolve().parent.parent / "config.yaml"
    if not settings_file.is_file():
        return None
    from moe_compress.settings import read

    config = read(settings_file)
    return config.distillation.teacher.model_path or config.model.name


def meta_model(model_config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model of a (compressed or quantized model's) configuration in its original form, without values.

    Raises:
        UserError: Transformers has no causal language model for it.
    """
    plain = copy.deepcopy(model_config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return mapping.meta_model(plain, trust_remote_code=trust_remote_code)


def _dtype(config: Config, model_config: Any) -> torch.dtype:
    name = config.model.dtype
    dtype = model_config.get_text_config().dtype if name == "auto" else getattr(torch, name, None)
    if name != "auto" and not isinstance(dtype, torch.dtype):
        raise UserError(f"model.dtype={name} is not a type; use auto, bfloat16, float16 or float32")
    return dtype or torch.float32


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
