"""dplr: the delta rule with a transition of one's own, a diagonal plus a product of two vectors (RWKV-7)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.dispatch import ALONG_A_ROW, choose_along_a_row
from seqlong.kernels.dplr.chunked import dplr_chunked
from seqlong.kernels.dplr.plan import PLANS, candidates
from seqlong.kernels.dplr.reference import dplr_reference
from seqlong.kernels.inputs import four_axes, needed, shaped, token_marks
from seqlong.kernels.runtime import triton_runs_on

OFFERED = ALONG_A_ROW

#: Widest heads that the Triton kernels hold on chip.
WIDEST = 128
#: Configurations that `seqlong doctor --tune` measures, the default first.
CANDIDATES = candidates()


def why_not_triton(q: Tensor, *others: Tensor) -> str | None:
    """None if the Triton kernels serve q and k, v, a, b, else the reason why not."""
    v = others[1]
    reason = triton_runs_on(v.device)
    if reason is not None:
        return reason
    if v.dtype not in (torch.bfloat16, torch.float32) or any(x.dtype != q.dtype for x in others):
        return f"Triton kernels are for bfloat16 and float32 throughout, not {q.dtype} with {v.dtype}"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"Triton kernels hold heads up to {WIDEST} wide, not {q.shape[3]} and {v.shape[3]}"
    if not v.numel() or not q.numel():
        return "an empty input"
    return None


def check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    state: tuple[str, Tensor | None],
    marks: dict[str, Tensor | None],
) -> None:
    """Raise a ValueError that names the argument, what was found and what was expected."""
    needed(op, {"q": q, "k": k, "v": v, "a": a, "b": b, "log_decay": log_decay})
    four_axes(op, {"q": q, "v": v})
    rows, length, heads, width = q.shape
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, q.shape),
        "v": (v, (rows, length, heads, v.shape[3])),
        "a": (a, q.shape),
        "b": (b, q.shape),
        "log_decay": (log_decay, q.shape),
        state[0]: (state[1], (rows, heads, width, v.shape[3])),
    }
    shaped(op, expected)
    token_marks(op, marks, (rows, length))


def dplr(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    a: Float[Tensor, "b t h k"],
    b: Float[Tensor, "b t h k"],
    log_decay: Float[Tensor, "b t h k"],
    *,
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h k v"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """Diagonal plus low rank: ``S_t = (diag(e^{g_t}) + b_tᵀ a_t) S_{t-1} + k_tᵀ v_t``, ``o_t = q_t S_t``.

    RWKV-7 is ``a = -κ``, ``b = κ ⊙ α`` with κ of length one and ``g = -0.6065 σ(w)``; its r is q. The gated delta rule
    with a gate a channel is ``a = -k ⊙ e^g``, ``b = β k`` and keys ``β k``. What a reads is the state before the decay.
    Any a and b are computed as they are, but a transition that stretches the state stretches errors with it.

    Args:
        q: queries.
        k: keys.
        v: values.
        a: what is read from the state.
        b: where that is written.
        log_decay: g_t <= 0, natural logarithm, a channel; ``-inf`` forgets the channel exactly, in Triton all but
            2e-9 of it (gates below -20 count as -20 there).
        starts: True where the state starts afresh before the token; in reverse, before it in reading from the right.
        initial_state: the state before the first token read; zero if None.
        reverse: read from right to left.
        implementation: ``triton``, ``chunked`` or ``reference``; None lets dispatch choose.

    Returns:
        The output in v's type and the state after the last token read, in float32 (float64 if v is).

    Raises:
        ValueError: shapes or types do not fit, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2503.14456.
    """
    check("dplr", q, k, v, a, b, log_decay, ("initial_state", initial_state), {"starts": starts})
    obstacle = why_not_triton(q, k, v, a, b) or PLANS.why_none(q, v)
    choice = choose_along_a_row("dplr", v, obstacle, implementation)
    if choice.implementation == "reference":
        return dplr_reference(q, k, v, a, b, log_decay, starts, initial_state, reverse)
    if reverse:
        q, k, v, a, b, log_decay = (x.flip(1) for x in (q, k, v, a, b, log_decay))
        starts = None if starts is None else starts.flip(1)
    if choice.implementation == "triton":
        from seqlong.kernels.dplr.triton import dplr_triton

        output, final, *_ = dplr_triton(q, k, v, a, b, log_decay, starts, initial_state)
    else:
        output, final, _ = dplr_chunked(q, k, v, a, b, log_decay, starts, initial_state)
    return output.flip(1) if reverse else output, final
