"""The forms that a compressed layer can take at the same bytes, to be timed side by side, with random values."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from moe_compress.compression.ranks import BASIS_SHARES
from moe_compress.evaluation.variants import CORE, SVD
from moe_compress.factorization import Form, rank_within
from moe_compress.factorization.budget import Shape
from moe_compress.modeling import compress_in_memory, find_experts
from moe_compress.modeling.experts import SharedCoreExperts, find_shared_cores
from moe_compress.modeling.tensors import Layout, factor_tensors, form_of, make_layout

LayerLayout = dict[str, Layout]

# Cores of each projection, and the size of the basis that the up projection reads, as a share of the hidden size H.
FORMS = {
    CORE: (1, Fraction(0)),
    SVD: (0, Fraction(0)),
    **{
        f"shared basis {'' if share.numerator == 1 else share.numerator}H/{share.denominator}": (0, share)
        for share in BASIS_SHARES
    },
}


def projection_shapes(layer: SharedCoreExperts) -> dict[str, Shape]:
    """(E, out, in) of each projection of a compressed layer."""
    up, down = layer.projections
    hidden, intermediate = layer.get_parameter(up).shape[1], layer.get_parameter(down).shape[1]
    gated = intermediate * (2 if layer.has_gate else 1)
    return {up: (layer.num_experts, gated, hidden), down: (layer.num_experts, hidden, intermediate)}


def same_ratio_layouts(shapes: Mapping[str, Shape], ratio: float) -> dict[str, LayerLayout]:
    """What a layer is in each of the `FORMS` at a share of its original values; without those that cannot be as small.

    Args:
        shapes: (E, out, in) of each projection.
    """
    share = Fraction(str(ratio))
    return _layouts_within(shapes, {name: math.floor(share * math.prod(shape)) for name, shape in shapes.items()})


def same_bytes_layouts(layer: SharedCoreExperts) -> dict[str, LayerLayout]:
    """The `FORMS` that cost at most what each projection of a layer costs, without those that cannot."""
    shapes = projection_shapes(layer)
    values = {name: form_of(own).cost(shapes[name], own["delta_rank"]) for name, own in layer.layout.items()}
    return _layouts_within(shapes, values)


def _layouts_within(shapes: Mapping[str, Shape], values: Mapping[str, int]) -> dict[str, LayerLayout]:
    """Ranks above 8 are rounded down to a multiple of 8, as the grouped GEMMs want them."""
    found = {}
    for label, (cores, share) in FORMS.items():
        layout: LayerLayout = {}
        for name, shape in shapes.items():
            form = Form(cores, 0 if name == "down_proj" else _aligned(round(share * shape[2])))
            rank = rank_within(shape, values[name], form=form, bytes_per_value=1, rank_multiple=8)
            layout[name] = make_layout(form, rank)
        if all(own["delta_rank"] for own in layout.values()):
            found[label] = layout
    return found


def random_layer(original: nn.Module, layout: Mapping[str, Layout], seed: int = 0) -> SharedCoreExperts:
    """A compressed layer of the given layout with random values: speed does not depend on them."""
    return fill_randomly(SharedCoreExperts(original, layout), seed).eval()


def random_student(original: Any, layouts: Mapping[str, LayerLayout], seed: int = 0) -> Any:
    """A copy of a model with random factors in the given layouts; everything but the experts is shared with it."""
    results = {
        facts.name: {
            name: layer.factors(name)
            for layer in [random_layer(facts.module, layouts[facts.name], seed)]
            for name in layer.projections
        }
        for facts in find_experts(original)
    }
    shared = {id(parameter): parameter for parameter in original.parameters()}
    return compress_in_memory(copy.deepcopy(original, shared), results)


@torch.no_grad()
def fill_randomly(module: nn.Module, seed: int = 0) -> Any:
    """Give all parameters small random values, which repeat: to draw gigabytes of them would take minutes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        values = 0.02 * torch.randn(min(parameter.numel(), 2**20 + 7), generator=generator)
        flat = parameter.view(-1)
        for part in flat.split(max(1, values.numel())):
            part.copy_(values[: part.numel()])
    return module


@torch.no_grad()
def cut_to_aligned_ranks(model: nn.Module) -> nn.Module:
    """Cut delta ranks above 8 down to multiples of 8, in place, as speed would want them; to be timed, not used.

    The SVD baseline spends its bytes to the last rank. At a rank that is not aligned every call pays for padding,
    which would be unfair to hold against it.
    """
    for module in find_shared_cores(model).values():
        for projection in module.projections:
            delta = module.factors(projection).fold()
            rank = _aligned(delta.delta_rank)
            cut = replace(delta, delta_out=delta.delta_out[:, :, :rank], delta_in=delta.delta_in[:, :rank])
            for name, tensor in factor_tensors(projection, cut).items():
                if name != projection:
                    setattr(module, name, nn.Parameter(tensor))
    return model


def _aligned(size: int) -> int:
    return size - size % 8 if size > 8 else size
