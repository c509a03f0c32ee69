"""delta_rule_step: one token, or a few, of decoding."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.delta_rule.activations import NONE, log_decays, normalized, weights
from seqlong.kernels.delta_rule.chunked import delta_rule_chunked
from seqlong.kernels.delta_rule.inputs import BETA, check
from seqlong.kernels.delta_rule.reference import EPS, delta_rule_reference
from seqlong.kernels.dispatch import STEPS, choose_step
from seqlong.kernels.inputs import needed, token_marks
from seqlong.kernels.precision import accumulation, as_written

OFFERED = STEPS


def delta_rule_step(
    q: Float[Tensor, "b n g k"],
    k: Float[Tensor, "b n g k"],
    v: Float[Tensor, "b n h v"],
    beta: Float[Tensor, "b n h"],
    gate: Float[Tensor, "b n h"] | Float[Tensor, "b n h k"] | None,
    state: Float[Tensor, "b h k v"],
    *,
    normalize: bool = False,
    beta_activation: str = "none",
    gate_activation: str = "log_decay",
    rate: Float[Tensor, "h"] | None = None,
    gate_bias: Float[Tensor, "h"] | Float[Tensor, "h k"] | None = None,
    starts: Bool[Tensor, "b n"] | None = None,
    padding: Bool[Tensor, "b n"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b n h v"], Float[Tensor, "b h k v"]]:
    """n tokens of ``delta_rule`` from ``state``, which is not changed: one by its formula, more as one small chunk.

    Args:
        q, k, v, beta, gate, normalize, beta_activation, gate_activation, rate, gate_bias, starts: see ``delta_rule``.
        state: the state before the first token.
        padding: True where there is no token: the state stays, and the output means nothing. Rows that accepted fewer
            drafted tokens than others are run again so.
        implementation: one of ``OFFERED``; None lets dispatch choose. Triton has no gradient.

    Returns:
        The output in v's type and the state after the last token, in float32 (float64 if v is).

    Raises:
        ValueError: shapes, types or words do not fit, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2406.06484, 2412.06464, 2510.26692.
    """
    needed("delta_rule_step", {"state": state})
    check("delta_rule_step", q, k, v, beta, gate, beta_activation=beta_activation, gate_activation=gate_activation,
          rate=rate, gate_bias=gate_bias, starts=starts, initial_state=state)  # fmt: skip
    token_marks("delta_rule_step", {"padding": padding}, q.shape[:2])
    weight = BETA.index(beta_activation)
    choice = choose_step(
        "delta_rule_step", q, v, (q, k, v, beta, gate, rate, gate_bias, state), implementation
    ).implementation
    if choice == "triton":
        from seqlong.kernels.triton_token_step import DELTA, LOG_DECAY, NO_GATE, SOFTPLUS, run

        act = NO_GATE if gate is None else LOG_DECAY if rate is None else SOFTPLUS
        return run(q, k, v, state, gate=gate, beta=beta, rate=rate, bias=gate_bias, starts=starts, padding=padding,
                   form=DELTA, activation=act, weight=weight, normalize=normalize, eps=EPS)  # fmt: skip
    if choice == "reference":
        if padding is not None:
            # A weight of zero, a decay of one, and nothing to read, whatever stands there.
            beta = beta.masked_fill(padding[..., None], 0.0 if weight == NONE else -torch.inf)
            k, v = (x.masked_fill(padding[..., None, None], 0) for x in (k, v))
            starts = None if starts is None else starts & ~padding
            if gate is not None:
                idle = padding.view(*padding.shape, *[1] * (gate.dim() - 2))
                gate = gate.masked_fill(idle, 0.0 if rate is None else -torch.inf)
        return delta_rule_reference(
            q, k, v, beta, gate, normalize=normalize, beta_activation=beta_activation, gate_activation=gate_activation,
            rate=rate, gate_bias=gate_bias, starts=starts, initial_state=state,
        )  # fmt: skip
    return _step(q, k, v, beta, gate, state, normalize, weight, rate, gate_bias, starts, padding)


@as_written
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    state: Tensor,
    normalize: bool,
    beta_activation: int,
    rate: Tensor | None,
    bias: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kept = accumulation(v.dtype)
    queries, keys, values, state = (x.to(kept) for x in (q, k, v, state))
    if normalize:
        queries, keys = normalized(queries)[0], normalized(keys)[0]
    weight = weights(beta.to(kept), beta_activation)
    decay = torch.zeros_like(weight) if gate is None else log_decays(gate.to(kept), rate, bias)
    if padding is not None:
        weight = weight.masked_fill(padding[..., None], 0)
        decay = decay.masked_fill(padding.view(*padding.shape, *[1] * (decay.dim() - 2)), 0)
        values = values.masked_fill(padding[..., None, None], 0)  # what lies there may be anything
        keys = keys.masked_fill(padding[..., None, None], 0)
        if starts is not None:
            starts = starts & ~padding
    if q.shape[1] != 1:
        output, final, _ = delta_rule_chunked(queries, keys, values, weight, decay, None, None, starts, state)
        return output.to(v.dtype), final
    repeat = v.shape[2] // q.shape[2]
    query, key = (x[:, 0].repeat_interleave(repeat, dim=1).unsqueeze(2) for x in (queries, keys))  # (b h 1 k)
    if starts is not None:
        state = state.masked_fill(starts[:, :, None, None], 0)
    if gate is not None:
        state = state * (decay[:, 0] if decay.dim() == 4 else decay[:, 0, :, None]).exp().unsqueeze(-1)
    missing = weight[:, 0, :, None, None] * (values[:, 0].unsqueeze(2) - key @ state)
    state = state + key.mT * missing
    return (query @ state).squeeze(2).unsqueeze(1).to(v.dtype), state
