"""What a compression will do, computed from headers alone: ranks, bytes, parameters, arithmetic, memory and disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from moe_compress.compression.collect import gram_bytes
from moe_compress.compression.footprint import disk_needed, peak_stages
from moe_compress.compression.mapping import MoeLayer
from moe_compress.compression.ranks import Choices, choose, is_measured, shapes_of, stored_dtype
from moe_compress.compression.source import SourceModel, open_model
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.factorization import Form, check_rank, projection_bytes
from moe_compress.factorization.budget import Shape, active_values, break_even
from moe_compress.modeling import experts_per_token


@dataclass(frozen=True)
class ProjectionPlan:
    """One projection of one MoE layer: what it is and what it becomes."""

    name: str
    experts: int
    rows: int  # out
    columns: int  # in
    delta_rank: int
    form: Form
    dtype: str  # of the stored factors
    bytes_before: int
    bytes_after: int

    @property
    def shape(self) -> Shape:
        return self.experts, self.rows, self.columns

    @property
    def parameters_before(self) -> int:
        return self.experts * self.rows * self.columns

    @property
    def parameters_after(self) -> int:
        return self.form.cost(self.shape, self.delta_rank)

    def active_before(self, top_k: int) -> int:
        """Parameters used for one token."""
        return top_k * self.rows * self.columns

    def active_after(self, top_k: int) -> int:
        """Parameters used for one token: what the experts share, and the deltas of those that it is routed to."""
        return sum(active_values(self.shape, self.form, self.delta_rank, top_k))


@dataclass(frozen=True)
class LayerPlan:
    """One MoE layer."""

    name: str
    top_k: int  # experts per token
    projections: list[ProjectionPlan]
    bias_values: int
    bias_bytes_before: int
    bias_bytes_after: int
    gram_bytes: int

    @property
    def bytes_before(self) -> int:
        return self.bias_bytes_before + sum(projection.bytes_before for projection in self.projections)

    @property
    def bytes_after(self) -> int:
        return self.bias_bytes_after + sum(projection.bytes_after for projection in self.projections)

    @property
    def arithmetic(self) -> float:
        """Multiply-adds of the experts for one token, as a share of those before; above 1 the layer may be slower."""
        before = sum(projection.active_before(self.top_k) for projection in self.projections)
        return sum(projection.active_after(self.top_k) for projection in self.projections) / before

    @property
    def faster_below(self) -> dict[str, int]:
        """The delta ranks up to which the layer needs fewer multiply-adds than before; 0 if none is low enough."""
        sizes = [(p.shape, p.form, p.delta_rank) for p in self.projections]
        scale = break_even(sizes, self.top_k, speedup=1 / self.arithmetic)
        return {projection.name: int(scale * projection.delta_rank) for projection in self.projections}

    @property
    def active_bias(self) -> int:
        """Bias values used for one token."""
        return self.top_k * self.bias_values // self.projections[0].experts


@dataclass(frozen=True)
class Size:
    """A model's size. Parameters count tied ones once; bytes are those of the tensors in the checkpoint."""

    bytes: int
    expert_bytes: int
    parameters: int
    expert_parameters: int
    active_parameters: int
    flops_per_token: int  # multiply-adds times two, of all matrices; attention over the context comes on top


@dataclass(frozen=True)
class Plan:
    """The plan of a compression.

    Attributes:
        unused: tensors of the source that the model does not load; they are copied as they are.
        peak_bytes: expected peak of main memory of one process, in the stage `peak_stage`.
        disk_bytes: disk needed while it runs: the compressed checkpoint and what the calibration keeps.
        provisional: settings that leave something to be chosen by `compress`, within the same bytes; until then ranks,
            cores and bases stand for others.
    """

    model: str
    path: str
    architecture: str
    parameterization: str
    calibrated: bool
    layers: list[LayerPlan]
    unused: list[str]
    before: Size
    after: Size
    peak_bytes: int
    disk_bytes: int
    peak_stage: str = field(default="fit")
    provisional: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Share of the bytes of the projections that is kept (biases, which are never compressed, do not count)."""
        before = sum(projection.bytes_before for layer in self.layers for projection in layer.projections)
        after = sum(projection.bytes_after for layer in self.layers for projection in layer.projections)
        return after / before

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-serializable facts."""
        return {**asdict(self), "ratio": self.ratio}


def plan(config: Config) -> Plan:
    """Plan a compression from the headers of the checkpoint, check that it makes sense, and print it.

    Of a model on the hub, headers and small files are downloaded.

    Raises:
        UserError: the model cannot be compressed, or not with these settings.
    """
    from moe_compress.compression.plan_table import print_plan

    with TemporaryDirectory() as directory:
        result = make_plan(open_model(config.model, Path(directory)), config)
    if result.path == directory:
        result = replace(result, path=config.model.name)
    check_plan(result)
    print_plan(result)
    return result


