"""`SharedCoreConfig`: the `quantization_config` of a compressed model in its config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_compress.errors import UserError
from moe_compress.modeling.tensors import Layout, Parameterization

QUANT_METHOD = "shared_core"
FORMAT_VERSION = 2  # 1 had one core per projection at most, and kept deltas as [E, out, R] and [E, R, in]


@dataclass
class SharedCoreConfig(QuantizationConfigMixin):
    """What replaces the experts of each MoE layer.

    Attributes:
        layers: for each experts module, by its name in the Transformers model, and each of its projections
            (`gate_up_proj` or `up_proj`, and `down_proj`): `delta_rank`, the inner size R of the folded delta
            (twice the rank of a wrapper's side), and `cores`, 1, or 0 for plain low rank, or more; then also `groups`,
            the number of the core of each expert; and `basis`, where the deltas read a shared basis of that size.
        parameterization: `delta` (core plus a free delta, which runs as it is) or `wrapper` (folded on the fly).
        format_version: of the names and shapes of the tensors.

    Raises:
        UserError: values that no version of the format allows.
    """

    layers: dict[str, dict[str, Layout]] = field(default_factory=dict)
    parameterization: Parameterization = "delta"
    format_version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.quant_method != QUANT_METHOD:
            raise UserError(f"quantization_config: quant_method is {self.quant_method!r}, not {QUANT_METHOD!r}")
        if self.format_version != FORMAT_VERSION:
            raise UserError(
                f"quantization_config: the checkpoint has format version {self.format_version}, this moe-compress "
                f"reads {FORMAT_VERSION}; use the moe-compress that wrote it"
            )
        if self.parameterization not in ("delta", "wrapper"):
            raise UserError(f"quantization_config: parameterization {self.parameterization!r} is not delta or wrapper")
        if not isinstance(self.layers, dict) or not self.layers:
            raise UserError("quantization_config: it names no layers")
        for name, projections in self.layers.items():
            for projection, layout in projections.items():
                self._check(f"{name}.{projection}", layout)

    def _check(self, where: str, layout: Any) -> None:
        if not isinstance(layout, dict) or set(layout) - {"groups", "basis"} != {"delta_rank", "cores"}:
            raise UserError(
                f"quantization_config: {where} must have delta_rank and cores, and may have groups and basis"
            )
        rank, cores, groups = layout["delta_rank"], layout["cores"], layout.get("groups")
        basis = layout.get("basis", rank)
        if not isinstance(rank, int) or rank < 1:
            raise UserError(f"quantization_config: {where} has delta_rank {rank!r}; it must be a positive whole number")
        if not isinstance(cores, int) or cores < 0:
            raise UserError(f"quantization_config: {where} has {cores!r} cores; it must be a whole number")
        if cores < 2 and groups is not None:
            raise UserError(f"quantization_config: {where} has groups, but not several cores")
        if cores > 1 and (not isinstance(groups, list) or sorted(set(groups)) != list(range(cores))):
            raise UserError(
                f"quantization_config: {where} has {cores} cores; its groups must give each expert one of 0 to "
                f"{cores - 1}, and each of them to an expert"
            )
        if not isinstance(basis, int) or basis < rank:
            raise UserError(
                f"quantization_config: {where} has a basis of {basis!r}; it must be a whole number, at least delta_rank"
            )
        if self.parameterization == "wrapper" and (rank % 2 or not cores or "basis" in layout):
            raise UserError(
                f"quantization_config: {where} is a wrapper, which needs a core, an even delta_rank and no basis"
            )

    @classmethod
    def from_dict(  # type: ignore[override]
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As Transformers' own, with a clear line for fields that this version does not know."""
        unknown = set(config_dict) - set(cls.__dataclass_fields__)
        if unknown:
            raise UserError(
                f"quantization_config: unknown fields {sorted(unknown)}; it was written by a newer moe-compress"
            )
        return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)
