"""short_conv: a depthwise causal convolution over a few tokens, with SiLU, packed segments and carried state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqlong.kernels.dispatch import choose, without_triton
from seqlong.kernels.inputs import floating, is_here, said, shaped, token_marks
from seqlong.kernels.precision import accumulation, as_written
from seqlong.kernels.runtime import triton_runs_on
from seqlong.kernels.short_conv.reference import short_conv_reference

OFFERED = {
    "triton": "one pass over the row in Triton",
    "chunked": "tiles of the row in torch, any device",
    "reference": "float64 loop over tokens",
}
#: Types that the Triton kernels compute in float32.
TRITON_TYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Most taps of which the Triton kernels hold the inputs in registers: they are written out for as many.
TRITON_TAPS = 4
#: Tokens handled at a time on a CPU, so that the taps of one slice stay in cache.
TILE = 1024


def _clear(starts: Tensor | None, taps: int) -> list[Tensor | None]:
    """For each distance j < taps, (b t 1) whether the token j before t belongs to the same segment."""
    if starts is None:
        return [None] * taps
    same = torch.ones_like(starts)
    masks: list[Tensor | None] = [None]
    for j in range(1, taps):
        shifted = starts if j == 1 else F.pad(starts, (j - 1, 0))[:, : starts.shape[1]]
        same = same & ~shifted
        masks.append(same[..., None])
    return masks


def _preactivation(padded: Tensor, weight: Tensor, bias: Tensor | None, masks: list[Tensor | None]) -> Tensor:
    """(b t d) from inputs with the state in front, (b taps-1+t d)."""
    taps = weight.shape[1]
    length = padded.shape[1] - (taps - 1)
    result = padded[:, taps - 1 :] * weight[:, -1]
    for j in range(1, taps):
        source = padded[:, taps - 1 - j : taps - 1 - j + length]
        mask = masks[j]
        result.addcmul_(source if mask is None else source * mask, weight[:, taps - 1 - j])
    return result if bias is None else result.add_(bias)


def _windows(x: Tensor, state: Tensor, a: int, z: int) -> Tensor:
    """Inputs a to z with the taps - 1 inputs before them, (b z-a+taps-1 d)."""
    reach = state.shape[1]
    before = state[:, a:] if a < reach else state[:, :0]
    return torch.cat([before, x[:, max(0, a - reach) : z]], dim=1)


@torch.library.custom_op(
    "seqlong::short_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? starts, Tensor state) -> Tensor",
)
@as_written
def _short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, state: Tensor) -> Tensor:
    kept = accumulation(x.dtype)
    masks = _clear(starts, weight.shape[1])
    w, b = weight.to(kept), None if bias is None else bias.to(kept)
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    for a, z in _tiles(x):
        part = _windows(x, state, a, z).to(kept)
        output[:, a:z] = F.silu(_preactivation(part, w, b, [m if m is None else m[:, a:z] for m in masks]))
    return output


@_short_conv.register_fake
def _(x, weight, bias, starts, state):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _tiles(x: Tensor) -> list[tuple[int, int]]:
    length = x.shape[1]
    tile = TILE if x.device.type == "cpu" else 65536
    return [(a, min(a + tile, length)) for a in range(0, length, tile)]


@torch.library.custom_op(
    "seqlong::short_conv_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? starts, Tensor state) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def _short_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (zeros without one) and state; the pre-activation is recomputed."""
    kept, (length, width), taps = accumulation(x.dtype), x.shape[1:], weight.shape[1]
    masks = _clear(starts, taps)
    w, b = weight.to(kept), None if bias is None else bias.to(kept)
    grad_padded = torch.zeros(x.shape[0], taps - 1 + length, width, dtype=kept, device=x.device)
    grad_weight, grad_bias = torch.zeros_like(w), torch.zeros(width, dtype=kept, device=x.device)
    for a, z in _tiles(x):
        part = _windows(x, state, a, z).to(kept)
        local = [m if m is None else m[:, a:z] for m in masks]
        pre = _preactivation(part, w, b, local)
        gate = pre.sigmoid()
        inner = grad[:, a:z].to(kept) * (gate * (1 + pre * (1 - gate)))
        grad_bias += inner.sum(dim=(0, 1))
        for j in range(taps):
            mask, column = local[j], taps - 1 - j
            masked = inner if mask is None else inner * mask
            grad_weight[:, column] += (masked * part[:, column : column + z - a]).sum(dim=(0, 1))
            grad_padded[:, a + column : z + column].addcmul_(masked, w[:, column])
    return (
        grad_padded[:, taps - 1 :].to(x.dtype, copy=True),
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype),
        grad_padded[:, : taps - 1].to(state.dtype, copy=True),
    )


@_short_conv_backward.register_fake
def _(grad, x, weight, bias, starts, state):  # type: ignore[no-untyped-def]
    plain = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=plain),
        torch.empty_like(weight, memory_format=plain),
        weight.new_empty(weight.shape[0]),
        torch.empty_like(state, memory_format=plain),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, starts, state = inputs
    ctx.save_for_backward(x, weight, bias, starts, state)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, bias, starts, state = ctx.saved_tensors
    dx, dw, db, ds = _short_conv_backward(grad, x, weight, bias, starts, state)
    return dx, dw, None if bias is None else db, None, ds


_short_conv.register_autograd(_backward, setup_context=_setup_context)


