"""bidirectional_decay: every token sees both sides of its segment, with one decay a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.dispatch import Choice, choose
from seqlong.kernels.precision import accumulation
from seqlong.kernels.scalar_decay.chunked import scalar_decay_chunked
from seqlong.kernels.scalar_decay.op import OFFERED, why_not_triton
from seqlong.kernels.scalar_decay.reference import bidirectional_decay_reference, last_tokens

__all__ = ["OFFERED", "bidirectional_decay"]


def _choose(q: Tensor, v: Tensor, implementation: str | None) -> Choice:
    offered = {name: OFFERED[name] for name in ("chunked", "reference")}
    return choose("bidirectional_decay", offered, "chunked", implementation)


def bidirectional_decay(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "h"],
    *,
    starts: Bool[Tensor, "b t"] | None = None,
    recompute: bool = False,
    implementation: str | None = None,
) -> Float[Tensor, "b t h v"]:
    """``scalar_decay`` read from the left plus the same read from the right, the token itself counted once.

    ``o_t = Σ_{s <= t} exp(g_{s+1} + .. + g_t) (q_t·k_s) v_s + Σ_{s > t} exp(g_t + .. + g_{s-1}) (q_t·k_s) v_s``

    Args:
        q: queries, g groups that divide the h heads.
        k: keys.
        v: values.
        log_decay: g_t <= 0, natural logarithm, per head, float32 unless all is float64; ``(h)`` if it is constant.
        starts: True at the first token of each segment; segments see nothing of each other.
        recompute: keep less for the backward pass, and compute the states of chunks again there.
        implementation: ``triton``, ``chunked`` or ``reference``; None lets dispatch choose.

    Returns:
        The output in v's type.

    Raises:
        ValueError: heads are not a multiple of groups, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2407.09941 (Hydra), 2502.16249 (LION).
    """
    if v.shape[2] % q.shape[2]:
        raise ValueError(
            f"bidirectional_decay needs heads divisible by groups, found {v.shape[2]} heads, {q.shape[2]} groups"
        )
    choice = _choose(q, v, implementation)
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(v.shape[:3])
    if choice.implementation == "reference":
        return bidirectional_decay_reference(q, k, v, log_decay, starts)
    return _chunked(q, k, v, log_decay, starts)


def _chunked(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None) -> Tensor:
    """Two scans, and the diagonal taken off what the sum has twice, in the type of sums."""
    ends = None if starts is None else last_tokens(starts).flip(1)
    rightward, _, _ = scalar_decay_chunked(q, k, v, log_decay, starts, None)
    leftward, _, _ = scalar_decay_chunked(*(x.flip(1) for x in (q, k, v, log_decay)), ends, None)
    kept = accumulation(v.dtype)
    scores = (q.to(kept) * k.to(kept)).sum(-1).repeat_interleave(v.shape[2] // q.shape[2], dim=2)
    both = rightward.to(kept) + leftward.flip(1)
    return torch.addcmul(both, scores[..., None], v.to(kept), value=-1).to(v.dtype)
