"""selective_scan over chunks side by side: a chunk's tokens in turn, all chunks of a block at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlong.kernels.precision import accumulation, as_written

#: Tokens of a chunk, walked one after another; the chunks of a block walk side by side.
CHUNK = 32
#: Numbers in the states of a block's chunks: few enough to stay near a CPU's caches, many for a GPU.
NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 23}
#: Chunks side by side, rows counted too: at least, and for one row at most.
FEWEST, MOST = 16, 256


def _block(rows: int, size: int, device: torch.device) -> int:
    """Tokens of a block, of which only the state before it is kept for the backward pass."""
    fit = NUMBERS.get(device.type, NUMBERS["cpu"]) // max(1, rows * size)
    return CHUNK * min(MOST, max(1, FEWEST // max(1, rows), fit))


class _Block:
    """Tokens ``start`` to ``stop`` as ``(b m c ...)``, m chunks of c tokens, and how to walk them."""

    def __init__(
        self, start: int, stop: int, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor | None
    ) -> None:
        self.start, self.stop, self.a = start, stop, a
        self.chunk = min(CHUNK, stop - start)
        self.kept, kept = a.dtype, accumulation(x.dtype)
        self.x, self.dt = self.cut(x).to(kept), self.cut(dt).to(kept)  # dt is 0 past the end: nothing decays or writes
        self.b, self.c = (y if y.dim() == 2 else self.cut(y).to(kept) for y in (b, c))
        self.live = None if starts is None else (~self.cut(starts)).to(kept)[..., None, None]
        self.written = self.dt * self.x
        self.decays: dict[int, Tensor] = {}

    def cut(self, y: Tensor) -> Tensor:
        y = y[:, self.start : self.stop]
        more = -y.shape[1] % self.chunk
        if more:
            y = F.pad(y, (0, 0) * (y.dim() - 2) + (0, more))
        return y.unflatten(1, (-1, self.chunk))

    def join(self, y: Tensor) -> Tensor:
        return y.flatten(1, 2)[:, : self.stop - self.start]

    def decay(self, j: int) -> Tensor:
        """Kept: exponentials cost more than memory, and all that walk a block need them."""
        if j not in self.decays:
            decay = (self.dt[:, :, j, None] * self.a).exp()
            self.decays[j] = decay if self.live is None else decay * self.live[:, :, j]
        return self.decays[j]

    def into(self, j: int) -> Tensor:
        return self.b if self.b.dim() == 2 else self.b[:, :, j, :, None]

    def step(self, state: Tensor, j: int) -> Tensor:
        return torch.addcmul(self.decay(j) * state, self.into(j), self.written[:, :, j, None].to(self.kept))

    def read(self, state: Tensor, j: int) -> Tensor:
        if self.c.dim() == 2:
            return _real((self.c * state).sum(dim=2))
        return _real((self.c[:, :, j, None].to(self.kept) @ state)[:, :, 0])

    def reads_back(self, grad: Tensor, j: int) -> Tensor:
        """The gradient of the state from that of what was read."""
        return (self.c.conj() if self.c.dim() == 2 else self.c[:, :, j, :, None]) * grad[:, :, j, None]

    def whole(self) -> Tensor:
        """What each chunk as a whole multiplies a state with."""
        decay = (self.dt.sum(dim=2)[:, :, None] * self.a).exp()
        return decay if self.live is None else decay * self.live.amin(dim=2)

    def entries(self, before: Tensor) -> Tensor:
        """The state before each chunk ``(b m n d)``."""
        count = self.dt.shape[1]
        if count == 1:
            return before[:, None]
        state, whole = self.a.new_zeros(len(before), count, *self.a.shape), self.whole()
        for j in range(self.chunk):
            state = self.step(state, j)
        found = [before]
        for i in range(count - 1):
            found.append(torch.addcmul(state[:, i], whole[:, i], found[-1]))
        return torch.stack(found, dim=1)


def _real(y: Tensor) -> Tensor:
    return y.real if y.is_complex() else y


def _like(grad: Tensor, of: Tensor) -> Tensor:
    return (grad if of.is_complex() else _real(grad)).to(of.dtype)


def _scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor | None, state: Tensor) -> list[Any]:
    """Walk the blocks: y, the state after, the state before each block."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    state, before = state.to(a.dtype), []
    size = _block(len(x), a.numel(), x.device)
    for start in range(0, x.shape[1], size):
        before.append(state)
        block = _Block(start, min(start + size, x.shape[1]), x, dt, a, b, c, starts)
        walk, read = block.entries(state), []
        for j in range(block.chunk):
            walk = block.step(walk, j)
            read.append(block.read(walk, j))
        y[:, start : block.stop] = block.join(torch.stack(read, dim=2))
        state = walk[:, -1]
    return [y, state.clone(), torch.stack(before, dim=1) if before else state.new_empty(len(x), 0, *a.shape)]


