"""Families of benchmarks/kernels.py that came later: next tokens of every recurrence, and log-linear attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _linear import _delta_inputs, _drawn, _gla_inputs, _rwkv7_inputs
from _measure import Family, Inputs
from torch import Tensor

Call = Callable[[Inputs], Tensor]
Ours = Callable[[Inputs, str | None], Tensor]


# -- Next tokens: one, or a small chunk --------------------------------------------------------------------------------


def _with_state(make: Callable[[int, int, torch.device], Inputs], heads: int, width: int) -> Callable[..., Inputs]:
    def made(rows: int, length: int, device: torch.device) -> Inputs:
        return {**make(rows, length, device), "state": torch.randn(rows, heads, width, width, device=device)}

    return made


def _gla_step(x: Inputs, implementation: str | None) -> Tensor:
    from seqlong.kernels.vector_decay import vector_decay_step

    return vector_decay_step(x["q"], x["k"], x["v"], x["gate"], x["state"], activation="logsigmoid", divisor=16.0,
                             implementation=implementation)[0]  # fmt: skip


def _delta_step(x: Inputs, implementation: str | None) -> Tensor:
    from seqlong.kernels.delta_rule import delta_rule_step

    return delta_rule_step(x["q"], x["k"], x["v"], x["beta"], x.get("gate"), x["state"],
                           implementation=implementation)[0]  # fmt: skip


def _rwkv7_step(x: Inputs, implementation: str | None) -> Tensor:
    from seqlong.kernels.dplr import dplr_step

    return dplr_step(x["q"], x["k"], x["v"], x["a"], x["b"], x["w"], x["state"], implementation=implementation)[0]


def _fla_gla_step(x: Inputs) -> Tensor:
    from fla.ops.gla import fused_recurrent_gla

    return fused_recurrent_gla(x["q"], x["k"], x["v"], F.logsigmoid(x["gate"].float()) / 16, scale=1.0,
                               initial_state=x["state"], output_final_state=True)[0]  # fmt: skip


def _fla_delta_step(x: Inputs) -> Tensor:
    from fla.ops.delta_rule import fused_recurrent_delta_rule

    return fused_recurrent_delta_rule(x["q"], x["k"], x["v"], x["beta"], scale=1.0, initial_state=x["state"],
                                      output_final_state=True)[0]  # fmt: skip


def _fla_gated_step(x: Inputs) -> Tensor:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    return fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], g=x["gate"], beta=x["beta"], scale=1.0,
                                            initial_state=x["state"], output_final_state=True)[0]  # fmt: skip


def _fla_kda_step(x: Inputs) -> Tensor:
    from fla.ops.kda import fused_recurrent_kda

    return fused_recurrent_kda(x["q"], x["k"], x["v"], x["gate"], x["beta"], scale=1.0, initial_state=x["state"],
                               output_final_state=True)[0]  # fmt: skip


def _fla_rwkv7_step(x: Inputs) -> Tensor:
    from fla.ops.rwkv7 import fused_recurrent_rwkv7

    return fused_recurrent_rwkv7(x["q"], x["w"], x["k"], x["v"], x["a"], x["b"], scale=1.0, initial_state=x["state"],
                                 output_final_state=True)[0]  # fmt: skip


# -- Log-linear attention ----------------------------------------------------------------------------------------------


def _log_linear_inputs(delta: bool) -> Callable[[int, int, torch.device], Inputs]:
    """Shapes of simple_gla and gated_delta_rule; a weight near one for each power of two of the length."""

    def make(rows: int, length: int, device: torch.device) -> Inputs:
        heads, width = (8, 128) if delta else (16, 64)
        drawn: Inputs
        if delta:
            drawn = _delta_inputs(heads, width, "head")(rows, length, device)
        else:
            q, k, v = _drawn(rows, length, heads, width, device, 3)
            drawn = {"q": q * width**-0.5, "k": k, "v": v,
                     "gate": F.logsigmoid(torch.randn(rows, length, heads, device=device) + 3)}  # fmt: skip
        levels = (length - 1).bit_length() + 1
        return {**drawn, "levels": F.softplus(torch.randn(rows, length, heads, levels, device=device) + 0.5)}

    return make


def log_linear(x: Inputs, implementation: str | None) -> Tensor:
    from seqlong.kernels.log_linear import log_linear

    return log_linear(x["q"], x["k"], x["v"], x["gate"], x["levels"], beta=x.get("beta"),
                      implementation=implementation)[0]  # fmt: skip


def _fla_log_linear(x: Inputs) -> Tensor:
    from fla.ops.log_linear_attn import chunk_log_linear_attn

    return chunk_log_linear_attn(x["q"], x["k"], x["v"], x["gate"], x["levels"])[0]


# -- Tables ------------------------------------------------------------------------------------------------------------

_STEPS: dict[str, tuple[Callable[..., Inputs], Ours, str, Call]] = {
    "decode_gla": (_with_state(_gla_inputs(16, 64), 16, 64), _gla_step, "gla", _fla_gla_step),
    "decode_delta_rule": (
        _with_state(_delta_inputs(8, 128, "none"), 8, 128), _delta_step, "delta_rule", _fla_delta_step
    ),
    "decode_gated_delta_rule": (
        _with_state(_delta_inputs(8, 128, "head"), 8, 128), _delta_step, "gated_delta_rule", _fla_gated_step
    ),
    "decode_kda": (_with_state(_delta_inputs(8, 128, "channel"), 8, 128), _delta_step, "kda", _fla_kda_step),
    "decode_rwkv7": (_with_state(_rwkv7_inputs, 16, 64), _rwkv7_step, "rwkv7", _fla_rwkv7_step),
}  # fmt: skip


def _in_chunks(call: Ours) -> Call:
    return lambda x: call(x, "chunked")


_LOG = ("q", "k", "v", "gate", "levels")
FAMILIES = {
    **{name: Family(make, (), (), _in_chunks(call)) for name, (make, call, _, _) in _STEPS.items()},
    "log_linear": Family(_log_linear_inputs(False), _LOG, _LOG, _in_chunks(log_linear)),
    "log_linear_delta": Family(_log_linear_inputs(True), (*_LOG, "beta"), (*_LOG, "beta"), _in_chunks(log_linear)),
}
OURS: dict[str, Ours] = {
    **{name: call for name, (_, call, _, _) in _STEPS.items()},
    "log_linear": log_linear,
    "log_linear_delta": log_linear,
}
FLA: dict[str, tuple[str, Call]] = {
    **{name: (f"fla-core fused_recurrent {kind}", call) for name, (_, _, kind, call) in _STEPS.items()},
    "log_linear": ("fla-core log_linear_attn", _fla_log_linear),
}
