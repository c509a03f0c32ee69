"""vector_decay_step: a token, or a few, with the state handed in and out: decoding, drafts, streams."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.dispatch import STEPS, choose_step
from seqlong.kernels.inputs import needed, token_marks
from seqlong.kernels.precision import accumulation, as_written
from seqlong.kernels.vector_decay.gates import activated
from seqlong.kernels.vector_decay.inputs import ACTIVATIONS, check
from seqlong.kernels.vector_decay.op import vector_decay

OFFERED = STEPS


def vector_decay_step(
    q: Float[Tensor, "b n h k"],
    k: Float[Tensor, "b n h k"] | None,
    v: Float[Tensor, "b n h v"],
    gate: Float[Tensor, "b n h k"],
    state: Float[Tensor, "b h k v"],
    *,
    activation: str = "log_decay",
    divisor: float = 1.0,
    lower_bound: Float[Tensor, "h k"] | None = None,
    bonus: Float[Tensor, "h k"] | None = None,
    starts: Bool[Tensor, "b n"] | None = None,
    padding: Bool[Tensor, "b n"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b n h v"], Float[Tensor, "b h k v"]]:
    """``vector_decay`` on the next n tokens. One token is one pass over the state, several are one small chunk.

    Args:
        q, k, v, gate, activation, divisor, lower_bound, bonus: see ``vector_decay``.
        state: the state before; it is not changed in place.
        starts: True where the state starts afresh before the token.
        padding: True where there is no token: the state stays, and the output means nothing.
        implementation: one of ``OFFERED``; None lets dispatch choose. Triton has no gradient.

    Returns:
        The output in v's type and the state after, in float32 (float64 if v is).

    Raises:
        ValueError: shapes, types or settings do not fit, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2312.06635, 2404.07904, 2404.05892.
    """
    needed("vector_decay_step", {"state": state})
    check("vector_decay_step", q, k, v, gate, activation, divisor, lower_bound=lower_bound, bonus=bonus, starts=starts,
          initial_state=state)  # fmt: skip
    token_marks("vector_decay_step", {"padding": padding}, q.shape[:2])
    choice = choose_step(
        "vector_decay_step", q, v, (q, k, v, gate, lower_bound, bonus, state), implementation
    ).implementation
    if choice == "triton":
        from seqlong.kernels.triton_token_step import PLAIN, run

        return run(q, k, v, state, gate=gate, bound=lower_bound, bonus=bonus, starts=starts, padding=padding,
                   form=PLAIN, activation=1 + ACTIVATIONS.index(activation), divisor=divisor)  # fmt: skip
    if padding is not None:
        nothing = padding[..., None, None]
        # A decay of one and a key of zero; with lower_bound the gate makes both.
        gate = gate.masked_fill(nothing, 0.0 if activation == "log_decay" else torch.inf)
        k = None if k is None else k.masked_fill(nothing, 0)
        v = v.masked_fill(nothing, 0)
        starts = None if starts is None else starts & ~padding
    if q.shape[1] == 1 and choice == "chunked":
        return _one(q, k, v, gate, state, activation, divisor, lower_bound, bonus, starts)
    return vector_decay(q, k, v, gate, activation=activation, divisor=divisor, lower_bound=lower_bound, bonus=bonus,
                        starts=starts, initial_state=state, implementation=choice)  # fmt: skip


@as_written
def _one(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor,
    state: Tensor,
    activation: str,
    divisor: float,
    lower_bound: Tensor | None,
    bonus: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kept = accumulation(v.dtype)
    bound = None if lower_bound is None else lower_bound.to(kept)
    decay, made = activated(gate[:, 0].to(kept), activation, divisor, bound)
    keys = made if k is None else k[:, 0].to(kept)
    assert keys is not None
    query, values, state = q[:, 0].to(kept), v[:, 0].to(kept), state.to(kept)
    if starts is not None:
        state = state.masked_fill(starts[:, :, None, None], 0)
    after = torch.addcmul(decay[..., None] * state, keys[..., None], values[:, :, None])
    if bonus is None:
        output = (query[:, :, None] @ after)[:, :, 0]
    else:
        itself = (query * bonus.to(kept) * keys).sum(dim=-1, keepdim=True)
        output = torch.addcmul((query[:, :, None] @ state)[:, :, 0], itself, values)
    return output[:, None].to(v.dtype), after