_SCHEMA = (
    "(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? starts, Tensor state) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("seqlong::selective_scan", mutates_args=(), schema=_SCHEMA)
@as_written
def selective_scan_chunked(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``selective_scan``; a, constant b and c, and the state are of one type. Third: states before blocks."""
    y, after, before = _scan(x, dt, a, b, c, starts, state)
    return y, after, before


@selective_scan_chunked.register_fake
def _(x, dt, a, b, c, starts, state):  # type: ignore[no-untyped-def]
    size = _block(len(x), a.numel(), x.device)
    count = (x.shape[1] + size - 1) // size
    plain = torch.contiguous_format
    return torch.empty_like(x, memory_format=plain), state.new_empty(state.shape), a.new_empty(len(x), count, *a.shape)


@torch.library.custom_op(
    "seqlong::selective_scan_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? grad_state, Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? starts, "
    "Tensor before) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def _backward_op(
    grad: Tensor, grad_state: Tensor | None, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor,
    starts: Tensor | None, before: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, a, b, c and the state: blocks from the right, the states in one computed again."""
    kept = accumulation(x.dtype)
    dx, ddt, db, dc = (torch.zeros_like(y, memory_format=torch.contiguous_format) for y in (x, dt, b, c))
    da = torch.zeros_like(a)
    carried = a.new_zeros(len(x), *a.shape) if grad_state is None else grad_state.to(a.dtype)
    size = _block(len(x), a.numel(), x.device)
    for number in reversed(range(before.shape[1])):
        start = number * size
        block = _Block(start, min(start + size, x.shape[1]), x, dt, a, b, c, starts)
        gradient = block.cut(grad).to(kept)
        states = [block.entries(before[:, number])]
        for j in range(block.chunk):
            states.append(block.step(states[-1], j))
        walk, carried = _from_the_right(block, gradient, carried)
        parts: dict[str, list[Tensor]] = {"x": [], "dt": [], "b": [], "c": []}
        for j in reversed(range(block.chunk)):
            walk = walk + block.reads_back(gradient, j)
            seen, written, out = states[j + 1].conj(), block.written[:, :, j, None], gradient[:, :, j, None]
            parts["c"].append((seen * out).sum(dim=(0, 1) if c.dim() == 2 else 3))
            parts["b"].append((walk * written).sum(dim=(0, 1) if b.dim() == 2 else 3))
            parts["x"].append(_real((walk * block.into(j).conj()).sum(dim=2)))
            walk = block.decay(j).conj() * walk  # now of the state before the token
            rate = walk * states[j].conj()  # of the decay's logarithm
            parts["dt"].append(_real((rate * a.conj()).sum(dim=2)))
            da += (rate * block.dt[:, :, j, None]).sum(dim=(0, 1))
        through = {name: torch.stack(found[::-1], dim=0) for name, found in parts.items()}
        of_written = through["x"].movedim(0, 2)
        dx[:, start : block.stop] = block.join(of_written * block.dt).to(x.dtype)
        ddt[:, start : block.stop] = block.join(of_written * block.x + through["dt"].movedim(0, 2)).to(dt.dtype)
        for name, total, of in (("b", db, b), ("c", dc, c)):
            if of.dim() == 2:
                total += _like(through[name].sum(dim=0), of)
            else:
                total[:, start : block.stop] = _like(block.join(through[name].movedim(0, 2)), of)
    return dx, ddt, da, db, dc, carried


def _from_the_right(block: _Block, gradient: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the state after each chunk, and of that before the block."""
    walk, whole = torch.zeros_like(block.decay(0)), block.whole().conj()
    for j in reversed(range(block.chunk)):
        walk = block.decay(j).conj() * (walk + block.reads_back(gradient, j))
    found = [after]
    for i in reversed(range(walk.shape[1])):
        found.append(torch.addcmul(walk[:, i], whole[:, i], found[-1]))
    return torch.stack(found[-2::-1], dim=1), found[-1]


@_backward_op.register_fake
def _(grad, grad_state, x, dt, a, b, c, starts, before):  # type: ignore[no-untyped-def]
    plain = torch.contiguous_format
    return (*(torch.empty_like(y, memory_format=plain) for y in (x, dt, a, b, c)), a.new_empty(len(x), *a.shape))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:6], output[2])


def _backward(ctx, grad, grad_state, _):  # type: ignore[no-untyped-def]
    x, dt, a, b, c, starts, before = ctx.saved_tensors
    dx, ddt, da, db, dc, dstate = _backward_op(grad, grad_state, x, dt, a, b, c, starts, before)
    return dx, ddt, da, db, dc, None, dstate


selective_scan_chunked.register_autograd(_backward, setup_context=_setup_context)
