"""Balanced factors: the two sides of every low-rank product at the same norm, which conditions their training."""

from __future__ import annotations

import torch
from torch import nn

from moe_compress.factorization.closed_form import balance
from moe_compress.modeling import find_shared_cores

# The left and right factor of each product: delta_out [E, r, out], every other [E, out or in, r].
_PAIRS = (("delta_out", "delta_in"), ("u_out", "v_out"), ("u_in", "v_in"))


@torch.no_grad()
def balance_factors(model: nn.Module) -> None:
    """Scale every component of every delta or wrapper so that its two vectors have the same norm; products stay.

    Gradient flow keeps the difference of their squared norms as it found it, and the larger side is then the slower
    one. The closed form leaves its deltas balanced already. Components with an empty side are left alone: balanced,
    both sides would be empty, and neither would get a gradient.
    """
    for module in find_shared_cores(model).values():
        for projection in module.projections:
            for left_name, right_name in _PAIRS:
                left = getattr(module, f"{projection}_{left_name}", None)
                if left is None:
                    continue
                right = getattr(module, f"{projection}_{right_name}")
                columns, rows = (
                    left.mT if left_name == "delta_out" else left,
                    right.mT,
                )  # [E, out, r], [E, r, in]: views
                balanced = balance(columns, rows)
                usable = (columns.norm(dim=1) > 0) & (rows.norm(dim=2) > 0)
                columns.copy_(torch.where(usable[:, None, :], balanced[0], columns))
                rows.copy_(torch.where(usable[:, :, None], balanced[1], rows))
