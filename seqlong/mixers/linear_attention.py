"""Linear attention without a learnt decay: plain, RetNet, lightning attention, cosFormer2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import positive
from seqlong.mixers.linear import Constant, Gate, LinearMixer, LowRank, split_heads, still
from seqlong.mixers.recurrences import scalar_decay
from seqlong.positions import alibi_slopes, check_axes, lrpe, rotary


def _constant(mixer: LinearMixer, constant: Constant, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout,
              memory: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence with one constant log-decay a head."""
    decay = constant(v)
    if layout.padding is not None:
        decay = still(decay.expand(*v.shape[:2], mixer.heads), layout.padding, 0.0)
    return scalar_decay(q, k, v, decay, starts=layout.starts, initial_state=memory, fragment=layout.fragment)


class LinearAttention(LinearMixer):
    """``S_t = S_{t-1} + φ(k_t)ᵀ v_t``, ``o_t = φ(q_t) S_t``, then RMSNorm of each head in place of a denominator.

    Source: arXiv 2006.16236; the norm arXiv 2210.10340.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        feature: φ: ``elu`` (plus 1), ``relu``, ``silu`` or ``softmax`` over the head's channels.
        conv_width: taps of a short convolution over q, k, v; 0 for none.
        gate: of the output.
        norm_eps: added to the mean square in the norm.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        feature: Literal["elu", "relu", "silu", "softmax"] = "elu",
        conv_width: int = 0,
        gate: Gate = "none",
        norm_eps: float = 1e-5,
    ) -> None:
        width = split_heads("LinearAttention", d_model, heads)
        super().__init__(d_model, heads, width, width, conv_width=conv_width, gate=gate, norm_eps=norm_eps)
        self.feature = feature
        self.decay = Constant([0.0] * heads)

    def features(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (_feature(x, self.feature) for x in (q, k))
        return q, k, v

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _constant(self, self.decay, q, k, v, layout, memory)


def _feature(x: Tensor, kind: str) -> Tensor:
    if kind == "elu":
        return F.elu(x) + 1
    return {"relu": F.relu, "silu": F.silu}[kind](x) if kind != "softmax" else x.softmax(-1)


class RetNet(LinearMixer):
    """``S_t = γ S_{t-1} + k_tᵀ v_t``, ``o_t = q_t S_t / √k`` with ``γ_h = 1 - 2^(-5 - h)``; q and k rotated.

    RMSNorm of each head, times SiLU of a gate; values twice as wide as keys. Source: arXiv 2307.08621.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        expand_v: width of a value over that of a key.
        rope_base: the longest wavelength of the rotation is about ``2π · rope_base`` tokens.
        norm_eps: added to the mean square in the norm.
    """

    def __init__(
        self, d_model: int, heads: int = 4, expand_v: float = 2.0, rope_base: float = 10000.0, norm_eps: float = 1e-5
    ) -> None:
        width = split_heads("RetNet", d_model, heads)
        positive("RetNet", rope_base=rope_base)
        if width % 2:
            raise ValueError(f"RetNet rotates pairs and needs an even head, found d_model={d_model}, heads={heads}")
        super().__init__(d_model, heads, width, int(width * expand_v), norm_eps=norm_eps)
        self.rope_base = rope_base
        self.decay = Constant([math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)])

    def features(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        places = layout.positions if layout.positions.dim() == 2 else layout.positions[..., 0]
        q, k = (rotary(x, places, self.rope_base) for x in (q, k))
        return q, k, v

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _constant(self, self.decay, q * self.key_dim**-0.5, k, v, layout, memory)


class LightningAttention(LinearMixer):
    """``S_t = exp(-s f) S_{t-1} + k_tᵀ v_t``, ``o_t = q_t S_t``; q, k, v through SiLU; a slope s a head.

    Slopes are ALiBi's, ``s_h = 2^(-8 (h + 1) / H)``, times ``f = 1 - l / (L - 1) + 1e-5`` in block l of L, so that the
    last blocks hardly forget, as in the released models (MiniMax-01's ``l / (L - 1 + 1e-5)`` is the same to 1e-5).
    RMSNorm over all heads together, times the sigmoid of a gate: MiniMax-01's; with ``gate_rank`` and ``lrpe``,
    TransNormerLLM's. Source: arXiv 2401.04658, 2307.14995, 2501.08313.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        head_dim: width of a head; d_model over ``heads`` if not given.
        gate_rank: numbers between the two layers that make the gate; one layer if not given.
        lrpe: whether queries and keys of the first block become ``[x cos tθ, x sin tθ]``, ``θ_i = 10000^(-2i/d)``, so
            that products fall with distance by cosines; its state is then twice as wide. The angles are the same for
            all heads and not learnt; TransNormerLLM spreads them over all heads and learns them.
        norm_eps: added to the mean square in the norm.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        head_dim: int | None = None,
        gate_rank: int | None = None,
        lrpe: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        width = split_heads("LightningAttention", d_model, heads) if head_dim is None else head_dim
        super().__init__(
            d_model, heads, width, width, gate="sigmoid", gate_rank=gate_rank, norm="row", norm_eps=norm_eps
        )
        self.decay = Constant([-slope for slope in alibi_slopes(heads)])
        self.lrpe = lrpe
        self.state_dim = 2 * width if lrpe else width

    def place(self, layer: int, layers: int) -> None:
        if layer:
            self.lrpe, self.state_dim = False, self.key_dim
        factor = 1 - layer / max(1, layers - 1) + 1e-5
        self.decay = Constant([-slope * factor for slope in alibi_slopes(self.heads)])

    def features(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
        if self.lrpe:
            places = layout.positions if layout.positions.dim() == 2 else layout.positions[..., 0]
            q, k = (lrpe(x, places, [self.key_dim]) for x in (q, k))
        return q, k, v

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _constant(self, self.decay, q, k, v, layout, memory)


class CosFormer2(LinearMixer):
    """Linear attention whose scores fall with distance by cosines: ``q_t·k_s`` summed with ``cos((t - s) θ_i)``.

    ``φ_t(x) = [x cos tθ, x sin tθ]`` of the first half of a head's channels, ``θ_i = base^(-2i/d)``; the other half is
    as it is, so a head's state is 1.5 d wide. q, k through SiLU, no decay; a low-rank sigmoid gate, then RMSNorm of
    each head. Source: arXiv 2406.16690, 2307.09270.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        base: the longest wavelength is about ``2π · base`` tokens.
        norm_eps: added to the mean square in the norm.
        axes: channels of a head for each axis of the positions, such as [16, 24, 24] for time, height and width; all
            for the first axis if not given.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        base: float = 10000.0,
        norm_eps: float = 1e-5,
        axes: Sequence[int] | None = None,
    ) -> None:
        width = split_heads("CosFormer2", d_model, heads)
        positive("CosFormer2", base=base)
        if width % 2:
            raise ValueError(f"CosFormer2 turns half of a head and needs it even, found {width}")
        super().__init__(d_model, heads, width, width, gate="none", norm_eps=norm_eps)
        self.gate_proj = LowRank(d_model, d_model, width)
        self.state_dim = width + width // 2
        self.base, self.axes = base, [width] if axes is None else list(axes)
        check_axes("CosFormer2", self.axes, width)
        if sum(self.axes) != width:
            raise ValueError(f"CosFormer2 needs axes that share the {width} channels of a head, found {self.axes}")
        self.decay = Constant([0.0] * heads)

    def features(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        places = layout.positions if layout.positions.dim() == 2 or len(self.axes) > 1 else layout.positions[..., 0]
        q, k = (lrpe(F.silu(x), places, self.axes, self.base, turning=0.5) for x in (q, k))
        return q, k, v

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _constant(self, self.decay, q, k, v, layout, memory)

    def finish(self, output: Float[Tensor, "b t h v"], hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h v"]:
        return self.normed(output * torch.sigmoid(self.gate_proj(hidden)).view_as(output))
