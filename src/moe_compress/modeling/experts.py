"""`SharedCoreExperts`: the drop-in for the experts of one MoE layer, with the folded forward pass.

For token n routed to experts e with weights g_e, and W_e = C + A_e B_e on both projections:

    z_e = C x + A_e (B_e x)                                  C x once per token, not once per expert
    h_e = gate(z_e)
    y   = C' (sum_e g_e h_e) + sum_e A'_e (B'_e (g_e h_e))   C' once per token, after the weighted sum

With a shared basis B the deltas read B x, once per token, instead of x: B_e = M_e B.
With several cores, each belongs to a group of experts: the same once per token and core (see `cores`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.errors import UserError
from moe_compress.factorization.factors import DeltaFactors, Factors, WrapperFactors
from moe_compress.modeling import cpu_kernel
from moe_compress.modeling.cores import collect_products, spread_products
from moe_compress.modeling.expert_mm import by_row, expert_mm, out_side, row_rounding, rows_per_gemm
from moe_compress.modeling.find import describe_experts, up_projection
from moe_compress.modeling.onednn import linear
from moe_compress.modeling.recompute import recomputed
from moe_compress.modeling.routing import Routing
from moe_compress.modeling.tensors import (
    Layout,
    Parameterization,
    cast_factors,
    factor_names,
    factor_shapes,
    factor_tensors,
    factors_from_tensors,
    layout_of,
    stored_dtype,
    working_dtype,
)

# What a module's dictionary holds that belongs to that one instance: torch's own state, hooks that accelerate put
# there, and the flag that Transformers sets while it loads.
_NOT_COPIED = {*nn.Module().__dict__, "forward", "_old_forward", "_hf_hook", "_is_hf_initialized"}


class SharedCoreExperts(nn.Module):
    """Experts of one MoE layer as a shared core and low-rank factors per expert; biases stay as they are.

    It carries over the plain attributes of the module it replaces (activation, limits, config ...) and calls that
    class's own `_apply_gate`, so that one class serves every architecture.

    Parameters, for each projection P (`gate_up_proj` or `up_proj`, and `down_proj`):
        P: the core [out, in], or G cores one below the other, or the empty [0, in].
        P_delta_in [E, in, R] and P_delta_out [E, R, out]; with a shared basis P_basis [s, in], P_delta_in [E, s, R].
        Or for the wrapper
        P_u_out, P_v_out [E, out, r] and P_u_in, P_v_in [E, in, r].
        P_bias: [E, out], where the original has biases.
    """

    has_gate: bool
    is_transposed: bool
    config: Any

    def __init__(
        self, original: nn.Module, layout: Mapping[str, Layout], parameterization: Parameterization = "delta"
    ) -> None:
        """Uninitialized parameters, on the device and of the dtype of the original's.

        Args:
            original: the experts module to stand in for; it is not changed.
            layout: what each projection becomes, as in `SharedCoreConfig.layers`.

        Raises:
            UserError: the layout names other projections or another number of experts than the module has, or the
                module cannot be compressed.
        """
        super().__init__()
        facts = describe_experts(type(original).__name__, original)
        if set(layout) != set(facts.projections):
            raise UserError(
                f"{type(original).__name__} has the projections {sorted(facts.projections)}, not {sorted(layout)}"
            )
        self.original_class: Any = type(original)
        self.parameterization: Parameterization = parameterization
        self.num_experts: int = facts.num_experts
        copy_attributes(original, self)
        # The module's entry in `SharedCoreConfig.layers`.
        self.layout: dict[str, Layout] = {projection: layout[projection] for projection in facts.projections}
        self._group_indices: dict[tuple[str, torch.device], Tensor] = {}
        for projection, shape in facts.projections.items():
            groups = layout[projection].get("groups")
            if groups is not None and len(groups) != self.num_experts:
                raise UserError(f"{projection}: {len(groups)} experts are given a core, there are {self.num_experts}")
            weight = getattr(original, projection)
            for name, size in factor_shapes(projection, shape, layout[projection], parameterization).items():
                values = torch.empty(size, device=weight.device, dtype=weight.dtype)
                self.register_parameter(name, nn.Parameter(values, requires_grad=values.numel() > 0))
            if facts.has_bias:
                bias = getattr(original, f"{projection}_bias")
                self.register_parameter(f"{projection}_bias", nn.Parameter(torch.empty_like(bias)))

    @property
    def projections(self) -> tuple[str, str]:
        """The names of the two projections."""
        return up_projection(self), "down_proj"

    def shared_parts(self, name: str) -> int | None:
        """How many parts a parameter has that experts share, its cores or one basis; None if each has its own."""
        for projection, own in self.layout.items():
            if name == projection:
                return own["cores"]
            if name == f"{projection}_basis":
                return 1
        return None

    def factors(self, projection: str) -> Factors:
        """The factors of one projection, which share the parameters' storage and gradients."""
        # Not from `_parameters`, which others empty: DataParallel in its replicas, PEFT in what it adapts.
        names = factor_names(projection, self.layout[projection], self.parameterization)
        tensors = {name: getattr(self, name) for name in names}
        return factors_from_tensors(projection, tensors, self._group_index(projection, tensors[projection].device))

    def _group_index(self, projection: str, device: torch.device) -> Tensor | None:
        """The core of each expert [E], on the device of the cores; None with less than two."""
        groups = self.layout[projection].get("groups")
        if groups is None:
            return None
        # No buffer: Transformers fills buffers that are in no checkpoint with whatever lies in memory.
        key = projection, device
        if key not in self._group_indices:
            self._group_indices[key] = torch.tensor(groups, device=device)
        return self._group_indices[key]

    def bias(self, projection: str) -> Tensor | None:
        """The bias [E, out] of one projection, if the architecture has biases."""
        return getattr(self, f"{projection}_bias", None)

    @torch.no_grad()
    def load_factors(self, projection: str, factors: Factors, bias: Tensor | None = None) -> None:
        """Copy factors (and a bias [E, out]) into the parameters, cast to their dtype.

        Raises:
            UserError: another parameterization, other shapes or other groups than the module was made for.
        """
        if layout_of(factors).get("groups") != self.layout[projection].get("groups"):
            raise UserError(f"{projection}: the factors' experts are grouped in another way than the module's")
        tensors = factor_tensors(projection, factors)
        if bias is not None:
            tensors[f"{projection}_bias"] = bias
        for name, tensor in tensors.items():
            target = self._parameters.get(name)
            if target is None or target.shape != tensor.shape:
                expected = "none" if target is None else tuple(target.shape)
                raise UserError(f"{name}: factors of shape {tuple(tensor.shape)} given, {expected} expected")
            target.copy_(tensor)

    @torch.no_grad()
    def fold_(self) -> SharedCoreExperts:
        """Replace wrappers by the core and delta they stand for, in place; nothing to do for a delta."""
        for projection in self.projections if self.parameterization == "wrapper" else ():
            wrapper = self.factors(projection)
            assert isinstance(wrapper, WrapperFactors)
            delta = cast_factors(cast_factors(wrapper, working_dtype(wrapper)).fold(), stored_dtype(wrapper))
            for name in factor_tensors(projection, wrapper):
                if name != projection:
                    delattr(self, name)
            for name, tensor in factor_tensors(projection, delta).items():
                if name != projection:
                    self.register_parameter(name, nn.Parameter(tensor, requires_grad=wrapper.u_out.requires_grad))
        self.parameterization = "delta"
        return self

    @torch.no_grad()
    def materialize(self, projection: str) -> Tensor:
        """The dense weights [E, out, in] of one projection, computed in fp32 and rounded once to the stored dtype."""
        factors = self.factors(projection)
        return cast_factors(factors, working_dtype(factors)).materialize().to(stored_dtype(factors))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts; the signature of Transformers' experts.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, k]; the index `num_experts` is padding and adds nothing.
            top_k_weights: [T, k] routing weights.

        Returns:
            [T, H] in the dtype of `hidden_states`.
        """
        if hidden_states.shape[0] == 0:
            return torch.zeros_like(hidden_states)
        up_name, down_name = self.projections
        up, down = self.factors(up_name).fold(), self.factors(down_name).fold()
        dtype = _compute_dtype(hidden_states.device.type, up.delta_in.dtype)
        up, down = cast_factors(up, dtype), cast_factors(down, dtype)
        tokens = hidden_states.to(dtype)
        if self.bias(up_name) is None and cpu_kernel.takes(tokens, up, down):
            gate = None if cpu_kernel.computes_gate(self) else self._gate
            return cpu_kernel.forward(tokens, top_k_index, top_k_weights, up, down, gate).to(hidden_states.dtype)
        sides = (up.delta_in, up.delta_out, down.delta_in, down.delta_out)
        rows = top_k_index.numel()
        few = all(by_row(rows, side) for side in sides)
        per_gemm = 0 if few else rows_per_gemm(up.delta_in)
        routing = Routing(
            top_k_index,
            top_k_weights,
            self.num_experts,
            by_row=few,
            round_to=1 if few else row_rounding(rows, sides, batched=per_gemm > 0),
            rows_per_gemm=per_gemm,
        )

        # A token without any expert may hold anything, even NaN; it must not reach the core, nor its gradient.
        tokens = tokens.masked_fill(routing.padded.all(dim=1, keepdim=True), 0.0)

        def up_values(seen: Tensor) -> Tensor:
            return expert_mm(routing.spread(seen), up.delta_in.mT, routing)

        def gated(inner: Tensor) -> tuple[Tensor, Tensor | None]:
            rows = self._gate(inner)
            values = expert_mm(_seen(rows, down), down.delta_in.mT, routing)
            return values, None if down.core is None else collect_products(rows, down, routing)

        inner = out_side(recomputed(up_values, _seen(tokens, up)), up.delta_out.mT, routing)
        if up.core is not None:
            inner = _sum(inner, spread_products(tokens, up, routing))
        bias = self.bias(up_name)
        if bias is not None:
            inner = _sum(inner, bias.to(dtype).index_select(0, routing.experts))
        values, of_core = recomputed(gated, inner)

        # The routing weight is applied where it costs least: to the delta's inner values, and in the sum over experts.
        scale = routing.weights.to(dtype)
        out = routing.collect(out_side(values, down.delta_out.mT, routing, scale=scale))
        if of_core is not None:
            out = _sum(out, of_core)
        bias = self.bias(down_name)
        if bias is not None:
            out = _sum(out, linear(routing.dense_weights().to(dtype), bias.to(dtype).mT))
        return out.to(hidden_states.dtype)

    def _gate(self, inner: Tensor) -> Tensor:
        """The original's gate, [S, G*I] to [S, I]."""
        activate: Any = self.act_fn if not self.has_gate else partial(self.original_class._apply_gate, self)
        return activate(inner).to(inner.dtype)  # autocast on a GPU leaves powers in fp32

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        parts = []
        for name, own in self.layout.items():
            basis = f", basis {own['basis']}" if "basis" in own else ""
            parts.append(f"{name}: rank {own['delta_rank']}, {own['cores']} core(s){basis}")
        layout = ", ".join(parts)
        return f"{self.original_class.__name__}, {self.num_experts} experts, {self.parameterization}, {layout}"


