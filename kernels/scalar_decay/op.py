"""scalar_decay: the public function."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.dispatch import choose
from seqlong.kernels.scalar_decay.chunked import scalar_decay_chunked
from seqlong.kernels.scalar_decay.reference import scalar_decay_reference

OFFERED = {"chunked": "matrix products over chunks in torch, any device", "reference": "float64 loop over tokens"}


def scalar_decay(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    log_decay: Float[Tensor, "b t h"],
    *,
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h k v"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """Linear attention with one decay a head: ``S_t = exp(g_t) S_{t-1} + k_tᵀ v_t``, ``o_t = q_t S_t``.

    Args:
        q: queries (Mamba2's C), g groups that divide the h heads.
        k: keys (Mamba2's B).
        v: values (Mamba2's dt·x).
        log_decay: g_t <= 0, natural logarithm, per head; float32 unless all is float64.
        starts: True where the state starts afresh before the token; in reverse, before it in reading from the right.
        initial_state: the state before the first token read; zero if None.
        reverse: read from right to left.
        implementation: ``chunked`` or ``reference``; None lets dispatch choose.

    Returns:
        The output in v's type and the state after the last token read, in float32 (float64 if v is).

    Raises:
        ValueError: heads are not a multiple of groups.

    Source: arXiv 2405.21060, 2307.08621, 2401.04658.
    """
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"scalar_decay needs heads divisible by groups, found {v.shape[2]} heads, {q.shape[2]} groups")
    choice = choose("scalar_decay", OFFERED, "chunked", implementation)
    if choice.implementation == "reference":
        return scalar_decay_reference(q, k, v, log_decay, starts, initial_state, reverse)
    if reverse:
        q, k, v, log_decay = (x.flip(1) for x in (q, k, v, log_decay))
        starts = None if starts is None else starts.flip(1)
    output, final, _ = scalar_decay_chunked(q, k, v, log_decay, starts, initial_state)
    return output.flip(1) if reverse else output, final
