"""Who computes what: the families of benchmarks/kernels.py, and how each library is asked for them."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import _linear
import _steps
import torch
import torch.nn.functional as F
from _measure import Family, Inputs
from torch import Tensor

Contender = Callable[[Inputs], Callable[[], Tensor]]
#: Positions of a chunk for which operations are counted.
CHUNK = 64


@cache
def lend_convolution() -> bool:
    """Whether mamba-ssm's fused mixer gets our convolution: it calls causal-conv1d, a CUDA extension not always there.

    Ours moves about four fifths of the bytes that the GPU can, so this costs mamba-ssm nothing to speak of.
    """
    try:
        import causal_conv1d.cpp_functions  # noqa: F401
    except ImportError:
        return True
    return False


def _normal(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(torch.bfloat16)


def _recurrence_flops(heads: int, groups: int, k: int, v: int) -> float:
    """Of one position, forward and backward, in chunks, each product once; the states are made again."""
    forward = groups * CHUNK * k + heads * (CHUNK * v + 2 * k * v)
    backward = groups * CHUNK * k + heads * (2 * CHUNK * k + 2 * CHUNK * v + 5 * k * v)
    return 2.0 * (forward + backward)


# -- Scalar decay ------------------------------------------------------------------------------------------------------


def _gla(heads: int, width: int, constant: bool = False) -> Family:
    def make(rows: int, length: int, device: torch.device) -> Inputs:
        q, k, v = (_normal(rows, length, heads, width, device=device) for _ in range(3))
        q = q * width**-0.5
        if constant:  # lightning's slopes, but from 1 on: a head that never decays could not be checked in a window
            return {"q": q, "k": k, "v": v, "g": -(8 / heads) * torch.arange(1, heads + 1, device=device).float()}
        return {"q": q, "k": k, "v": v, "g": F.logsigmoid(torch.randn(rows, length, heads, device=device) + 3)}

    timed = ("q", "k", "v") if constant else ("q", "k", "v", "g")
    return Family(make, timed, timed, lambda x: _ours(x, "chunked"), _recurrence_flops(heads, heads, width, width),
                  softmax=not constant)  # fmt: skip


def _ours(x: Inputs, implementation: str | None, reverse: bool = False) -> Tensor:
    from seqlong.kernels.scalar_decay import scalar_decay

    decay = x["g"]
    if decay.dim() == 1 and implementation == "chunked":
        decay = decay.expand(*x["v"].shape[:3])
    return scalar_decay(x["q"], x["k"], x["v"], decay, reverse=reverse, implementation=implementation)[0]


def _both_ways(x: Inputs, implementation: str | None) -> Tensor:
    """Both directions from two calls, the diagonal counted once."""
    diagonal = (x["q"] * x["k"]).sum(-1, keepdim=True) * x["v"]
    return _ours(x, implementation) + _ours(x, implementation, reverse=True) - diagonal


def _bidirectional(x: Inputs) -> Tensor:
    from seqlong.kernels.scalar_decay import bidirectional_decay

    return bidirectional_decay(x["q"], x["k"], x["v"], x["g"])


def _fla(x: Inputs) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(x["q"], x["k"], x["v"], x["g"], scale=1.0)[0]


def _fla_both_ways(x: Inputs) -> Tensor:
    flipped = {name: y.flip(1) for name, y in x.items()}
    return _fla(x) + _fla(flipped).flip(1) - (x["q"] * x["k"]).sum(-1, keepdim=True) * x["v"]


def _fla_lightning(x: Inputs) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(x["q"], x["k"], x["v"], g_gamma=x["g"], scale=1.0)[0]


def _attention(backend: str) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            q, k, v = (x[name].transpose(1, 2) for name in "qkv")
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


# -- Mamba2 ------------------------------------------------------------------------------------------------------------

HEADS, HEAD, STATE = 32, 64, 128
INNER = HEADS * HEAD
CONV = INNER + 2 * STATE


def _parameters(device: torch.device) -> Inputs:
    """As Mamba2 starts, but with steps of 0.02 to 0.1: older positions must have decayed where the check looks."""
    steps = torch.rand(HEADS, device=device) * 0.08 + 0.02
    rates = 1 + 15 * torch.rand(HEADS, device=device)
    return {"a": -rates, "a_log": rates.log(), "d": torch.randn(HEADS, device=device),
            "bias": steps + torch.log(-torch.expm1(-steps))}  # fmt: skip


def _ssd_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    return {
        "x": _normal(rows, length, HEADS, HEAD, device=device),
        "dt": _normal(rows, length, HEADS, device=device, scale=0.3),
        "b": _normal(rows, length, 1, STATE, device=device, scale=0.3),
        "c": _normal(rows, length, 1, STATE, device=device, scale=0.3),
        **_parameters(device),
    }


def _ssd(x: Inputs, implementation: str | None) -> Tensor:
    from seqlong.kernels.scalar_decay import ssd

    return ssd(x["x"], x["dt"], x["a"], x["b"], x["c"], d=x["d"], dt_bias=x["bias"], implementation=implementation)[0]


def _mamba_ssd(x: Inputs) -> Tensor:
    import_mamba_ssm()
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(x["x"], x["dt"], x["a"], x["b"], x["c"], chunk_size=256, D=x["d"],
                                     dt_bias=x["bias"], dt_softplus=True)  # fmt: skip


def _fla_ssd(x: Inputs) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    step = F.softplus(x["dt"].float() + x["bias"])
    b, c = (x[name].expand(-1, -1, HEADS, -1) for name in "bc")
    y = chunk_simple_gla(c, b, (x["x"] * step[..., None]).to(x["x"].dtype), step * x["a"], scale=1.0)[0]
    return torch.addcmul(y, x["x"], x["d"].to(y.dtype)[:, None])


def _mixer_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    projected = _normal(rows, length, INNER + CONV + HEADS, device=device)
    projected[..., -HEADS:] *= 0.3
    return {
        "projected": projected,
        "weight": torch.randn(CONV, 4, device=device) * 0.4,
        "shift": torch.randn(CONV, device=device) * 0.1,
        "norm": 1 + 0.1 * torch.randn(INNER, device=device),
        **_parameters(device),
    }


def _mixer(x: Inputs, implementation: str | None) -> Tensor:
    """All of a Mamba2 mixer but its two projections."""
    from seqlong.kernels.norm import gated_rms_norm
    from seqlong.kernels.scalar_decay import ssd
    from seqlong.kernels.short_conv import short_conv

    forced = {} if implementation is None else {"implementation": implementation}
    z, xbc, dt = x["projected"].split([INNER, CONV, HEADS], dim=-1)
    xbc = short_conv(xbc, x["weight"], x["shift"], **forced)[0]
    u, b, c = xbc.split([INNER, STATE, STATE], dim=-1)
    y = ssd(u.unflatten(2, (HEADS, HEAD)), dt, x["a"], b.unsqueeze(2), c.unsqueeze(2), d=x["d"], dt_bias=x["bias"],
            **forced)[0]  # fmt: skip
    return gated_rms_norm(y.flatten(2), z, x["norm"], 1, 1e-5, **forced)


def _mamba_mixer(x: Inputs) -> Tensor:
    """What mamba-ssm's and fla's Mamba2 layers call in training."""
    import_mamba_ssm()
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    return mamba_split_conv1d_scan_combined(
        x["projected"], x["weight"].to(x["projected"].dtype), x["shift"].to(x["projected"].dtype), x["bias"], x["a"],
        x["d"], chunk_size=256, activation="silu", rmsnorm_weight=x["norm"], rmsnorm_eps=1e-5, headdim=HEAD, ngroups=1,
        norm_before_gate=False,
    )  # fmt: skip


# -- One step ----------------------------------------------------------------------------------------------------------


def _step_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    """One token a row, projected; parameters of the convolution in bfloat16, as a model that decodes has them."""
    return {
        "xbc": _normal(rows, CONV, device=device),
        "dt": _normal(rows, HEADS, device=device, scale=0.3),
        "conv": _normal(rows, 3, CONV, device=device),
        "weight": _normal(CONV, 4, device=device, scale=0.4),
        "shift": _normal(CONV, device=device, scale=0.1),
        "state": torch.randn(rows, HEADS, STATE, HEAD, device=device),
        **_parameters(device),
    }


def _step(x: Inputs, implementation: str | None) -> Tensor:
    from seqlong.kernels.scalar_decay.step import ssd_step

    return ssd_step(x["xbc"], x["dt"], x["conv"], x["state"], x["weight"], x["shift"], x["a_log"], d=x["d"],
                    dt_bias=x["bias"], implementation=implementation)[0]  # fmt: skip


def _mamba_step(x: Inputs) -> Callable[[], Tensor]:
    """The scan alone: the convolution, which is a launch of another library there, is made before."""
    import_mamba_ssm()
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    from seqlong.kernels.short_conv import short_conv

    mixed = short_conv(x["xbc"][:, None], x["weight"], x["shift"], state=x["conv"], implementation="chunked")[0][:, 0]
    u, b, c = mixed.split([INNER, STATE, STATE], dim=-1)
    u = u.unflatten(1, (HEADS, HEAD))
    state = x["state"].transpose(2, 3).contiguous()
    a, d, bias = x["a"][:, None, None].expand(-1, HEAD, STATE), x["d"][:, None].expand(-1, HEAD), x["bias"][:, None]
    return lambda: selective_state_update(
        state, u, x["dt"][..., None].expand(-1, -1, HEAD), a, b[:, None], c[:, None], d,
        dt_bias=bias.expand(-1, HEAD), dt_softplus=True,
    )  # fmt: skip


# -- Tables ------------------------------------------------------------------------------------------------------------

_SSD = ("x", "dt", "b", "c")
_SSD_FLOPS = _recurrence_flops(HEADS, 1, STATE, HEAD)
_GLA = _gla(16, 64)

FAMILIES: dict[str, Family] = {
    "simple_gla": _GLA,
    "simple_gla_128": _gla(8, 128),
    "mamba2_ssd": Family(_ssd_inputs, (*_SSD, "a", "d", "bias"), _SSD, lambda x: _ssd(x, "chunked"), _SSD_FLOPS),
    "mamba2_mixer": Family(
        _mixer_inputs, ("projected", "weight", "shift", "norm", "a", "d", "bias"), ("projected",),
        lambda x: _mixer(x, "chunked"), _SSD_FLOPS,
    ),
    "bidirectional": Family(
        _GLA.make, _GLA.learnt, _GLA.timed, lambda x: _both_ways(x, "chunked"), 2 * _GLA.flops, softmax=True
    ),
    "lightning": _gla(8, 128, constant=True),
    "decode": Family(_step_inputs, (), (), lambda x: _step(x, "chunked")),
    **_linear.FAMILIES,
    **_steps.FAMILIES,
}  # fmt: skip


LATER = {**_linear.OURS, **_steps.OURS}


def _now(function: Callable[[Inputs], Tensor]) -> Contender:
    return lambda x: lambda: function(x)


_FLA = "fla-core simple_gla"
_ONCE = "seqlong scalar_decay, one direction"
_SDPA = {"sdpa-cudnn": ("CUDNN_ATTENTION", "torch SDPA cuDNN, causal softmax"),
         "sdpa-flash": ("FLASH_ATTENTION", "torch SDPA flash, causal softmax")}  # fmt: skip

#: group -> family -> what the rows call it, and the call. ``seqlong`` is what users get.
CONTENDERS: dict[str, dict[str, tuple[str, Contender]]] = {
    "seqlong": {
        **{name: ("seqlong", _now(lambda x: _ours(x, None))) for name in ("simple_gla", "simple_gla_128", "lightning")},
        "bidirectional": ("seqlong", _now(_bidirectional)),
        "mamba2_ssd": ("seqlong", _now(lambda x: _ssd(x, None))),
        "mamba2_mixer": ("seqlong", _now(lambda x: _mixer(x, None))),
        "decode": ("seqlong", _now(lambda x: _step(x, None))),
        **{name: ("seqlong", _now(partial(call, implementation=None))) for name, call in LATER.items()},
    },
    "once": {"bidirectional": (_ONCE, _now(lambda x: _ours(x, None)))},
    "chunked": {
        **{
            name: ("seqlong chunked torch", _now(lambda x: _ours(x, "chunked")))
            for name in ("simple_gla", "simple_gla_128", "lightning")
        },
        "bidirectional": ("seqlong chunked torch", _now(lambda x: _both_ways(x, "chunked"))),
        "mamba2_ssd": ("seqlong chunked torch", _now(lambda x: _ssd(x, "chunked"))),
        "mamba2_mixer": ("seqlong chunked torch", _now(lambda x: _mixer(x, "chunked"))),
        "decode": ("seqlong chunked torch", _now(lambda x: _step(x, "chunked"))),
        **{
            name: ("seqlong chunked torch", _now(partial(call, implementation="chunked")))
            for name, call in LATER.items()
        },
    },
    "fla": {
        "simple_gla": (_FLA, _now(_fla)),
        "simple_gla_128": (_FLA, _now(_fla)),
        "bidirectional": (f"{_FLA}, twice", _now(_fla_both_ways)),
        "lightning": ("fla-core lightning_attn (simple_gla with constant decay)", _now(_fla_lightning)),
        "mamba2_ssd": (f"{_FLA}, B and C expanded, steps in torch", _now(_fla_ssd)),
        **{name: (label, _now(call)) for name, (label, call) in (_linear.FLA | _steps.FLA).items()},
    },
    "mamba-ssm": {
        "mamba2_ssd": ("mamba-ssm mamba_chunk_scan_combined", _now(_mamba_ssd)),
        "mamba2_mixer": (
            "mamba-ssm fused mixer (fla's Mamba2 calls it too)" + ", our convolution in it" * lend_convolution(),
            _now(_mamba_mixer),
        ),
        "decode": ("mamba-ssm selective_state_update, its convolution not counted", _mamba_step),
    },
    **{
        group: {name: (label, _now(_attention(backend))) for name in ("simple_gla", "simple_gla_128")}
        for group, (backend, label) in _SDPA.items()
    },
}


# -- Peers that are hard to import -------------------------------------------------------------------------------------


def missing(group: str) -> str | None:
    """Why a group cannot run here; None if it can."""
    if group in ("seqlong", "once", "chunked"):
        return None
    if not torch.cuda.is_available():
        return "needs a GPU"
    if group in _SDPA:
        return None
    needed = {"fla": ["fla"], "mamba-ssm": ["mamba_ssm", "einops"]}[group]
    for name in needed:
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return None


def import_mamba_ssm() -> None:
    """Make mamba-ssm's Triton part importable: its ``__init__`` wants a CUDA extension that it does not need."""
    if "mamba_ssm" in sys.modules:
        return
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or spec.origin is None:
        raise ImportError("mamba_ssm is not installed")
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(Path(spec.origin).parent)]
    package.__version__ = "2"  # type: ignore[attr-defined]
    sys.modules["mamba_ssm"] = package
    if lend_convolution():
        from mamba_ssm.ops.triton import ssd_combined

        ssd_combined.causal_conv1d_fwd_function = _convolution
        ssd_combined.causal_conv1d_bwd_function = _convolution_backward


