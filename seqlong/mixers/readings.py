"""What ``Bidirectional`` can make of a mixer, and the recurrence of a linear mixer read from both ends at once."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqlong.kernels.scalar_decay import bidirectional_decay
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer
from seqlong.mixers.feature_maps import Based, Hedgehog
from seqlong.mixers.gla import SimpleGLA
from seqlong.mixers.linear import Constant, LinearMixer, precise, still
from seqlong.mixers.mlstm import MLSTM

#: ``one op``: the readings are added inside of ``bidirectional_decay``. ``joined``: before norm and gate, one scan
#: each. ``twice``: the whole mixer runs from either end. ``none``: it cannot be turned around.
Form = Literal["one op", "joined", "twice", "none"]


def bidirectional_form(mixer: Mixer) -> Form:
    """The closest that the two readings of ``mixer`` can be brought together."""
    if not mixer.causal or mixer.reads_memory:
        return "none"
    own = any(getattr(type(mixer), name) is not getattr(LinearMixer, name, None) for name in ("forward", "publish"))
    if own or not isinstance(mixer, LinearMixer):
        return "twice"
    if isinstance(mixer, MLSTM) and mixer.exponential:  # it divides each reading by a sum of its own
        return "twice"
    return "one op" if isinstance(mixer, SimpleGLA) or isinstance(getattr(mixer, "decay", None), Constant) else "joined"


def join_readings(mixer: LinearMixer, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> Float[Tensor, "b t d"]:
    """LION: ``finish(o_t) W``, o the recurrence read from the left plus from the right, the token itself counted once.

    q, k, v, gates, the norm and the last projection are made once, for a half of the products of two mixers. For a
    decay g a head and q, k, v: ``o_t = Σ_s exp(sum of g between s and t) (q_t·k_s) v_s`` over the whole segment. In
    general the right is ``recur`` of the reversed row, and what a token reads of itself is ``recur`` of it alone.

    Args:
        mixer: one whose ``bidirectional_form`` is ``one op`` or ``joined``, without a convolution.
        hidden: what to mix.
        layout: where segments begin and end.

    Source: arXiv 2502.16249.
    """
    padding = layout.padding
    hidden = still(hidden, padding, 0.0)
    q, k, v = mixer.qkv_proj(hidden).split(list(mixer.widths), dim=-1)
    q, k = (x.unflatten(2, (mixer.groups, mixer.key_dim)) for x in (q, k))
    q, k, v = mixer.features(q, k, v.unflatten(2, (mixer.heads, mixer.value_dim)), layout)
    k = still(k, padding, 0.0)
    if bidirectional_form(mixer) == "one op":
        read = _in_one_op(mixer, q, k, v, hidden, layout)
    else:
        read = by_definition(mixer, q, k, v, hidden, layout)
    return mixer.out_proj(mixer.finish(read, hidden).flatten(2))


def by_definition(
    mixer: LinearMixer,
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    hidden: Float[Tensor, "b t d"],
    layout: SequenceLayout,
) -> Float[Tensor, "b t h w"]:
    """``right + left - alone``, for any ``recur``: three scans, of which the last has segments of one token."""
    rightward, _ = mixer.recur(q, k, v, hidden, layout, None)
    turned = [layout.reverse(x) for x in (q, k, v, hidden)]
    leftward, _ = mixer.recur(turned[0], turned[1], turned[2], turned[3], layout.reversed, None)
    rows, length = layout.shape
    each = torch.arange(1, length + 1, dtype=torch.int32, device=hidden.device).expand(rows, length)
    each = each if layout.padding is None else each.masked_fill(layout.padding, 0)
    alone, _ = mixer.recur(q, k, v, hidden, SequenceLayout.build(rows, length, each), None)
    return rightward + layout.reverse(leftward) - alone


def _in_one_op(mixer: LinearMixer, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout) -> Tensor:
    """The same where ``recur`` is ``scalar_decay`` with gates that do not ask for the order."""
    if isinstance(mixer, SimpleGLA):
        gate = mixer.decay_proj(hidden)
        decay = F.logsigmoid(precise(gate, gate)) / mixer.divisor
        q = q * mixer.key_dim**-0.5
    else:
        constant = mixer.decay
        assert isinstance(constant, Constant)
        decay = constant(v).expand(*v.shape[:2], mixer.heads)
    if isinstance(mixer, Based | Hedgehog):  # whose denominator is one more value
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    return bidirectional_decay(q, k, v, still(decay, layout.padding, 0.0), starts=layout.starts)
