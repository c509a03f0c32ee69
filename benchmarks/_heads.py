"""The baseline of ``parallel``: recurrent layers that exchange positions for heads, as Ulysses does (arXiv 2309.14509).

Each process runs whole rows for a part of the heads. What all heads share (Mamba2's B and C) is gathered.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqlong.backbone import Backbone
from seqlong.errors import ConfigError
from seqlong.fragment import Fragment
from seqlong.kernels.delta_rule import delta_rule
from seqlong.kernels.scalar_decay import ssd
from seqlong.layout import SequenceLayout
from seqlong.mixers import GatedDeltaNet, Mamba2
from seqlong.mixers.linear import still
from seqlong.mixers.recurrences import short_conv


def exchange_heads(backbone: Backbone) -> None:
    """Make its Mamba2 and Gated DeltaNet layers exchange heads where rows are shared."""
    for block in backbone.blocks:
        if isinstance(block.mixer, Mamba2):
            block.mixer.__class__ = _Mamba2
        elif isinstance(block.mixer, GatedDeltaNet):
            block.mixer.__class__ = _GatedDeltaNet
        elif block.mixer.bounded_state:  # type: ignore[union-attr]
            raise ConfigError(f"--recurrent heads is for Mamba2 and GatedDeltaNet; found {type(block.mixer).__name__}")


class _Mamba2(Mamba2):
    def _scan(
        self, xbc: Tensor, dt: Tensor, starts: Any, padding: Any, lengths: Any, state: Any, fragment: Fragment | None
    ) -> tuple[Tensor, Any]:
        if fragment is None:
            return super()._scan(xbc, dt, starts, padding, lengths, state, fragment)
        xbc, _ = short_conv(
            xbc, self.conv1d.weight.squeeze(1), self.conv1d.bias, starts=starts, lengths=lengths, output_state=False,
            fragment=fragment,
        )  # fmt: skip
        x, b, c = xbc.split([self.d_inner, *[self.groups * self.d_state] * 2], dim=-1)
        b, c = (fragment.join(part.unflatten(2, (self.groups, self.d_state))) for part in (b, c))
        x, dt = fragment.to_heads(x.unflatten(2, (self.heads, self.head_dim))), fragment.to_heads(dt[..., None])[..., 0]
        rates, d, bias = (y.chunk(fragment.size)[fragment.rank] for y in (-self.A_log.exp(), self.D, self.dt_bias))
        if self.groups > 1:
            b, c = (part.chunk(fragment.size, dim=2)[fragment.rank] for part in (b, c))
        y, _ = ssd(x, dt.contiguous(), rates, b, c, d=d, dt_bias=bias, starts=fragment.whole.starts)
        return fragment.to_positions(y), None


class _GatedDeltaNet(GatedDeltaNet):
    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Any
    ) -> tuple[Tensor, Any]:
        fragment = layout.fragment
        if fragment is None:
            return super().recur(q, k, v, hidden, layout, memory)
        if self.groups != self.heads:
            raise ConfigError("--recurrent heads needs as many groups as heads in GatedDeltaNet")
        padding = layout.padding
        beta, decay = (still(part(hidden), padding, -float("inf")) for part in (self.beta_proj, self.decay_proj))
        q, k, v, beta, decay = (fragment.to_heads(x) for x in (q, k, v, beta[..., None], decay[..., None]))
        rate, bias = (x.chunk(fragment.size)[fragment.rank] for x in (-self.A_log.exp(), self.dt_bias))
        output, _ = delta_rule(
            q, k, v, beta[..., 0], decay[..., 0], normalize=True, beta_activation=self.activation,
            gate_activation="softplus", rate=rate, gate_bias=bias, starts=fragment.whole.starts,
        )  # fmt: skip
        return fragment.to_positions(output) * self.key_dim**-0.5, memory
