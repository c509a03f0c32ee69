"""scalar_decay_step: the next tokens from a state, for decoding and streaming."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.dispatch import STEPS, choose_step
from seqlong.kernels.inputs import needed, token_marks
from seqlong.kernels.precision import accumulation, as_written
from seqlong.kernels.scalar_decay.inputs import check
from seqlong.kernels.scalar_decay.op import scalar_decay

OFFERED = STEPS


def scalar_decay_step(
    q: Float[Tensor, "b n g k"],
    k: Float[Tensor, "b n g k"],
    v: Float[Tensor, "b n h v"],
    log_decay: Float[Tensor, "b n h"] | Float[Tensor, "h"],
    state: Float[Tensor, "b h k v"],
    *,
    starts: Bool[Tensor, "b n"] | None = None,
    padding: Bool[Tensor, "b n"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b n h v"], Float[Tensor, "b h k v"]]:
    """n tokens of ``scalar_decay`` from ``state``, which is not changed: one by its formula, more as one chunk.

    Args:
        q, k, v, log_decay: see ``scalar_decay``.
        state: the state before the first token.
        starts: True where the state starts afresh before the token.
        padding: True where there is no token: the state stays, and the output means nothing.
        implementation: one of ``OFFERED``; None lets dispatch choose. Triton has no gradient.

    Returns:
        The output in v's type and the state after the last token, in float32 (float64 if v is).

    Raises:
        ValueError: shapes or types do not fit, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2405.21060.
    """
    op = "scalar_decay_step"
    needed(op, {"state": state})
    check(op, ("q", q), ("k", k), ("v", v), ("log_decay", log_decay), starts=starts, initial_state=state)
    token_marks(op, {"padding": padding}, q.shape[:2])
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(v.shape[:3])
    choice = choose_step(op, q, v, (q, k, v, log_decay, state), implementation).implementation
    if choice == "triton":
        from seqlong.kernels.triton_token_step import run

        return run(q, k, v, state, gate=log_decay, starts=starts, padding=padding)
    if padding is not None:
        k, v = (x.masked_fill(padding[..., None, None], 0) for x in (k, v))
        log_decay = log_decay.masked_fill(padding[..., None], 0)
        starts = None if starts is None else starts & ~padding
    if q.shape[1] != 1 or choice == "reference":
        one = choice if choice == "reference" else None  # several are one chunk, of whichever kind is the quickest
        return scalar_decay(q, k, v, log_decay, starts=starts, initial_state=state, implementation=one)
    return _one(q, k, v, log_decay, state, starts)


@as_written
def _one(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    kept = accumulation(v.dtype)
    groups, heads = q.shape[2], v.shape[2]
    query, key = (x[:, 0].to(kept).repeat_interleave(heads // groups, dim=1) for x in (q, k))
    before = state.to(kept)
    if starts is not None:
        before = before.masked_fill(starts[:, :, None, None], 0)
    decay = log_decay[:, 0].to(kept).exp()[..., None, None]
    after = torch.addcmul(decay * before, key[..., None], v[:, 0].to(kept)[:, :, None])
    return (query[:, :, None] @ after)[:, :, 0][:, None].to(v.dtype), after
