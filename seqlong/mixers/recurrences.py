"""The ops of linear mixers, with one token of decoding done by their steps, and rows that several processes hold.

On a CPU a step takes a sixth to a thirteenth of the time of the op, which makes a chunk of the token (8 heads of 64 by
64, one thread: 67 µs for 870). From two tokens on both take the same. On a GPU a step of a few tokens is one launch.

With a ``fragment`` the state that enters it is worked out first (``seqlong.parallel.scan``), and the state that is
returned is that after the whole row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqlong.fragment import Fragment
from seqlong.kernels import delta_rule as deltas
from seqlong.kernels import dplr as low_ranks
from seqlong.kernels import scalar_decay as scalars
from seqlong.kernels import short_conv as convolutions
from seqlong.kernels import vector_decay as vectors
from seqlong.kernels.dispatch import FEW_TOKENS
from seqlong.parallel import scan


def _few_tokens(v: Tensor, state: Tensor | None) -> bool:
    """Whether a step does it: nothing is differentiated in decoding."""
    return state is not None and v.shape[1] <= (FEW_TOKENS if v.is_cuda else 1) and not torch.is_grad_enabled()


def scalar_decay(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "h"],
    *,
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h k v"] | None = None,
    fragment: Fragment | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """See ``seqlong.kernels.scalar_decay``."""
    if fragment is not None:
        entry, final = scan.entering(fragment, *scan.scalar_decay(k, v, log_decay, starts), initial_state)
        return scalars.scalar_decay(q, k, v, log_decay, starts=starts, initial_state=entry)[0], final
    if not _few_tokens(v, initial_state):
        return scalars.scalar_decay(q, k, v, log_decay, starts=starts, initial_state=initial_state)
    assert initial_state is not None
    return scalars.scalar_decay_step(q, k, v, log_decay, initial_state, starts=starts)


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
    fragment: Fragment | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """See ``seqlong.kernels.vector_decay``."""
    if fragment is not None:
        log_decay, keys = _activated(gate, k, activation, divisor, lower_bound)
        entry, final = scan.entering(fragment, *scan.vector_decay(keys, v, log_decay, starts), initial_state)
        return vectors.vector_decay(
            q, k, v, gate, activation=activation, divisor=divisor, lower_bound=lower_bound, bonus=bonus, starts=starts,
            initial_state=entry,
        )[0], final  # fmt: skip
    if not _few_tokens(v, initial_state):
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
    fragment: Fragment | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """See ``seqlong.kernels.delta_rule``."""
    if fragment is not None:

        def run(queries: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return deltas.delta_rule(
                queries, k, values, beta, gate, normalize=normalize, beta_activation=beta_activation,
                gate_activation=gate_activation, rate=rate, gate_bias=gate_bias, starts=starts, initial_state=state,
            )  # fmt: skip

        made = scan.matrix(lambda values, state: run(k.detach(), values, state)[1], k, v)
        entry, final = scan.entering(fragment, *made, initial_state)
        return run(q, v, entry)[0], final
    if not _few_tokens(v, initial_state):
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
    fragment: Fragment | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """See ``seqlong.kernels.dplr``."""
    if fragment is not None:

        def run(queries: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return low_ranks.dplr(queries, k, values, a, b, log_decay, starts=starts, initial_state=state)

        made = scan.matrix(lambda values, state: run(k.detach(), values, state)[1], k, v)
        entry, final = scan.entering(fragment, *made, initial_state)
        return run(q, v, entry)[0], final
    if not _few_tokens(v, initial_state):
        return low_ranks.dplr(q, k, v, a, b, log_decay, starts=starts, initial_state=initial_state)
    assert initial_state is not None
    return low_ranks.dplr_step(q, k, v, a, b, log_decay, initial_state, starts=starts)


def short_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None = None,
    *,
    starts: Bool[Tensor, "b t"] | None = None,
    state: Float[Tensor, "b r d"] | None = None,
    lengths: Int[Tensor, "b"] | None = None,
    output_state: bool = False,
    fragment: Fragment | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b r d"] | None]:
    """See ``seqlong.kernels.short_conv``."""
    final = None
    if fragment is not None:
        tail, fresh = convolutions.tail(x, weight.shape[1] - 1, starts, lengths)
        state, final = scan.before_convolution(fragment, tail, fresh, state)
    result, after = convolutions.short_conv(
        x, weight, bias, starts=starts, state=state, lengths=lengths, output_state=output_state and fragment is None
    )
    return result, final if fragment is not None and output_state else after


def _activated(
    gate: Tensor, k: Tensor | None, activation: str, divisor: float, lower_bound: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log decays and keys as ``vector_decay`` makes them."""
    gate = gate.to(torch.float64 if gate.dtype == torch.float64 else torch.float32)
    if activation == "log_decay" and k is not None:
        return gate, k
    if activation == "logsigmoid" and k is not None:
        return F.logsigmoid(gate) / divisor, k
    decay, keys = vectors.activated(gate, activation, divisor, None if lower_bound is None else lower_bound.to(gate))
    assert keys is not None
    return decay.clamp(min=torch.finfo(decay.dtype).tiny).log(), keys
