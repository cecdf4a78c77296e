"""Products of tokens with the cores of a projection: once per token and core, not once per expert.

A token's k experts need at most min(G, k) of the G cores. With no more cores than experts per token, all of them are
applied to every token, as one dense product; with more, each row is sent to its own core.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.factorization.factors import DeltaFactors
from moe_compress.modeling.grouped_mm import grouped_mm
from moe_compress.modeling.onednn import linear
from moe_compress.modeling.routing import Routing


def spread_products(tokens: Tensor, factors: DeltaFactors, routing: Routing) -> Tensor:
    """Each token times the core of each of its experts.

    Args:
        tokens: [T, in].
        factors: with at least one core.

    Returns:
        [S, out], in the order of the routing's rows.
    """
    assert factors.core is not None
    if factors.groups is None:
        return routing.spread(linear(tokens, factors.core))
    if factors.cores > routing.top_k:
        return _row_products(routing.spread(tokens), factors, routing)
    products = linear(tokens, factors.core).view(-1, factors.delta_out.shape[1])  # of token 0 and core 0, core 1 ...
    return products.index_select(0, routing.tokens * factors.cores + factors.groups[routing.experts])


def collect_products(rows: Tensor, factors: DeltaFactors, routing: Routing) -> Tensor:
    """The sum over the rows of each token of the row times the core of its expert, times the routing weight.

    Args:
        rows: [S, in], in the order of the routing's rows.
        factors: with at least one core.

    Returns:
        [T, out].
    """
    assert factors.core is not None
    if factors.groups is None:
        return linear(routing.collect(rows, routing.weights), factors.core)
    if factors.cores > routing.top_k:
        return routing.collect(_row_products(rows, factors, routing), routing.weights)
    group = factors.groups[routing.experts][:, None]
    out = rows.new_zeros(routing.num_tokens, factors.delta_out.shape[1])
    for number, core in enumerate(factors.core.view(factors.cores, -1, rows.shape[1])):
        out = out + linear(routing.collect(rows, routing.weights.masked_fill(group != number, 0.0)), core)
    return out


def _row_products(rows: Tensor, factors: DeltaFactors, routing: Routing) -> Tensor:
    """Each row [S, in] times the core of its expert, [S, out]."""
    assert factors.core is not None and factors.groups is not None
    group, order = factors.groups[routing.experts].sort(stable=True)
    numbers = torch.arange(factors.cores, device=group.device)
    offsets = torch.searchsorted(group, numbers, right=True, out_int32=True)
    cores = factors.core.view(factors.cores, -1, rows.shape[1])
    return grouped_mm(rows.index_select(0, order), cores.mT, offsets).index_select(0, order.argsort())
