"""The ops of linear mixers, with one token of decoding done by their steps.

On a CPU a step takes a sixth to a thirteenth of the time of the op, which makes a chunk of the token (8 heads of 64 by
64, one thread: 67 µs for 870). From two tokens on both take the same. GPUs keep the op: steps are some launches there.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels import delta_rule as deltas
from seqlong.kernels import dplr as low_ranks
from seqlong.kernels import scalar_decay as scalars
from seqlong.kernels import vector_decay as vectors


def _one_token(v: Tensor, state: Tensor | None) -> bool:
    """Whether a step does it: nothing is differentiated in decoding."""
    return v.shape[1] == 1 and state is not None and v.device.type == "cpu" and not torch.is_grad_enabled()


def scalar_decay(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "h"],
    *,
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h k v"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """See ``seqlong.kernels.scalar_decay``."""
    if not _one_token(v, initial_state):
        return scalars.scalar_decay(q, k, v, log_decay, starts=starts, initial_state=initial_state)
    assert initial_state is not None
    q, k = (x if x.shape[2] == v.shape[2] else x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    gate = log_decay.expand(v.shape[:3])[..., None].expand(q.shape)
    return vectors.vector_decay_step(q, k, v, gate, initial_state, starts=starts)


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
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """See ``seqlong.kernels.vector_decay``."""
    if not _one_token(v, initial_state):
        return vectors.vector_decay(
            q, k, v, gate, activation=activation, divisor=divisor, lower_bound=lower_bound, bonus=bonus, starts=starts,
            initial_state=initial_state,
        )  # fmt: skip
    assert initial_state is not None
    return vectors.vector_decay_step(
        q, k, v, gate, initial_state, activation=activation, divisor=divisor, lower_bound=lower_bound, bonus=bonus,
        starts=starts,
    )  # fmt: skip


def delta_rule(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    beta: Float[Tensor, "b t h"],
    gate: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
    *,
    normalize: bool = False,
    beta_activation: str = "none",
    gate_activation: str = "log_decay",
    rate: Float[Tensor, "h"] | None = None,
    gate_bias: Float[Tensor, "h"] | Float[Tensor, "h k"] | None = None,
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h k v"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """See ``seqlong.kernels.delta_rule``."""
    if not _one_token(v, initial_state):
        return deltas.delta_rule(
            q, k, v, beta, gate, normalize=normalize, beta_activation=beta_activation, gate_activation=gate_activation,
            rate=rate, gate_bias=gate_bias, starts=starts, initial_state=initial_state,
        )  # fmt: skip
    assert initial_state is not None
    return deltas.delta_rule_step(
        q, k, v, beta, gate, initial_state, normalize=normalize, beta_activation=beta_activation,
        gate_activation=gate_activation, rate=rate, gate_bias=gate_bias, starts=starts,
    )  # fmt: skip


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
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """See ``seqlong.kernels.dplr``."""
    if not _one_token(v, initial_state):
        return low_ranks.dplr(q, k, v, a, b, log_decay, starts=starts, initial_state=initial_state)
    assert initial_state is not None
    return low_ranks.dplr_step(q, k, v, a, b, log_decay, initial_state, starts=starts)
