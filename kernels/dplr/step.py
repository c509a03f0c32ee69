"""dplr_step: the next tokens from a state, for decoding, drafts and streams."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.dispatch import STEPS, choose_step
from seqlong.kernels.dplr.chunked import dplr_chunked
from seqlong.kernels.dplr.op import check
from seqlong.kernels.dplr.reference import dplr_reference
from seqlong.kernels.inputs import needed
from seqlong.kernels.precision import accumulation, as_written

OFFERED = STEPS


def dplr_step(
    q: Float[Tensor, "b n h k"],
    k: Float[Tensor, "b n h k"],
    v: Float[Tensor, "b n h v"],
    a: Float[Tensor, "b n h k"],
    b: Float[Tensor, "b n h k"],
    log_decay: Float[Tensor, "b n h k"],
    state: Float[Tensor, "b h k v"],
    *,
    starts: Bool[Tensor, "b n"] | None = None,
    padding: Bool[Tensor, "b n"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b n h v"], Float[Tensor, "b h k v"]]:
    """The next n tokens of ``dplr``: one in decoding, some in streaming or speculation.

    The state given is not changed.

    Args:
        q: queries.
        k: keys.
        v: values.
        a: what is read from the state.
        b: where that is written.
        log_decay: as in ``dplr``.
        state: the state before.
        starts: True where the state starts afresh before the token.
        padding: True where there is no token: the state stays, whatever stands there, and the output means nothing.
        implementation: one of ``OFFERED``; None lets dispatch choose. Triton has no gradient.

    Returns:
        The output in v's type and the state after, in float32 (float64 if v is).

    Raises:
        ValueError: shapes or types do not fit, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2503.14456.
    """
    needed("dplr_step", {"state": state})
    check("dplr_step", q, k, v, a, b, log_decay, ("state", state), {"starts": starts, "padding": padding})
    choice = choose_step("dplr_step", q, v, (q, k, v, a, b, log_decay, state), implementation).implementation
    if choice == "triton":
        from seqlong.kernels.triton_token_step import DPLR, run

        return run(q, k, v, state, a=a, b=b, gate=log_decay, starts=starts, padding=padding, form=DPLR)
    if padding is not None:
        k, v, a, b, log_decay = (x.masked_fill(padding[:, :, None, None], 0) for x in (k, v, a, b, log_decay))
        starts = None if starts is None else starts & ~padding
    if choice == "reference":
        return dplr_reference(q, k, v, a, b, log_decay, starts, state)
    if q.shape[1] != 1:
        output, final, _ = dplr_chunked(q, k, v, a, b, log_decay, starts, state)
        return output, final
    return _one(q, k, v, a, b, log_decay, state, starts)


@as_written
def _one(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    kept = accumulation(v.dtype)
    qs, ks, vs, as_, bs, gs = (x[:, 0].to(kept) for x in (q, k, v, a, b, log_decay))
    before = state.to(kept)
    if starts is not None:
        before = before.masked_fill(starts[:, 0, None, None, None], 0)
    read = as_[:, :, None] @ before
    after = gs.exp()[..., None] * before + torch.stack([bs, ks], dim=-1) @ torch.cat([read, vs[:, :, None]], dim=2)
    return (qs[:, :, None] @ after).transpose(1, 2).to(v.dtype), after