def _convolution(x: Tensor, weight: Tensor, bias: Tensor, *_nothing: object) -> Tensor:
    """causal_conv1d_fwd_function with SiLU, on a view (b d t)."""
    from seqlong.kernels.short_conv import short_conv

    return short_conv(x.transpose(1, 2), weight, bias)[0].transpose(1, 2)


def _convolution_backward(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, _segments: None, _state: None, _after: None, into: Tensor,
    *_nothing: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """causal_conv1d_bwd_function with SiLU: the gradient of x is written into the view given."""
    dx, dweight, dbias, _ = torch.ops.seqlong.short_conv_triton_backward(
        grad.transpose(1, 2), x.transpose(1, 2), weight, bias, None, None
    )
    into.copy_(dx.transpose(1, 2))
    return into, dweight, dbias


def lift_guard() -> bool:
    """fla refuses its gated backward pass on Hopper with some Tritons, which miscompile it; whether that was lifted.

    It is timed all the same, and the check of this run says whether the result is right.
    """
    from fla.ops.common import chunk_o

    guarded = chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1
    chunk_o.TRITON_ABOVE_3_7_1 = True
    return bool(guarded)


def tune_briefly(share: int, shares: int) -> None:
    """Let Triton's autotuner time each configuration for 20 ms instead of 100, and try only a share of them.

    fla has up to 36 configurations for each of a dozen kernels: to time them takes minutes, and so does compiling.
    """
    try:
        import triton.testing
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return
    # Triton asks triton.testing for it each time.
    triton.testing.do_bench = partial(triton.testing.do_bench, warmup=5, rep=20)
    prune = Autotuner.prune_configs

    def some(self: Any, *given: Any, **named: Any) -> list[Any]:
        found = list(prune(self, *given, **named))
        return found[share::shares] or found[:1]

    if shares > 1:
        Autotuner.prune_configs = some
