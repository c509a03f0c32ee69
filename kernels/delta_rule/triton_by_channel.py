"""delta_rule in Triton where each channel has its own decay (KDA): what is launched before and after the walks.

The walks are those of one decay a head (``triton.py``), given rows of q and k that have been decayed before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqlong.kernels.delta_rule import triton_channel, triton_channel_backward, triton_inverse
from seqlong.kernels.delta_rule.plan import CHUNK
from seqlong.kernels.delta_rule.triton_launch import Prepared, Sizes, by_head, readable, strides

#: log2 of a decay that is zero in float32, and far below what eight tokens that are no starts may add up to.
RESET = -256.0


def prepare(q: Tensor, k: Tensor, weight: Tensor, log_decay: Tensor, normalize: bool, z: Sizes) -> Prepared:
    w = by_head(weight, z)
    gate = readable(log_decay)
    segment = torch.empty_like(w, dtype=torch.int32)
    rq, rk, total = torch.empty_like(w), torch.empty_like(w), w.new_empty(gate.shape)
    early_q, early_k, late = (q.new_empty(z.B, z.T, z.H, z.K) for _ in range(3))
    inverse, scores = (q.new_empty(z.B, z.H, z.NC, CHUNK, CHUNK) for _ in range(2))
    erase = torch.empty_like(inverse, dtype=torch.float32)  # what is inverted keeps its digits
    numbers = (z.T, z.H, z.R, z.NC, *strides(q), *strides(k))
    triton_channel.decays[z.chunks](
        q, k, gate, total, segment, rq, rk, early_q, early_k, late, *numbers, *strides(gate), RESET, K=z.K, KB=z.KB,
        NORM=normalize, num_warps=8,
    )  # fmt: skip
    triton_channel.products[z.chunks](
        q, k, total, segment, rq, rk, scores, erase, *numbers, K=z.K, KB=z.KB, KS=min(z.KB, 32),
        num_warps=z.plan.products,
    )  # fmt: skip
    triton_inverse.invert[z.chunks](w, erase, inverse, num_warps=1)
    return Prepared(early_q, early_k, late, w, total, rq, rk, inverse, scores, erase)


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    go: Tensor,
    ready: Prepared,
    kept: Tensor,
    dkept: Tensor,
    fresh: Tensor,
    dv: Tensor,
    normalize: bool,
    z: Sizes,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, weight (b h n·C) and log_decay (b t h k), once the adjoint walk has made ``dkept`` and dv."""
    _, early_k, _, w, total, rq, rk, inverse, scores, erase = ready
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dweight, dgate = torch.empty_like(w), torch.empty_like(total)
    # The inverses and scores have been read: gradients take their place.
    triton_channel_backward.local[z.chunks](
        early_k, v, go, w, kept, fresh, erase, dv, inverse, scores, dweight, z.T, z.H, z.NC, *strides(v),
        *strides(go), **z.tile, num_warps=z.plan.local,
    )  # fmt: skip
    anchors = total.new_empty(z.B, z.NC, z.H, 4, z.K)
    triton_channel_backward.keys[(4 * z.H * z.NC * z.B,)](
        q, k, go, total, rq, rk, kept, dkept, fresh, dv, inverse, scores, dq, dk, dgate, anchors, z.T, z.H, z.NC,
        *strides(q), *strides(k), *strides(go), **z.tile, NORM=normalize, num_warps=z.plan.keys,
    )  # fmt: skip
    triton_channel_backward.gates[z.chunks](dgate, anchors, z.T, z.H, z.NC, K=z.K, KB=z.KB, num_warps=4)
    return dq, dk, dweight, dgate
