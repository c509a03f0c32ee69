"""The definition of grouped_matmul: a float64 loop over rows."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_matmul_reference(
    x: Tensor, weight: Tensor, ends: Tensor, gather: Tensor | None, scatter: Tensor | None, copies: int
) -> Tensor:
    """Row ``i`` of group ``e``: ``y[scatter[i]] = x[gather[i] // copies] @ weight[e]``; see ``op.py``."""
    rows = x.shape[0] if gather is None else gather.shape[0]
    matrices = weight.double()
    results = [x.new_zeros(weight.shape[2], dtype=torch.float64) for _ in range(rows)]
    begin = 0
    for group, end in enumerate(ends.tolist()):
        for i in range(begin, end):
            source = i if gather is None else int(gather[i]) // copies
            target = i if scatter is None else int(scatter[i])
            results[target] = x[source].double() @ matrices[group]
        begin = end
    if not results:
        return x.new_zeros(0, weight.shape[2]) + 0 * x.sum() + 0 * weight.sum().to(x.dtype)
    return torch.stack(results).to(x.dtype)
