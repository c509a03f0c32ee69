"""scalar_decay and ssd: the public functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.dispatch import ALONG_A_ROW, choose_along_a_row
from seqlong.kernels.precision import accumulation
from seqlong.kernels.runtime import triton_runs_on
from seqlong.kernels.scalar_decay.chunked import scalar_decay_chunked
from seqlong.kernels.scalar_decay.inputs import check
from seqlong.kernels.scalar_decay.plan import candidates, why_none
from seqlong.kernels.scalar_decay.reference import scalar_decay_reference

OFFERED = ALONG_A_ROW
#: Configurations that `seqlong doctor --tune` measures, the default first.
CANDIDATES = candidates()
#: Widest heads that the Triton kernels hold on chip.
WIDEST = 256


def why_not_triton(q: Tensor, v: Tensor) -> str | None:
    """None if the Triton kernels serve these inputs, else the reason why not."""
    reason = triton_runs_on(v.device)
    if reason is not None:
        return reason
    if v.dtype not in (torch.bfloat16, torch.float32) or q.dtype != v.dtype:
        return f"Triton kernels are for bfloat16 and float32, not {q.dtype} with {v.dtype}"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"Triton kernels hold heads up to {WIDEST} wide, not {q.shape[3]} and {v.shape[3]}"
    if not v.numel() or not q.numel():
        return "an empty input"
    return None


def scalar_decay(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "h"],
    *,
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h k v"] | None = None,
    reverse: bool = False,
    recompute: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """Linear attention with one decay a head: ``S_t = exp(g_t) S_{t-1} + k_tᵀ v_t``, ``o_t = q_t S_t``.

    Args:
        q: queries (Mamba2's C), g groups that divide the h heads.
        k: keys (Mamba2's B).
        v: values (Mamba2's dt·x).
        log_decay: g_t <= 0, natural logarithm, per head, float32 unless all is float64; ``(h)`` if it is constant.
            Below -110 (float64: -746) it is zero decay: ``-inf`` forgets all that came before, as a start does.
        starts: True where the state starts afresh before the token; in reverse, before it in reading from the right.
        initial_state: the state before the first token read; zero if None.
        reverse: read from right to left.
        recompute: in Triton, keep only the state that enters each window of 32,768 tokens or more, and make the states
            of chunks again in the backward pass, a window at a time. The chunked form always does so, by blocks.
        implementation: ``triton``, ``chunked`` or ``reference``; None lets dispatch choose.

    Returns:
        The output in v's type and the state after the last token read, in float32 (float64 if v is).

    Raises:
        ValueError: shapes or types do not fit, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2405.21060, 2307.08621, 2401.04658.
    """
    check("scalar_decay", ("q", q), ("k", k), ("v", v), ("log_decay", log_decay), starts=starts,
          initial_state=initial_state)  # fmt: skip
    obstacle = why_not_triton(q, v) or why_none(q, v, ssd=False)
    choice = choose_along_a_row("scalar_decay", v, obstacle, implementation)
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(v.shape[:3])
    if choice.implementation == "reference":
        return scalar_decay_reference(q, k, v, log_decay, starts, initial_state, reverse)
    if choice.implementation == "triton":
        from seqlong.kernels.scalar_decay.triton import run

        return run(q, k, v, log_decay, None, None, None, starts, initial_state, reverse, recompute)
    if reverse:
        q, k, v, log_decay = (x.flip(1) for x in (q, k, v, log_decay))
        starts = None if starts is None else starts.flip(1)
    output, final, _ = scalar_decay_chunked(q, k, v, log_decay, starts, initial_state)
    return output.flip(1) if reverse else output, final


def ssd(
    x: Float[Tensor, "b t h v"],
    dt: Float[Tensor, "b t h"],
    a: Float[Tensor, "h"],
    b: Float[Tensor, "b t g k"],
    c: Float[Tensor, "b t g k"],
    *,
    d: Float[Tensor, "h"] | None = None,
    dt_bias: Float[Tensor, "h"] | None = None,
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h k v"] | None = None,
    recompute: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """Mamba2's scan: with ``s_t = softplus(dt_t + dt_bias)``, ``S_t = exp(a s_t) S_{t-1} + b_tᵀ (s_t x_t)``.

    The output is ``c_t S_t + d x_t``. In Triton neither the steps nor ``s x`` nor repeated b and c exist in memory.

    Args:
        x: inputs, h heads.
        dt: raw steps; minus infinity makes a step of zero, which neither decays nor writes (padding).
        a: negative rates, one a head: ``-exp(A_log)``.
        b: keys, g groups that divide the h heads.
        c: queries.
        d: weight of the direct path; none if None.
        dt_bias: added to the raw steps.
        starts: True where the state starts afresh before the token.
        initial_state: the state before the first token; zero if None.
        recompute: see ``scalar_decay``.
        implementation: ``triton``, ``chunked`` or ``reference``; None lets dispatch choose.

    Returns:
        The output in x's type and the last state, in float32 (float64 if x is).

    Raises:
        ValueError: shapes or types do not fit, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2405.21060.
    """
    check("ssd", ("c", c), ("b", b), ("x", x), ("dt", dt), starts=starts, initial_state=initial_state,
          per_head={"a": a, "d": d, "dt_bias": dt_bias})  # fmt: skip
    obstacle = why_not_triton(c, x) or why_none(c, x, ssd=True)
    choice = choose_along_a_row("ssd", x, obstacle, implementation)
    if choice.implementation == "triton":
        from seqlong.kernels.scalar_decay.triton import run

        return run(c, b, x, dt, dt_bias, a, d, starts, initial_state, False, recompute)
    kept = torch.float64 if choice.implementation == "reference" else accumulation(x.dtype)
    raw = dt.to(kept) if dt_bias is None else dt.to(kept) + dt_bias.to(kept)
    steps = F.softplus(raw)
    inputs = (x.to(kept) if choice.implementation == "reference" else x) * steps[..., None]
    y, final = scalar_decay(
        c,
        b,
        inputs if choice.implementation == "reference" else inputs.to(x.dtype),
        a.to(kept) * steps,
        starts=starts,
        initial_state=initial_state,
        implementation=choice.implementation,
    )
    if d is not None:
        y = torch.addcmul(y, x.to(y.dtype), d.to(y.dtype)[:, None])
    return y.to(x.dtype), final.to(accumulation(x.dtype))
