"""delta_rule: the public function."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.delta_rule.activations import log_decays, weights
from seqlong.kernels.delta_rule.chunked import delta_rule_chunked
from seqlong.kernels.delta_rule.inputs import BETA, check
from seqlong.kernels.delta_rule.plan import PLANS, candidates
from seqlong.kernels.delta_rule.reference import delta_rule_reference
from seqlong.kernels.dispatch import ALONG_A_ROW, choose_along_a_row
from seqlong.kernels.plans import parts
from seqlong.kernels.runtime import triton_runs_on

OFFERED = ALONG_A_ROW
#: Configurations that `seqlong doctor --tune` measures, the default first.
CANDIDATES = candidates()
#: Widest keys that the Triton kernels hold on chip, and values: wider ones are run in parts.
WIDEST = (256, 256)


def why_not_triton(q: Tensor, v: Tensor) -> str | None:
    """None if the Triton kernels serve these inputs, else the reason why not."""
    reason = triton_runs_on(v.device)
    if reason is not None:
        return reason
    if v.dtype not in (torch.bfloat16, torch.float32) or q.dtype != v.dtype:
        return f"Triton kernels are for bfloat16 and float32, not {q.dtype} with {v.dtype}"
    if v.is_cuda and v.dtype == torch.float32:  # the interpreter has it, for tests
        return "float32 does not fit the registers of the Triton kernels"
    if q.shape[3] > WIDEST[0]:
        return f"Triton kernels hold keys up to {WIDEST[0]} wide, not {q.shape[3]}"
    if not v.numel() or not q.numel():
        return "an empty input"
    return None


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
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """The delta rule: a token corrects what the decayed state holds under its key.

    ``S~ = e^g_t S_{t-1}``, ``S_t = S~ + beta_t k_tᵀ (v_t - k_t S~)``, ``o_t = q_t S_t``; no scale inside.
    DeltaNet has no gate, Gated DeltaNet one a head, Kimi Delta Attention (KDA) one a channel.

    Args:
        q: queries, g groups that divide the h heads.
        k: keys. Of length 1 (``normalize``) and with beta in [0, 2] no state can grow.
        v: values.
        beta: how far the old value gives way to the new: 0 not, 1 wholly, up to 2 beyond (negative eigenvalues).
        gate: g <= 0, natural logarithm of the decay, a head or a channel each; ``-inf`` forgets all that came before,
            as a start does. With ``gate_activation="softplus"`` raw. Below -111 (float64: -746) it is zero decay.
        normalize: divide each query and key by ``sqrt(sum of squares + 1e-6)``.
        beta_activation: ``none``, ``sigmoid`` or ``double_sigmoid`` (twice the sigmoid).
        gate_activation: ``log_decay`` (the gate is g) or ``softplus``: ``g = rate softplus(gate + gate_bias)``.
        rate: negative rates of softplus: ``-exp(A_log)``.
        gate_bias: added to the raw gate; per channel only if the gate is.
        starts: True where the state starts afresh before the token; in reverse, before it in reading from the right.
        initial_state: the state before the first token read; zero if None.
        reverse: read from right to left.
        implementation: ``triton``, ``chunked`` or ``reference``; None lets dispatch choose.

    Returns:
        The output in v's type and the state after the last token read, in float32 (float64 if v is).

    Raises:
        ValueError: shapes, types or words do not fit, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2406.06484, 2412.06464, 2510.26692; negative eigenvalues 2411.12537.
    """
    check("delta_rule", q, k, v, beta, gate, beta_activation=beta_activation, gate_activation=gate_activation,
          rate=rate, gate_bias=gate_bias, starts=starts, initial_state=initial_state)  # fmt: skip
    obstacle = why_not_triton(q, v) or PLANS.why_none(q, v, WIDEST, channels=gate is not None and gate.dim() == 4)
    choice = choose_along_a_row("delta_rule", v, obstacle, implementation)
    if choice.implementation == "reference":
        return delta_rule_reference(
            q, k, v, beta, gate, normalize=normalize, beta_activation=beta_activation, gate_activation=gate_activation,
            rate=rate, gate_bias=gate_bias, starts=starts, initial_state=initial_state, reverse=reverse,
        )  # fmt: skip
    if reverse:
        q, k, v, beta = (x.flip(1) for x in (q, k, v, beta))
        gate, starts = (None if x is None else x.flip(1) for x in (gate, starts))
    activation = BETA.index(beta_activation)
    if choice.implementation == "triton":
        output, final = _triton(q, k, v, beta, gate, rate, gate_bias, starts, initial_state, normalize, activation)
    else:
        output, final, _ = delta_rule_chunked(
            q, k, v, beta, gate, rate, gate_bias, starts, initial_state, normalize, activation
        )
    return output.flip(1) if reverse else output, final


#: A log-decay that is zero in float32 even as a sum of two parts; a start is one.
SHUT = -178.0


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    rate: Tensor | None,
    bias: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    normalize: bool,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """Call the Triton op. What is one number a token and head is activated here: a hundredth of what it moves."""
    from seqlong.kernels.delta_rule.triton import run

    with torch.autocast(v.device.type, enabled=False):
        weight = weights(beta.float(), activation)
        decay = None if gate is None else log_decays(gate.float(), rate, bias).clamp(min=SHUT)
        if starts is not None:
            decay = torch.zeros_like(weight) if decay is None else decay
            decay = decay.masked_fill(starts.view(*starts.shape, *[1] * (decay.dim() - 2)), SHUT)
    if decay is not None and decay.dim() == 4 and q.shape[2] != v.shape[2]:
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    # Columns of values do not mix.
    results = [
        run(q, k, v[..., part], weight, decay, None if initial_state is None else initial_state[..., part], normalize)
        for part in parts(v.shape[3], WIDEST[1])
    ]
    if len(results) == 1:
        return results[0]
    outputs, finals = zip(*results, strict=True)
    return torch.cat(outputs, dim=3), torch.cat(finals, dim=3)