def _seen(rows: Tensor, factors: DeltaFactors) -> Tensor:
    """What the deltas read of rows [n, in]: themselves, or [n, s] in a shared basis."""
    return rows if factors.basis is None else linear(rows, factors.basis)


def _sum(first: Tensor, second: Tensor) -> Tensor:
    """Their sum, which takes the place of `first` where no gradient needs it: a buffer less to fill."""
    return first + second if torch.is_grad_enabled() else first.add_(second)


def _compute_dtype(device_type: str, stored: torch.dtype) -> torch.dtype:
    # Grouped GEMMs are not among the operations that autocast casts, so the casts are ours to make.
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return stored


def copy_attributes(source: nn.Module, target: nn.Module) -> None:
    """Carry over plain attributes and submodules (an activation may be a module), but no parameters."""
    for name, value in source.__dict__.items():
        if name not in _NOT_COPIED:
            setattr(target, name, value)
    for name, child in source.named_children():
        target.add_module(name, child)


def find_shared_cores(model: nn.Module) -> dict[str, SharedCoreExperts]:
    """The compressed experts modules of a model by name, in the order of its layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SharedCoreExperts)}


def set_empty_cores_aside(model: nn.Module) -> None:
    """Keep the empty parameters that stand for absent cores out of training, whoever sets `requires_grad` later.

    They never get a gradient: FSDP2 cannot reduce an empty one, and DDP, which waits for every parameter, is told not
    to wait for these.
    """
    empty = [
        (f"{name}.{leaf}", parameter)
        for name, module in find_shared_cores(model).items()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.numel() == 0
    ]
    for _, parameter in empty:
        parameter.requires_grad_(False)
    if empty:
        ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
        model._ddp_params_and_buffers_to_ignore = sorted(ignored | {name for name, _ in empty})  # type: ignore
