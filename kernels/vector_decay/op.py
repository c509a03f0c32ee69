"""vector_decay: the public function."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.dispatch import ALONG_A_ROW, choose_along_a_row
from seqlong.kernels.runtime import triton_runs_on
from seqlong.kernels.vector_decay import composed
from seqlong.kernels.vector_decay.chunked import vector_decay_chunked
from seqlong.kernels.vector_decay.inputs import check
from seqlong.kernels.vector_decay.plan import PLANS, candidates
from seqlong.kernels.vector_decay.reference import vector_decay_reference

OFFERED = ALONG_A_ROW
#: Configurations that `seqlong doctor --tune` measures, the default first.
CANDIDATES = candidates()


def why_not_triton(q: Tensor, v: Tensor, gate: Tensor) -> str | None:
    """None if the Triton kernels serve these inputs, else the reason why not."""
    reason = triton_runs_on(v.device)
    if reason is not None:
        return reason
    if v.dtype not in (torch.bfloat16, torch.float32) or q.dtype != v.dtype:
        return f"Triton kernels are for bfloat16 and float32, not {q.dtype} with {v.dtype}"
    if gate.dtype not in (torch.bfloat16, torch.float32):
        return f"Triton kernels read gates in bfloat16 and float32, not {gate.dtype}"
    if not v.numel() or not q.numel():
        return "an empty input"
    return None


def vector_decay(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"] | None,
    v: Float[Tensor, "b t h v"],
    gate: Float[Tensor, "b t h k"],
    *,
    activation: str = "log_decay",
    divisor: float = 1.0,
    lower_bound: Float[Tensor, "h k"] | None = None,
    bonus: Float[Tensor, "h k"] | None = None,
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h k v"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """Linear attention with one decay a channel: ``S_t = diag(exp(g_t)) S_{t-1} + k_tᵀ v_t``, ``o_t = q_t S_t``.

    GLA, HGRN2 and RWKV-6. The gate is made a decay inside, in float32, and its gradient is exact there.

    Args:
        q: queries; the scale is the caller's.
        k: keys; None with ``lower_bound``, where ``k = (1 - lower_bound) sigmoid(-gate)``.
        v: values.
        gate: what ``activation`` makes the log-decay g_t of.
        activation: ``log_decay``: g = gate <= 0, natural logarithm, ``-inf`` forgets as a start does.
            ``logsigmoid``: g = logsigmoid(gate) / divisor (GLA: 16).
            ``lower_bound``: g = log(lower_bound + (1 - lower_bound) sigmoid(gate)) (HGRN2).
        divisor: of ``logsigmoid``.
        lower_bound: of ``lower_bound``, in [0, 1). Its gradient divides by the decay, or by 2^-12 (float64: 2^-40)
            where the decay is smaller.
        bonus: u of RWKV-6, whose query reads before the token is written: ``o_t = q_t (S_{t-1} + diag(u) k_tᵀ v_t)``.
        starts: True where the state starts afresh before the token; in reverse, before it in reading from the right.
        initial_state: the state before the first token read; zero if None.
        reverse: read from right to left.
        implementation: one of ``OFFERED``; None lets dispatch choose.

    Returns:
        The output in v's type and the state after the last token read, in float32 (float64 if v is).

    Raises:
        ValueError: shapes, types or settings do not fit, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2312.06635 (GLA), 2404.07904 (HGRN2), 2404.05892 (RWKV-6).
    """
    check("vector_decay", q, k, v, gate, activation, divisor, lower_bound=lower_bound, bonus=bonus, starts=starts,
          initial_state=initial_state)  # fmt: skip
    widest = (composed.WIDEST, composed.WIDEST)
    obstacle = why_not_triton(q, v, gate) or PLANS.why_none(q, v, widest, lower_bound=activation == "lower_bound")
    choice = choose_along_a_row("vector_decay", v, obstacle, implementation)
    inputs = (q, k, v, gate, activation, divisor, lower_bound, bonus, starts, initial_state, reverse)
    if choice.implementation == "triton":
        return composed.run(*inputs)
    if choice.implementation == "reference":
        return vector_decay_reference(*inputs)
    output, final, _ = vector_decay_chunked(*inputs)
    return output, final
