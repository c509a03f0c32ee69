"""The other linear families of benchmarks/kernels.py: decays a channel, delta rules, RWKV-7."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _measure import Family, Inputs
from torch import Tensor

Call = Callable[[Inputs], Tensor]
#: Positions of a chunk for which operations are counted.
CHUNK = 64


def _drawn(rows: int, length: int, heads: int, width: int, device: torch.device, count: int) -> list[Tensor]:
    return [torch.randn(rows, length, heads, width, device=device).bfloat16() for _ in range(count)]


def _flops(heads: int, width: int, delta: bool) -> float:
    """Of one position, forward and backward, in chunks, each product once; a delta rule has two more by a state."""
    inside, state = CHUNK * width, width * width
    forward = 2 * inside + 2 * state + delta * (2 * inside + state)
    return 2.0 * heads * 3 * forward


# -- Inputs ------------------------------------------------------------------------------------------------------------


def _gla_inputs(heads: int, width: int) -> Callable[[int, int, torch.device], Inputs]:
    def make(rows: int, length: int, device: torch.device) -> Inputs:
        q, k, v, gate = _drawn(rows, length, heads, width, device, 4)
        return {"q": q * width**-0.5, "k": k, "v": v, "gate": gate}

    return make


def _delta_inputs(heads: int, width: int, gate: str) -> Callable[[int, int, torch.device], Inputs]:
    def make(rows: int, length: int, device: torch.device) -> Inputs:
        q, k, v = _drawn(rows, length, heads, width, device, 3)
        # Of length one here, so that nobody's own normalisation is timed.
        found = {"q": F.normalize(q.float(), dim=-1).bfloat16(), "k": F.normalize(k.float(), dim=-1).bfloat16(), "v": v,
                 "beta": torch.rand(rows, length, heads, device=device).bfloat16()}  # fmt: skip
        shape = {"none": (), "head": (rows, length, heads), "channel": (rows, length, heads, width)}[gate]
        if shape:
            found["gate"] = F.logsigmoid(torch.randn(*shape, device=device) + 3)
        return found

    return make


def _rwkv7_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    q, k, v, a, b, w = _drawn(rows, length, 16, 64, device, 6)
    key = F.normalize(a.float(), dim=-1)
    return {"q": q, "k": k / 8, "v": v, "a": (-key).bfloat16(), "b": (key * b.float().sigmoid()).bfloat16(),
            "w": -0.6065 * w.float().sigmoid()}  # fmt: skip


# -- Ours --------------------------------------------------------------------------------------------------------------


def gla(x: Inputs, implementation: str | None) -> Tensor:
    from seqlong.kernels.vector_decay import vector_decay

    return vector_decay(x["q"], x["k"], x["v"], x["gate"], activation="logsigmoid", divisor=16.0,
                        implementation=implementation)[0]  # fmt: skip


def delta(x: Inputs, implementation: str | None) -> Tensor:
    from seqlong.kernels.delta_rule import delta_rule

    return delta_rule(x["q"], x["k"], x["v"], x["beta"], x.get("gate"), implementation=implementation)[0]


def rwkv7(x: Inputs, implementation: str | None) -> Tensor:
    from seqlong.kernels.dplr import dplr

    return dplr(x["q"], x["k"], x["v"], x["a"], x["b"], x["w"], implementation=implementation)[0]


# -- fla's -------------------------------------------------------------------------------------------------------------


def _fla_gla(x: Inputs) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(x["q"], x["k"], x["v"], F.logsigmoid(x["gate"].float()) / 16, scale=1.0)[0]


def _fla_delta(x: Inputs) -> Tensor:
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"], scale=1.0)[0]


def _fla_gated_delta(x: Inputs) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["gate"], x["beta"], scale=1.0)[0]


def _fla_kda(x: Inputs) -> Tensor:
    from fla.ops.kda import chunk_kda

    return chunk_kda(x["q"], x["k"], x["v"], x["gate"], x["beta"], scale=1.0)[0]


def _fla_rwkv7(x: Inputs) -> Tensor:
    from fla.ops.rwkv7 import chunk_rwkv7

    return chunk_rwkv7(x["q"], x["w"], x["k"], x["v"], x["a"], x["b"], scale=1.0)[0]


# -- Tables ------------------------------------------------------------------------------------------------------------

_GLA, _DELTA, _RWKV = ("q", "k", "v", "gate"), ("q", "k", "v", "beta"), ("q", "k", "v", "a", "b", "w")
FAMILIES = {
    "gla": Family(_gla_inputs(16, 64), _GLA, _GLA, lambda x: gla(x, "chunked"), _flops(16, 64, False)),
    "gla_128": Family(_gla_inputs(8, 128), _GLA, _GLA, lambda x: gla(x, "chunked"), _flops(8, 128, False)),
    "delta_rule": Family(
        _delta_inputs(8, 128, "none"), _DELTA, _DELTA, lambda x: delta(x, "chunked"), _flops(8, 128, True)
    ),
    "gated_delta_rule": Family(
        _delta_inputs(8, 128, "head"), (*_DELTA, "gate"), (*_DELTA, "gate"), lambda x: delta(x, "chunked"),
        _flops(8, 128, True),
    ),
    "kda": Family(
        _delta_inputs(8, 128, "channel"), (*_DELTA, "gate"), (*_DELTA, "gate"), lambda x: delta(x, "chunked"),
        _flops(8, 128, True),
    ),
    "rwkv7": Family(_rwkv7_inputs, _RWKV, _RWKV, lambda x: rwkv7(x, "chunked"), _flops(16, 64, True)),
}  # fmt: skip
OURS: dict[str, Callable[[Inputs, str | None], Tensor]] = {
    "gla": gla, "gla_128": gla, "delta_rule": delta, "gated_delta_rule": delta, "kda": delta, "rwkv7": rwkv7
}  # fmt: skip
FLA: dict[str, tuple[str, Call]] = {
    "gla": ("fla-core gla", _fla_gla),
    "gla_128": ("fla-core gla", _fla_gla),
    "delta_rule": ("fla-core delta_rule", _fla_delta),
    "gated_delta_rule": ("fla-core gated_delta_rule", _fla_gated_delta),
    "kda": ("fla-core kda", _fla_kda),
    "rwkv7": ("fla-core rwkv7", _fla_rwkv7),
}
