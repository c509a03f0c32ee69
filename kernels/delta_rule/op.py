"""delta_rule: the public function."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.delta_rule.chunked import delta_rule_chunked
from seqlong.kernels.delta_rule.inputs import BETA, check
from seqlong.kernels.delta_rule.reference import delta_rule_reference
from seqlong.kernels.dispatch import choose

OFFERED = {
    "chunked": "matrix products over chunks in torch, any device",
    "reference": "float64 loop over tokens",
}


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
        implementation: ``chunked`` or ``reference``; None lets dispatch choose.

    Returns:
        The output in v's type and the state after the last token read, in float32 (float64 if v is).

    Raises:
        ValueError: shapes, types or words do not fit, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2406.06484, 2412.06464, 2510.26692; negative eigenvalues 2411.12537.
    """
    check("delta_rule", q, k, v, beta, gate, beta_activation=beta_activation, gate_activation=gate_activation,
          rate=rate, gate_bias=gate_bias, starts=starts, initial_state=initial_state)  # fmt: skip
    choice = choose("delta_rule", OFFERED, "chunked", implementation)
    if choice.implementation == "reference":
        return delta_rule_reference(
            q, k, v, beta, gate, normalize=normalize, beta_activation=beta_activation, gate_activation=gate_activation,
            rate=rate, gate_bias=gate_bias, starts=starts, initial_state=initial_state, reverse=reverse,
        )  # fmt: skip
    if reverse:
        q, k, v, beta = (x.flip(1) for x in (q, k, v, beta))
        gate, starts = (None if x is None else x.flip(1) for x in (gate, starts))
    output, final, _ = delta_rule_chunked(
        q, k, v, beta, gate, rate, gate_bias, starts, initial_state, normalize, BETA.index(beta_activation)
    )
    return output.flip(1) if reverse else output, final
