"""What the rivals store and train: small modules that yield dense expert weights, and an experts module made of them.

Weights are materialized in every forward pass. That is slow and exact, and lets one class serve every rival; only
quality is measured here, never speed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import silu

from moe_compress.factorization.align import neuron_rows
from moe_compress.modeling.experts import SharedCoreExperts
from moe_compress.modeling.find import is_experts, up_projection

VALUE_BYTES = 2  # everything is stored in bf16


class Form(nn.Module):
    """The weights of one projection of all experts of a layer: `forward()` gives them dense, `[E, out, in]`."""

    def forward(self) -> Tensor:
        raise NotImplementedError


class Dense(Form):
    """Weights as they are, `[E, out, in]`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight


class LowRank(Form):
    """`core + delta_out_e delta_in_e`: `[out, in]` (or None), `[E, out, R]`, `[E, R, in]`."""

    def __init__(self, core: Tensor | None, delta_out: Tensor, delta_in: Tensor) -> None:
        super().__init__()
        self.core = None if core is None else nn.Parameter(core)
        self.delta_out, self.delta_in = nn.Parameter(delta_out), nn.Parameter(delta_in)

    def forward(self) -> Tensor:
        if self.core is None:
            return self.delta_out @ self.delta_in
        return torch.baddbmm(self.core.expand(len(self.delta_out), -1, -1), self.delta_out, self.delta_in)


class Ragged(Form):
    """`delta_out_e delta_in_e` of a rank of its own for each expert: `[sum R, out]`, `[sum R, in]`, ranks `[E]`.

    With a `basis` `[s, in]` that all experts share, `delta_in` is `[sum R, s]` and the weights are
    `delta_out_e delta_in_e basis`.
    """

    ranks: Tensor
    slots: Tensor

    def __init__(self, delta_out: Tensor, delta_in: Tensor, ranks: Tensor, basis: Tensor | None = None) -> None:
        super().__init__()
        self.delta_out, self.delta_in = nn.Parameter(delta_out), nn.Parameter(delta_in)
        self.basis = None if basis is None else nn.Parameter(basis)
        self.register_buffer("ranks", ranks.to(torch.int16))
        starts = ranks.cumsum(0) - ranks
        slots = starts[:, None] + torch.arange(int(ranks.max()))
        # Which row of the factors is in which place of a padded expert; one past the last is a row of zeros.
        self.slots = slots.masked_fill(slots >= (starts + ranks)[:, None], len(delta_in))

    def forward(self) -> Tensor:
        delta_out, delta_in = (
            torch.cat([factor, factor.new_zeros(1, factor.shape[1])])[self.slots]
            for factor in (self.delta_out, self.delta_in)
        )
        if self.basis is not None:
            delta_in = delta_in @ self.basis
        return delta_out.mT @ delta_in


class Bases(Form):
    """MoBE: `A_e f(sum_j a_ej B_j)`, f = SiLU; transposed for `down_proj`.

    Attributes:
        outer: `[E, p, r]`, A_e with the scale of the normalization in it.
        logits: `[E, m]`, whose softmax is a_e.
        bases: `[m, r, q]`.
    """

    def __init__(self, outer: Tensor, logits: Tensor, bases: Tensor, transposed: bool) -> None:
        super().__init__()
        self.outer, self.logits, self.bases = nn.Parameter(outer), nn.Parameter(logits), nn.Parameter(bases)
        self.transposed = transposed

    def forward(self) -> Tensor:
        mixed = silu(torch.einsum("em,mrq->erq", self.logits.softmax(-1), self.bases))
        weight = self.outer @ mixed
        return weight.mT if self.transposed else weight


class Merged(Form):
    """Fewer experts than the router knows: expert e is `weight[group[e]]`."""

    group: Tensor

    def __init__(self, weight: Tensor, group: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("group", group.to(torch.uint8 if len(weight) < 256 else torch.int32))

    def forward(self) -> Tensor:
        return self.weight.index_select(0, self.group.int())


class Rows(Form):
    """A projection in parts along its rows, such as gate and up apart; `order` says where the parts' rows go."""

    def __init__(self, parts: list[Form], order: Tensor) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.order = order  # follows from the layout: nothing that would have to be stored

    def forward(self) -> Tensor:
        return torch.cat([part() for part in self.parts], dim=1)[:, self.order]


def gate_and_up(gate: Form, up: Form, neurons: int, interleaved: bool) -> Rows:
    """Gate and up `[E, I, H]` each as `gate_up_proj` in the layout of the model."""
    rows = neuron_rows(torch.arange(neurons)[None], interleaved=interleaved, gates=2)[0]
    return Rows([gate, up], rows.argsort())


class FormExperts(nn.Module):
    """Stands in for the experts of a layer: runs the original's forward pass on the weights that its forms yield."""

    def __init__(self, original: Any, forms: dict[str, Form]) -> None:
        super().__init__()
        self.up_name = up_projection(original)
        self.forms = nn.ModuleDict(forms)
        self.transposed: bool = original.is_transposed
        self.biases = nn.ParameterDict(
            {n: nn.Parameter(p.detach().clone()) for n, p in original.named_parameters() if n.endswith("_bias")}
        )
        template = copy.copy(original)
        template.__dict__ = dict(original.__dict__, _parameters=dict.fromkeys(original._parameters))
        for name, parameter in original._parameters.items():
            template._parameters[name] = nn.Parameter(parameter.detach().to("meta"))
        self._template = [template]  # in a list, so that its parameters are not taken for ours

    def set_num_experts(self, number: int) -> None:
        """After pruning: the number of experts that indices count."""
        self._template[0].num_experts = number

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the experts it stands for."""
        weights = {name: form() for name, form in self.forms.items()}
        if self.transposed:
            weights = {name: weight.mT.contiguous() for name, weight in weights.items()}
        return functional_call(
            self._template[0], {**weights, **self.biases}, (hidden_states, top_k_index, top_k_weights)
        )


def replace_experts(model: Any, forms: dict[str, dict[str, Form]]) -> Any:
    """Put forms in the place of the experts of a model, by the name of the experts module; returns the model."""
    for name, by_projection in forms.items():
        model.set_submodule(name, FormExperts(model.get_submodule(name), by_projection))
    return model


def expert_bytes(model: Any) -> int:
    """Bytes of everything that the experts of a model store, floats in bf16, compressed or not."""
    total = 0
    for module in model.modules():
        if isinstance(module, (FormExperts, SharedCoreExperts)) or is_experts(module):
            for tensor in (*module.parameters(), *module.buffers()):
                total += tensor.numel() * (VALUE_BYTES if tensor.is_floating_point() else tensor.element_size())
    return total


@torch.no_grad()
def round_stored(model: Any) -> Any:
    """Round every parameter to what bf16 stores, in place; computed with in fp32 all the same."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    return model