def _offered(x: Tensor, weight: Tensor) -> tuple[dict[str, str], str]:
    """The implementations that can serve, and the one to prefer."""
    obstacle = triton_runs_on(x.device)
    if x.dtype not in TRITON_TYPES:
        obstacle = f"the Triton kernels do not compute in {x.dtype}"
    elif weight.shape[1] > TRITON_TAPS:
        obstacle = f"the Triton kernels hold {TRITON_TAPS} taps, not {weight.shape[1]}"
    if obstacle is None:
        return OFFERED, "triton" if x.is_cuda else "chunked"
    return without_triton(OFFERED, obstacle), "chunked"


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    starts: Tensor | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> None:
    """Raise a ValueError that names what does not fit, what was expected and what was found."""
    if x.dim() != 3 or weight.dim() != 2 or not weight.shape[1]:
        raise ValueError(f"short_conv needs x (b t d) and weight (d w) with a tap, found {said(x)}, {said(weight)}")
    floating("short_conv", {"x": x, "weight": weight, "bias": bias, "state": state})
    rows, length, width = x.shape
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "weight": (weight, (width, weight.shape[1])),
        "bias": (bias, (width,)),
        "state": (state, (rows, weight.shape[1] - 1, width)),
        "lengths": (lengths, (rows,)),
    }
    shaped("short_conv", expected)
    if lengths is not None and (lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise ValueError(f"short_conv needs lengths in whole numbers, found {said(lengths)}")
    # On a GPU looking would wait for it.
    if lengths is not None and lengths.device.type == "cpu" and lengths.numel() and is_here(lengths):
        least, most = lengths.aminmax()
        if least < 0 or most > length:
            raise ValueError(f"short_conv needs lengths from 0 to {length}, found {int(least)} to {int(most)}")
    token_marks("short_conv", {"starts": starts}, (rows, length), {"x": x})


def short_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None = None,
    *,
    starts: Bool[Tensor, "b t"] | None = None,
    state: Float[Tensor, "b r d"] | None = None,
    lengths: Int[Tensor, "b"] | None = None,
    output_state: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b r d"] | None]:
    """``y_t = silu(Σ_j weight[:, w-1-j] x_{t-j} + bias)`` over the w tokens up to t of the same segment.

    Args:
        x: inputs; may be a part of a wider tensor, which is read where it lies.
        weight: one filter a channel, the last column for the token itself (the layout of ``nn.Conv1d``).
        bias: per channel.
        starts: True at tokens where a segment starts; earlier tokens are not seen from there on.
        state: the r = w - 1 inputs before the first; zero if None.
        lengths: tokens of each row before its padding; all if None. Only the state after the row depends on it.
        output_state: also return the state after the row.
        implementation: ``triton``, ``chunked`` or ``reference``; None lets dispatch choose.

    Only x is kept for the backward pass; the pre-activation is computed again.

    Raises:
        ValueError: shapes or types do not fit, or the implementation asked for cannot serve the inputs.
    """
    check(x, weight, bias, starts, state, lengths)
    choice = choose("short_conv", *_offered(x, weight), implementation).implementation
    if choice == "reference":
        output = short_conv_reference(x, weight, bias, starts, state)[0]
        return output, _after(x, weight, starts, state, lengths) if output_state else None
    if choice == "chunked":
        before = _nothing(x, weight) if state is None else state
        output = _short_conv(x, weight, bias, starts, before)
        return output, _after(x, weight, starts, before, lengths) if output_state else None

    from seqlong.kernels.short_conv.triton import short_conv_step, short_conv_triton

    if output_state and x.shape[1] == 1 and lengths is None and not _differentiated(x, weight, bias, state):
        return short_conv_step(x, weight, bias, starts, _nothing(x, weight) if state is None else state)
    output = short_conv_triton(x, weight, bias, starts, state)
    return output, _after(x, weight, starts, state, lengths) if output_state else None


def _nothing(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])


def _differentiated(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _after(x: Tensor, weight: Tensor, starts: Tensor | None, state: Tensor | None, lengths: Tensor | None) -> Tensor:
    return _final_state(x, _nothing(x, weight) if state is None else state, starts, lengths)


def _final_state(x: Tensor, before: Tensor, starts: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The last inputs of each row's last segment, zero where that segment is shorter than the filter."""
    reach, length = before.shape[1], x.shape[1]
    if lengths is None:
        end = torch.full((x.shape[0],), length, device=x.device)
    else:
        end = lengths
    where = end[:, None] - reach + torch.arange(reach, device=x.device)  # input index, negative for the state
    width = (-1, -1, x.shape[2])
    result = before.to(x.dtype).gather(1, (where + reach).clamp(0, max(reach - 1, 0))[..., None].expand(width))
    if length:
        recent = x.gather(1, where.clamp(min=0)[..., None].expand(width))
        result = torch.where(where[..., None] >= 0, recent, result)
    if starts is not None:
        steps = torch.arange(length, device=x.device)
        last_start = torch.where(starts, steps, -reach - 1).amax(dim=1) if length else end * 0 - reach - 1
        result = result * (where >= last_start[:, None])[..., None]
    return result


def tail(
    x: Float[Tensor, "b t d"], reach: int, starts: Bool[Tensor, "b t"] | None, lengths: Int[Tensor, "b"] | None
) -> tuple[Float[Tensor, "b r d"], Int[Tensor, "b"]]:
    """The last ``reach`` inputs of each row's last segment, zero where it has fewer; and how many of them, counted from
    the last, nothing from before the row can take the place of: all where a segment starts in the row."""
    last = _final_state(x, x.new_zeros(x.shape[0], reach, x.shape[2]), starts, lengths)
    count = torch.full((x.shape[0],), x.shape[1], device=x.device) if lengths is None else lengths
    fresh = count.clamp(max=reach)
    return last, fresh if starts is None else torch.where(starts.any(dim=1), reach, fresh)
