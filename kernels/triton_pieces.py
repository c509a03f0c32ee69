"""Parts of Triton kernels that go along a row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segment_of_program(H, NC, NS, CPS, TILES: tl.constexpr):
    """What this program walks: head, tile, segment, row, the segment's first chunk, and how many chunks it has."""
    pid = tl.program_id(0)
    h = pid % H
    r = pid // H
    tile = r % TILES
    r = r // TILES
    s = r % NS
    row = (r // NS).to(tl.int64)
    first = s * CPS
    return h, tile, s, row, first, tl.minimum(CPS, NC - first)


@triton.jit
def chunk_of_program(H, N, C: tl.constexpr):
    """What this program makes: chunk, head, row, the chunk's first token, and its number among all chunks."""
    pid = tl.program_id(0)
    n = pid % N
    h = (pid // N) % H
    row = (pid // N // H).to(tl.int64)
    return n, h, row, (n * C).to(tl.int64), (row * H + h) * N + n


@triton.jit
def softplus(x):
    """log(1 + e^x), accurate to float32 where e^x is small: small steps are what Mamba2 starts with."""
    small = tl.exp(tl.minimum(x, 20.0))
    series = small * (1.0 - small * (0.5 - small * (0.3333333333 - small * 0.25)))
    return tl.where(x > 20.0, x, tl.where(small < 0.015625, series, tl.log(1.0 + small)))
