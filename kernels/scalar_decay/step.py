"""ssd_step: what a Mamba2 mixer does to one token between its projections, short of the norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.dispatch import choose, without_triton
from seqlong.kernels.inputs import shaped, token_marks
from seqlong.kernels.precision import accumulation, as_written
from seqlong.kernels.runtime import triton_runs_on

OFFERED = {
    "triton": "one launch: convolution, scan and both states in Triton",
    "chunked": "torch, any device",
    "reference": "float64",
}
#: Types that the Triton kernel computes in float32.
TRITON_TYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Widest keys of which the Triton kernel holds a few value columns.
WIDEST = 1024


def _offered(xbc: Tensor, ssm: Tensor, differentiated: bool) -> tuple[dict[str, str], str]:
    """The implementations that can serve, and the one to prefer."""
    obstacle = triton_runs_on(xbc.device)
    if xbc.dtype not in TRITON_TYPES:
        obstacle = f"the Triton kernel does not compute in {xbc.dtype}"
    elif ssm.shape[2] > WIDEST:
        obstacle = f"the Triton kernel holds keys up to {WIDEST} wide, not {ssm.shape[2]}"
    elif differentiated:
        obstacle = "the Triton kernel has no gradient"
    if obstacle is None:
        return OFFERED, "triton" if xbc.is_cuda else "chunked"
    return without_triton(OFFERED, obstacle), "chunked"


def ssd_step(
    xbc: Float[Tensor, "b c"],
    dt: Float[Tensor, "b h"],
    conv: Float[Tensor, "b r c"],
    ssm: Float[Tensor, "b h k v"],
    weight: Float[Tensor, "c w"],
    bias: Float[Tensor, "c"] | None,
    a_log: Float[Tensor, "h"],
    *,
    d: Float[Tensor, "h"] | None = None,
    dt_bias: Float[Tensor, "h"] | None = None,
    starts: Bool[Tensor, "b"] | None = None,
    padding: Bool[Tensor, "b"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b h v"], Float[Tensor, "b r c"], Float[Tensor, "b h k v"]]:
    """One token of ``short_conv`` and ``ssd``: ``S = exp(-e^a_log s) S + bᵀ (s x)``, ``y = c S + d x``.

    ``s = softplus(dt + dt_bias)``; x, b, c are the convolution, with SiLU, of the channels. In Triton it is one launch,
    and the states are read and written once; they are not changed in place.

    Args:
        xbc: the projected token: x (h v channels), then b and c (g groups of k channels each); may be a part of a wider
            tensor, which is read where it lies.
        dt: raw steps; may be such a part too.
        conv: the r = w - 1 inputs of the convolution before, the last one last.
        ssm: the state before.
        weight: the convolution's filters, the last column for the token itself (the layout of ``nn.Conv1d``).
        bias: of the convolution.
        a_log: logarithms of the negated rates, as Mamba2 learns them.
        d: weight of the direct path; none if None.
        dt_bias: added to the raw steps.
        starts: True where both states start afresh before the token; no row is both this and padding.
        padding: True where there is no token: the states stay, and y means nothing.
        implementation: ``triton``, ``chunked`` or ``reference``; None lets dispatch choose. Triton has no gradient.

    Returns:
        y in xbc's type, and both states after the token, that of the convolution in xbc's type, the other in float32
        (float64 if xbc is).

    Raises:
        ValueError: shapes or types do not fit together, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2405.21060.
    """
    heads, width, value_width = ssm.shape[1:]
    rest = xbc.shape[1] - heads * value_width
    groups = rest // (2 * width)
    if groups < 1 or rest % (2 * width) or heads % groups:
        raise ValueError(
            f"ssd_step needs {heads} x {value_width} channels, and 2 x {width} for each of the groups that divide the "
            f"heads, found {xbc.shape[1]}"
        )
    if conv.shape[1] != weight.shape[1] - 1:
        raise ValueError(f"ssd_step needs {weight.shape[1] - 1} earlier inputs, found {conv.shape[1]}")
    rows, channels = xbc.shape
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "dt": (dt, (rows, heads)),
        "conv": (conv, (rows, weight.shape[1] - 1, channels)),
        "ssm": (ssm, (rows, heads, width, value_width)),
        "weight": (weight, (channels, weight.shape[1])),
        "bias": (bias, (channels,)),
        **{name: (x, (heads,)) for name, x in (("a_log", a_log), ("d", d), ("dt_bias", dt_bias))},
    }
    shaped("ssd_step", expected)
    token_marks("ssd_step", {"starts": starts, "padding": padding}, (rows,))
    inputs = (xbc, dt, conv, ssm, weight, bias, a_log, d, dt_bias)
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    choice = choose("ssd_step", *_offered(xbc, ssm, differentiated), implementation).implementation
    if choice != "triton":
        kept = torch.float64 if choice == "reference" else accumulation(xbc.dtype)
        return _plain(*inputs, starts, padding, kept)

    from seqlong.kernels.scalar_decay.triton_step import launch, ssd_step_triton

    # A step is short: the op's own time in Python would be seen.
    run = ssd_step_triton if torch.compiler.is_compiling() else launch
    return run(*inputs, starts, padding)


@as_written
def _plain(
    xbc: Tensor,
    dt: Tensor,
    conv: Tensor,
    ssm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_log: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
    kept: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, width, value_width = ssm.shape[1:]
    state = ssm.to(kept)
    earlier = conv.to(xbc.dtype)
    if starts is not None:
        earlier = earlier.masked_fill(starts[:, None, None], 0)
        state = state.masked_fill(starts[:, None, None, None], 0)
    window = torch.cat([earlier, xbc[:, None]], dim=1)  # (b w c)
    mixed = (window.to(kept) * weight.t().to(kept)).sum(dim=1)
    mixed = F.silu(mixed if bias is None else mixed + bias.to(kept))
    after = window[:, 1:] if padding is None else torch.where(padding[:, None, None], earlier, window[:, 1:])
    raw = dt.to(kept) if dt_bias is None else dt.to(kept) + dt_bias.to(kept)
    size = F.softplus(raw if padding is None else raw.masked_fill(padding[:, None], -torch.inf))

    x, b, c = mixed.split([heads * value_width, *[(mixed.shape[1] - heads * value_width) // 2] * 2], dim=1)
    x = x.unflatten(1, (heads, value_width))
    b, c = (y.unflatten(1, (-1, width)).repeat_interleave(heads * width // y.shape[1], dim=1) for y in (b, c))
    decay = (-a_log.to(kept).exp() * size).exp()
    state = decay[..., None, None] * state + b[..., None] * (size[..., None] * x)[:, :, None]
    y = (c[..., None] * state).sum(dim=2)
    if d is not None:
        y = torch.addcmul(y, x, d.to(kept)[:, None])
    return y.to(xbc.dtype), after.contiguous(), state.to(accumulation(xbc.dtype))