def make_plan(source: SourceModel, config: Config, choices: Choices | None = None) -> Plan:
    """Count everything. Nothing is checked for sense: see `check_plan`.

    Args:
        choices: what each (module name, projection) becomes; None takes what headers tell, see `choose`.
    """
    settings = config.compression
    provisional = []
    if choices is None:
        choices = choose(source.map.layers, config)
        provisional = is_measured(settings, shapes_of(source.map.layers))
    layers = [_layer_plan(layer, source, config, choices) for layer in source.map.layers]
    model = source.map.model
    embeddings = _embedding_parameters(model)
    others = _non_expert_parameters(model, source.map.layers)
    passthrough = sum(source.checkpoint[name].nbytes for name in source.map.passthrough)

    def size(
        expert_bytes: int, count: Callable[[ProjectionPlan], int], active: Callable[[ProjectionPlan, int], int]
    ) -> Size:
        expert_parameters = sum(
            layer.bias_values + sum(count(projection) for projection in layer.projections) for layer in layers
        )
        active_experts = sum(
            layer.active_bias + sum(active(projection, layer.top_k) for projection in layer.projections)
            for layer in layers
        )
        return Size(
            bytes=passthrough + expert_bytes,
            expert_bytes=expert_bytes,
            parameters=others + expert_parameters,
            expert_parameters=expert_parameters,
            active_parameters=others + active_experts,
            flops_per_token=2 * (others - embeddings + active_experts),
        )

    before = size(
        sum(layer.bytes_before for layer in layers), lambda p: p.parameters_before, ProjectionPlan.active_before
    )
    after = size(sum(layer.bytes_after for layer in layers), lambda p: p.parameters_after, ProjectionPlan.active_after)
    peaks = peak_stages(source, config, layers)
    stage = max(peaks, key=peaks.__getitem__)
    return Plan(
        model=config.model.name,
        path=str(source.path),
        architecture=type(model).__name__,
        parameterization=settings.parameterization,
        calibrated=settings.calibration.enabled,
        layers=layers,
        unused=source.map.unused,
        before=before,
        after=after,
        peak_bytes=peaks[stage],
        disk_bytes=disk_needed(source, config, layers, after.bytes),
        peak_stage=stage,
        provisional=tuple(provisional),
    )


def check_plan(plan: Plan) -> None:
    """Refuse a plan that makes no sense.

    Raises:
        UserError: a rank above the dimensions, a delta that saves nothing, a wrapper without a core or with a basis.
    """
    for layer in plan.layers:
        for projection in layer.projections:
            if plan.parameterization == "wrapper" and (projection.form.cores == 0 or projection.form.basis):
                raise UserError(
                    "compression.parameterization=wrapper needs a core and no shared basis; "
                    "set compression.cores=1 and compression.input_basis=0, or parameterization=delta"
                )
            check_rank(
                f"{layer.name}.{projection.name}",
                projection.shape,
                projection.delta_rank,
                form=projection.form,
                parameterization=plan.parameterization,
            )


def check_disk(plan: Plan, directory: Path, kept: Sequence[Path] = ()) -> None:
    """Refuse to begin when the disk of `directory` cannot hold the result; what is below `kept` is there already.

    Raises:
        UserError: not enough free space.
    """
    place = directory
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    existing = sum(file.stat().st_size for part in kept for file in part.rglob("*") if file.is_file())
    needed = plan.disk_bytes - existing
    if needed > free:
        raise UserError(
            f"the disk of {directory} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed; "
            "free some or set output.base_dir to another disk"
        )


def _layer_plan(layer: MoeLayer, source: SourceModel, config: Config, choices: Choices) -> LayerPlan:
    projections = []
    bias_values = bias_before = bias_after = 0
    for name, shape in layer.experts.projections.items():
        dtype = stored_dtype(layer, name, config)
        choice = choices[layer.name, name]
        experts, rows, columns = shape
        projections.append(
            ProjectionPlan(
                name=name,
                experts=experts,
                rows=rows,
                columns=columns,
                delta_rank=choice.delta_rank,
                form=choice.form,
                dtype=str(dtype).removeprefix("torch."),
                bytes_before=experts * rows * columns * layer.dtypes[name].itemsize,
                bytes_after=projection_bytes(shape, choice.delta_rank, choice.form, dtype.itemsize),
            )
        )
        bias = f"{name}_bias"
        if bias in layer.dtypes:
            bias_values += experts * rows
            bias_before += experts * rows * layer.dtypes[bias].itemsize
            bias_after += experts * rows * stored_dtype(layer, bias, config).itemsize
    return LayerPlan(
        name=layer.name,
        top_k=experts_per_token(source.map.model, layer.name),
        projections=projections,
        bias_values=bias_values,
        bias_bytes_before=bias_before,
        bias_bytes_after=bias_after,
        gram_bytes=gram_bytes(layer.experts, fisher=config.compression.calibration.fisher),
    )


def _non_expert_parameters(model: nn.Module, layers: list[MoeLayer]) -> int:
    """Number of parameters outside the experts, each tied one counted once."""
    inside = {id(parameter) for layer in layers for parameter in layer.experts.module.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)


def _embedding_parameters(model: Any) -> int:
    """Parameters of the input embedding that are only looked up, not multiplied with (0 when tied to the head)."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or (head is not None and head.weight is embedding.weight):
        return 0
    return int(embedding.weight.numel())
