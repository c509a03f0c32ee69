"""bidirectional_decay: every token sees both sides of its segment, with one decay a head."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels import tuning
from seqlong.kernels.dispatch import ALONG_A_ROW, choose_along_a_row
from seqlong.kernels.plans import Plans
from seqlong.kernels.precision import accumulation
from seqlong.kernels.scalar_decay.chunked import scalar_decay_chunked
from seqlong.kernels.scalar_decay.inputs import check
from seqlong.kernels.scalar_decay.op import scalar_decay, why_not_triton
from seqlong.kernels.scalar_decay.plan import Plan, why_none
from seqlong.kernels.scalar_decay.reference import bidirectional_decay_reference, last_tokens

OFFERED = ALONG_A_ROW
#: Widest heads for which one walk holds both readings; wider ones, and heads that share q and k, are read twice.
WIDEST_AT_ONCE = 64


def default(dtype: torch.dtype, k: int = 64, v: int = 64) -> Plan:
    """Safe on any GPU with 99 KiB of shared memory; tiles are as wide as the heads, which are narrow."""
    if dtype == torch.float32:
        return Plan(chunk=32, states=41, forward=41, fused=41)
    return Plan(chunk=64, states=42, forward=42, fused=41)


PLANS = Plans("bidirectional_decay", default)


def candidates() -> dict[str, dict[str, list[tuning.Config]]]:
    """Op -> key -> configurations worth measuring, the default first."""
    first = default(torch.bfloat16)
    tried = [
        first,
        replace(first, states=43, forward=43, fused=42),
        replace(first, states=43, forward=42, fused=42),
        replace(first, states=43, forward=43, fused=43),
        replace(first, states=43, forward=43, fused=42, programs_per_sm=6),
        replace(first, states=43, forward=43, fused=42, programs_per_sm=8),
    ]
    key = tuning.key(torch.bfloat16, k=64, v=64)
    return {"bidirectional_decay": {key: [asdict(plan) for plan in tried]}}


#: Configurations that `seqlong doctor --tune` measures, the default first.
CANDIDATES = candidates()


def at_once(q: Tensor, v: Tensor) -> bool:
    """Whether one walk serves both readings."""
    return q.shape[2] == v.shape[2] and max(q.shape[3], v.shape[3]) <= WIDEST_AT_ONCE


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
        recompute: keep less for the backward pass, and compute the states of chunks again there: for heads up to 64
            wide that share nothing, all of them at once; else as ``scalar_decay`` does.
        implementation: ``triton``, ``chunked`` or ``reference``; None lets dispatch choose.

    Returns:
        The output in v's type.

    Raises:
        ValueError: shapes or types do not fit, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2407.09941 (Hydra), 2502.16249 (LION).
    """
    check("bidirectional_decay", ("q", q), ("k", k), ("v", v), ("log_decay", log_decay), starts=starts)
    obstacle = why_not_triton(q, v) or (PLANS.why_none(q, v) if at_once(q, v) else why_none(q, v, False))
    choice = choose_along_a_row("bidirectional_decay", v, obstacle, implementation)
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(v.shape[:3])
    if choice.implementation == "reference":
        return bidirectional_decay_reference(q, k, v, log_decay, starts)
    if choice.implementation == "chunked":
        return _chunked(q, k, v, log_decay, starts)
    if not at_once(q, v):
        return _twice(q, k, v, log_decay, starts, recompute)
    from seqlong.kernels.scalar_decay.triton_bidirectional import bidirectional_decay_triton

    per = 16 // v.element_size()  # rows of a head are read in pieces of 16 bytes
    value_width = v.shape[3]
    q, k, v = (F.pad(x, (0, -x.shape[3] % per)) if x.shape[3] % per else x for x in (q, k, v))
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, log_decay))
    output = bidirectional_decay_triton(q, k, v, log_decay, starts, needed and not recompute)[0]
    return output[..., :value_width] if output.shape[3] != value_width else output


def _diagonal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of tokens with themselves (b t h 1), and values, in the type of sums."""
    kept = accumulation(v.dtype)
    scores = (q.to(kept) * k.to(kept)).sum(-1).repeat_interleave(v.shape[2] // q.shape[2], dim=2)
    return scores[..., None], v.to(kept)


def _twice(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None, recompute: bool) -> Tensor:
    """Two scans in Triton."""
    ends = None if starts is None else last_tokens(starts)
    common = (q, k, v, log_decay)
    rightward, _ = scalar_decay(*common, starts=starts, recompute=recompute, implementation="triton")
    leftward, _ = scalar_decay(*common, starts=ends, reverse=True, recompute=recompute, implementation="triton")
    scores, values = _diagonal(q, k, v)
    return torch.addcmul(rightward.to(values.dtype) + leftward, scores, values, value=-1).to(v.dtype)


def _chunked(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None) -> Tensor:
    """Two scans, and the diagonal taken off what the sum has twice, in the type of sums."""
    ends = None if starts is None else last_tokens(starts).flip(1)
    rightward, _, _ = scalar_decay_chunked(q, k, v, log_decay, starts, None)
    leftward, _, _ = scalar_decay_chunked(*(x.flip(1) for x in (q, k, v, log_decay)), ends, None)
    scores, values = _diagonal(q, k, v)
    both = rightward.to(values.dtype) + leftward.flip(1)
    return torch.addcmul(both, scores, values, value=-1).to(v.dtype)
