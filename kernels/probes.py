"""What each op looks like from outside: inputs, results, and how far these are from the float64 reference.

One entry of ``PROBES`` an op. ``seqlong doctor`` and the check of tuned configurations (``tuning.py``) are made of it.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqlong.kernels import tuning

#: Relative error (root mean square) that is no sign of a fault, by type. Every result passes two to four roundings of
#: about 2**-9 (bf16), 2**-12 (fp16) or, where tensor cores round float32, 2**-11; these are four times that. A
#: miscompiled kernel spoils at least a column of a tile, or one token in some hundreds, and is above 0.05.
FLOOR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-3, torch.float64: 1e-9}
#: How many times the error of plain torch in the same type is no sign of a fault either.
SLACK = 2.0
#: Tokens of a check: several chunks of any size, and no multiple of one.
LENGTH = 333


@dataclass
class Inputs:
    """Arguments of an op by name: those with a gradient, and the others."""

    learned: dict[str, Tensor]
    fixed: dict[str, Any] = field(default_factory=dict)


class Draw:
    """Draws inputs: seeded, in a type, with the widths of ``sizes``."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, rows: int, length: int, sizes: Mapping[str, int], case: str
    ) -> None:
        self.device, self.dtype, self.sizes, self.case = device, dtype, sizes, case
        self.rows, self.length = rows, length
        # Small inputs are the same everywhere; large ones would take seconds on a CPU.
        self.source = torch.device("cpu") if rows * length < 4096 else device
        self.generator = torch.Generator(self.source).manual_seed(1)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, device=self.source, dtype=torch.float32)
        return (drawn * scale + shift).to(self.device, dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.source).to(self.device)

    def starts(self) -> Tensor:
        """Segments of all sizes, one token included."""
        drawn = torch.zeros(self.rows, self.length, dtype=torch.bool, device=self.device)
        for place in (0.17, 0.35, 0.8):
            drawn[0, int(place * self.length)] = True
        drawn[0, int(0.35 * self.length) + 1] = True
        return drawn


def _scalar_decay(draw: Draw) -> Inputs:
    (b, t), (g, h, k, v) = (draw.rows, draw.length), (draw.sizes[name] for name in ("g", "h", "k", "v"))
    decay = -torch.nn.functional.softplus(draw.normal(b, t, h, shift=-2.0, dtype=torch.float32))
    learned = {
        "q": draw.normal(b, t, g, k),
        "k": draw.normal(b, t, g, k, scale=k**-0.5),
        "v": draw.normal(b, t, h, v),
        "log_decay": decay,
    }
    fixed: dict[str, Any] = {}
    if draw.case == "packed":
        fixed["starts"] = draw.starts()
        learned["initial_state"] = draw.normal(b, h, k, v, dtype=torch.float32)
    if draw.case == "reverse":
        fixed["reverse"] = True
    return Inputs(learned, fixed)


def _bidirectional_decay(draw: Draw) -> Inputs:
    given = _scalar_decay(draw)
    given.learned.pop("initial_state", None)
    return given


def _ssd(draw: Draw) -> Inputs:
    (b, t), (g, h, k, v) = (draw.rows, draw.length), (draw.sizes[name] for name in ("g", "h", "k", "v"))
    learned = {
        "x": draw.normal(b, t, h, v),
        "dt": draw.normal(b, t, h),
        "a": -draw.normal(h, dtype=torch.float32).exp(),
        "b": draw.normal(b, t, g, k, scale=k**-0.5),
        "c": draw.normal(b, t, g, k),
        "d": draw.normal(h, dtype=torch.float32),
        "dt_bias": draw.normal(h, shift=-3.0, dtype=torch.float32),
    }
    fixed: dict[str, Any] = {}
    if draw.case == "packed":
        fixed["starts"] = draw.starts()
        learned["initial_state"] = draw.normal(b, h, k, v, dtype=torch.float32)
    return Inputs(learned, fixed)


def _packed(draw: Draw, given: Inputs, *state: int) -> Inputs:
    """The case ``packed``: segments, and a state of that shape before them."""
    if draw.case == "packed":
        given.fixed["starts"] = draw.starts()
        given.learned["initial_state"] = draw.normal(*state, dtype=torch.float32)
    return given


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype)


def _vector_decay(draw: Draw) -> Inputs:
    (b, t), (h, k, v) = (draw.rows, draw.length), (draw.sizes[name] for name in ("h", "k", "v"))
    learned = {"q": draw.normal(b, t, h, k), "k": draw.normal(b, t, h, k, scale=k**-0.5), "v": draw.normal(b, t, h, v)}
    fixed: dict[str, Any] = {"activation": "logsigmoid", "divisor": 16.0}
    if draw.case == "lower_bound":
        fixed = {"k": None, "activation": "lower_bound"}
        learned.pop("k")
        learned["lower_bound"] = draw.normal(h, k, dtype=torch.float32).sigmoid() / 2
    return _packed(draw, Inputs({**learned, "gate": draw.normal(b, t, h, k)}, fixed), b, h, k, v)


def _delta_rule(draw: Draw) -> Inputs:
    (b, t), (g, h, k, v) = (draw.rows, draw.length), (draw.sizes[name] for name in ("g", "h", "k", "v"))
    learned = {"q": draw.normal(b, t, g, k), "k": draw.normal(b, t, g, k), "v": draw.normal(b, t, h, v),
               "beta": draw.normal(b, t, h)}  # fmt: skip
    gate = {"no_gate": (), "channels": (b, t, h, k)}.get(draw.case, (b, t, h))
    if gate:
        learned["gate"] = -torch.nn.functional.softplus(draw.normal(*gate, shift=-2.0, dtype=torch.float32))
    return _packed(draw, Inputs(learned, {"normalize": True, "beta_activation": "sigmoid"}), b, h, k, v)


def _dplr(draw: Draw) -> Inputs:
    (b, t), (h, k, v) = (draw.rows, draw.length), (draw.sizes[name] for name in ("h", "k", "v"))
    key = _unit(draw.normal(b, t, h, k))
    learned = {
        "q": draw.normal(b, t, h, k), "k": draw.normal(b, t, h, k, scale=k**-0.5), "v": draw.normal(b, t, h, v),
        "a": -key, "b": (key * draw.normal(b, t, h, k).sigmoid()).to(draw.dtype),
        "log_decay": (-0.6065 * draw.normal(b, t, h, k).sigmoid()).to(draw.dtype),
    }  # fmt: skip
    return _packed(draw, Inputs(learned), b, h, k, v)


def _log_linear(draw: Draw) -> Inputs:
    given = _scalar_decay(draw)
    given.learned.pop("initial_state", None)
    (b, t), h = (draw.rows, draw.length), draw.sizes["h"]
    given.learned["levels"] = draw.normal(b, t, h, t.bit_length() + 1).sigmoid()
    if draw.case == "delta":
        given.learned["k"] = _unit(given.learned["k"])
        given.learned["beta"] = draw.normal(b, t, h).sigmoid()
    return given


def _grouped_matmul(draw: Draw) -> Inputs:
    rows, (e, d, y) = draw.rows * draw.length, (draw.sizes[name] for name in ("e", "d", "y"))
    cuts = draw.integers(0, rows + 1, e).sort().values
    return Inputs({"x": draw.normal(rows, d), "weight": draw.normal(e, d, y, scale=d**-0.5)}, {"ends": cuts.int()})


def _selective_scan(draw: Draw) -> Inputs:
    (b, t), (n, d) = (draw.rows, draw.length), (draw.sizes[name] for name in ("n", "d"))
    learned = {
        "x": draw.normal(b, t, d),
        "dt": torch.nn.functional.softplus(draw.normal(b, t, d, shift=-3.0, dtype=torch.float32)),
        "a": -draw.normal(n, d, dtype=torch.float32).exp(),
        "b": draw.normal(b, t, n),
        "c": draw.normal(b, t, n),
    }
    return _packed(draw, Inputs(learned), b, n, d)


def _short_conv(draw: Draw) -> Inputs:
    (b, t), (d, w) = (draw.rows, draw.length), (draw.sizes["d"], draw.sizes["w"])
    learned = {"x": draw.normal(b, t, d), "weight": draw.normal(d, w, scale=0.5), "bias": draw.normal(d)}
    fixed: dict[str, Any] = {}
    if draw.case == "packed":
        fixed = {"starts": draw.starts(), "output_state": True}
        learned["state"] = draw.normal(b, w - 1, d)
    return Inputs(learned, fixed)


def _rms_norm(draw: Draw) -> Inputs:
    d = draw.sizes["d"]
    return Inputs({"x": draw.normal(draw.rows, draw.length, d), "weight": draw.normal(d, dtype=torch.float32)})


def _gated_rms_norm(draw: Draw) -> Inputs:
    d = draw.sizes["d"]
    x, gate = (draw.normal(draw.rows, draw.length, d) for _ in range(2))
    weight = draw.normal(d, dtype=torch.float32)
    return Inputs({"x": x, "gate": gate, "weight": weight}, {"groups": draw.sizes.get("g", 1)})


def _rotary(draw: Draw) -> Inputs:
    (b, t), (h, k) = (draw.rows, draw.length), (draw.sizes["h"], draw.sizes["k"])
    return Inputs({"x": draw.normal(b, t, h, k)}, {"positions": torch.arange(t, device=draw.device).expand(b, t)})


def _linear_cross_entropy(draw: Draw) -> Inputs:
    (b, t), (d, y) = (draw.rows, draw.length), (draw.sizes["d"], draw.sizes["y"])
    learned = {"hidden": draw.normal(b, t, d), "weight": draw.normal(y, d, scale=d**-0.5)}
    fixed: dict[str, Any] = {"targets": draw.integers(-1, y, b, t)}
    if draw.case == "z_loss":
        learned["bias"] = draw.normal(y)
        fixed["z_loss"] = 1e-2
    return Inputs(learned, fixed)


def _attention(draw: Draw) -> Inputs:
    (b, t), (g, h, k) = (draw.rows, draw.length), (draw.sizes[name] for name in ("g", "h", "k"))
    learned = {"q": draw.normal(b, t, h, k), "k": draw.normal(b, t, g, k), "v": draw.normal(b, t, g, k)}
    fixed: dict[str, Any] = {}
    if draw.case in ("window", "sinks"):
        fixed["window"] = 1 + t // 5
    if draw.case == "sinks":
        fixed["sinks"] = 3
    if draw.case == "packed":
        starts = draw.starts()
        fixed["query_ids"] = fixed["key_ids"] = 1 + starts.cumsum(1)
        cuts = [[0, *row.nonzero()[:, 0].tolist(), t] for row in starts.cpu()]
        fixed["boundaries"] = [list(itertools.pairwise(row)) for row in cuts]
    return Inputs(learned, fixed)


def _block_attention(draw: Draw) -> Inputs:
    (b, t), (g, h, k) = (draw.rows, draw.length), (draw.sizes[name] for name in ("g", "h", "k"))
    learned = {"q": draw.normal(b, t, h, k), "k": draw.normal(b, t, g, k), "v": draw.normal(b, t, g, k)}
    own = torch.arange(t, device=draw.device)[:, None, None] // 16
    chosen = draw.integers(0, 1 << 30, b, t, h, 2) % own.clamp(min=1)
    chosen[..., 1] = torch.where(chosen[..., 1] == chosen[..., 0], -1, chosen[..., 1])
    return Inputs(learned, {"chosen": chosen.where(own > 0, -1), "block": 16})


def _summary_attention(draw: Draw) -> Inputs:
    (b, t), (g, h, k) = (draw.rows, draw.length), (draw.sizes[name] for name in ("g", "h", "k"))
    learned = {"q": draw.normal(b, t, h, k), "k": draw.normal(b, t // 8, g, k), "v": draw.normal(b, t // 8, g, k),
               "own_k": draw.normal(b, t, g, k), "own_v": draw.normal(b, t, g, k)}  # fmt: skip
    return Inputs(learned, {"every": 8})


@dataclass(frozen=True)
class Probe:
    """An op seen from outside.

    Attributes:
        module: where it is exported; the op's own name there is the probe's.
        make: draws its arguments.
        outputs: names of what it returns.
        small, large: its widths in a check and in a measurement.
        cases: ``plain``, and what else has a path of its own in the code.
        yardstick: the form in plain torch.
        widths: what the bare words of a tuning key say about widths.
    """

    op: str
    module: str
    make: Callable[[Draw], Inputs]
    outputs: tuple[str, ...]
    small: Mapping[str, int]
    large: Mapping[str, int]
    cases: tuple[str, ...] = ("plain",)
    yardstick: str = "chunked"
    widths: Callable[[set[str], Mapping[str, int]], dict[str, int]] = lambda words, sizes: {}


def _groups(words: set[str], sizes: Mapping[str, int]) -> dict[str, int]:
    """``shared``: heads share queries and keys."""
    return {"g": 1 if "shared" in words else sizes["h"]}


_DECAY = "seqlong.kernels.scalar_decay"
_NORM = "seqlong.kernels.norm"
PROBES = {
    probe.op: probe
    for probe in (
        Probe("scalar_decay", _DECAY, _scalar_decay, ("o", "final"), {"g": 1, "h": 2, "k": 64, "v": 64},
              {"g": 16, "h": 16, "k": 64, "v": 64}, ("plain", "packed", "reverse"), widths=_groups),
        Probe("bidirectional_decay", _DECAY, _bidirectional_decay, ("o",), {"g": 1, "h": 2, "k": 64, "v": 64},
              {"g": 16, "h": 16, "k": 64, "v": 64}, ("plain", "packed"), widths=_groups),
        Probe("ssd", _DECAY, _ssd, ("y", "final"), {"g": 1, "h": 2, "k": 128, "v": 64},
              {"g": 1, "h": 32, "k": 128, "v": 64}, ("plain", "packed")),
        Probe("vector_decay", "seqlong.kernels.vector_decay", _vector_decay, ("o", "final"), {"h": 2, "k": 64, "v": 64},
              {"h": 16, "k": 64, "v": 64}, ("plain", "packed", "lower_bound")),
        Probe("delta_rule", "seqlong.kernels.delta_rule", _delta_rule, ("o", "final"),
              {"g": 2, "h": 2, "k": 64, "v": 64}, {"g": 8, "h": 8, "k": 128, "v": 128},
              ("plain", "packed", "no_gate", "channels")),
        Probe("dplr", "seqlong.kernels.dplr", _dplr, ("o", "final"), {"h": 2, "k": 64, "v": 64},
              {"h": 16, "k": 64, "v": 64}, ("plain", "packed")),
        Probe("log_linear", "seqlong.kernels.log_linear", _log_linear, ("o",), {"g": 1, "h": 2, "k": 32, "v": 32},
              {"g": 1, "h": 16, "k": 64, "v": 64}, ("plain", "packed", "delta")),
        Probe("grouped_matmul", "seqlong.kernels.grouped_matmul", _grouped_matmul, ("y",), {"e": 3, "d": 64, "y": 72},
              {"e": 64, "d": 1024, "y": 512}),
        Probe("selective_scan", "seqlong.kernels.selective_scan", _selective_scan, ("y", "final"), {"n": 4, "d": 24},
              {"n": 16, "d": 1024}, ("plain", "packed")),
        Probe("short_conv", "seqlong.kernels.short_conv", _short_conv, ("y", "state"), {"d": 72, "w": 4},
              {"d": 2304, "w": 4}, ("plain", "packed")),
        Probe("rms_norm", _NORM, _rms_norm, ("y",), {"d": 136}, {"d": 1024}),
        Probe("gated_rms_norm", _NORM, _gated_rms_norm, ("y",), {"d": 136, "g": 2}, {"d": 2048, "g": 1}),
        Probe("rotary", "seqlong.kernels.rotary", _rotary, ("y",), {"h": 2, "k": 72}, {"h": 16, "k": 64}),
        Probe("linear_cross_entropy", "seqlong.kernels.cross_entropy", _linear_cross_entropy, ("loss",),
              {"d": 64, "y": 500}, {"d": 1024, "y": 32000}, ("plain", "z_loss")),
        Probe("attention", "seqlong.kernels.attention", _attention, ("o",), {"g": 1, "h": 2, "k": 64},
              {"g": 2, "h": 8, "k": 64}, ("plain", "window", "packed", "sinks"), yardstick="blocks"),
        Probe("block_attention", "seqlong.kernels.block_attention", _block_attention, ("o",),
              {"g": 1, "h": 2, "k": 32}, {"g": 2, "h": 8, "k": 64}, yardstick="gathered"),
        Probe("summary_attention", "seqlong.kernels.attention", _summary_attention, ("o",), {"g": 1, "h": 2, "k": 32},
              {"g": 2, "h": 8, "k": 64}, yardstick="blocks"),
    )
}  # fmt: skip


def folder(op: str) -> Path:
    """The folder of an op's source."""
    name = PROBES[op].module.rsplit(".", 1)[1] if op in PROBES else op
    return Path(__file__).parent / name


def function(probe: Probe) -> Callable[..., Any] | None:
    """The op, or None where this version of seqlong has none."""
    try:
        module = importlib.import_module(probe.module)
    except ModuleNotFoundError as error:
        if error.name != probe.module:
            raise
        return None
    found: Callable[..., Any] | None = getattr(module, probe.op, None)
    return found


def implementations(probe: Probe) -> tuple[str, ...]:
    """What ``implementation=`` may be, somewhere: the ``OFFERED`` of the op's module."""
    op = function(probe)
    return () if op is None else tuple(getattr(inspect.getmodule(inspect.unwrap(op)), "OFFERED", ()))


def inputs(
    probe: Probe,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    case: str = "plain",
    rows: int = 1,
    length: int = LENGTH,
    sizes: Mapping[str, int] | None = None,
) -> Inputs:
    """Arguments of the op, the same on every call and device. ``sizes`` overrides the small widths."""
    made = probe.make(Draw(torch.device(device), dtype, rows, length, {**probe.small, **(sizes or {})}, case))
    return Inputs({name: value.detach().requires_grad_() for name, value in made.learned.items()}, made.fixed)


def call(probe: Probe, given: Inputs, implementation: str | None) -> dict[str, Tensor]:
    """Outputs by name.

    Raises:
        ValueError: there is no such op, or it has no such implementation.
    """
    op = function(probe)
    if op is None:
        raise ValueError(f"this version of seqlong has no {probe.op}")
    results = op(**given.learned, **given.fixed, implementation=implementation)
    tensors = results if isinstance(results, tuple) else (results,)
    return {name: value for name, value in zip(probe.outputs, tensors, strict=False) if value is not None}


def run(probe: Probe, given: Inputs, implementation: str | None) -> dict[str, Tensor]:
    """Outputs by name and, as ``d`` and the name of the argument, gradients of a fixed sum of the outputs."""
    found = call(probe, given, implementation)
    generator = torch.Generator().manual_seed(2)
    # Rounded to bf16, so that every type is given the same.
    drawn = [torch.randn(value.shape, generator=generator).bfloat16() for value in found.values()]
    incoming = [one.to(value.device, value.dtype) for one, value in zip(drawn, found.values(), strict=True)]
    grads = torch.autograd.grad(list(found.values()), list(given.learned.values()), incoming, materialize_grads=True)
    return {**found, **{f"d{name}": grad for name, grad in zip(given.learned, grads, strict=True)}}


def error(
    probe: Probe,
    implementation: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    case: str = "plain",
    length: int = LENGTH,
    sizes: Mapping[str, int] | None = None,
    truth: str = "reference",
) -> dict[str, float]:
    """Relative error, root mean square, of each output and gradient; inf where a result is not finite.

    Both sides see the same (rounded) inputs. The truth is computed on the CPU in float64.

    Args:
        truth: ``reference``, the loop over tokens; the yardstick's name for a much faster one.
    """
    given = inputs(probe, device, dtype, case=case, length=length, sizes=sizes)
    exact = Inputs(
        {name: value.detach().cpu().double().requires_grad_() for name, value in given.learned.items()},
        {name: value.cpu() if isinstance(value, Tensor) else value for name, value in given.fixed.items()},
    )
    wanted, found = run(probe, exact, truth), run(probe, given, implementation)
    return {name: distance(found[name], wanted[name]) for name in found}


def distance(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted; inf where ``found`` is not finite."""
    difference = (found.detach().cpu().double() - wanted.detach()).square().mean().sqrt().item()
    scale = wanted.detach().square().mean().sqrt().item()
    return difference / (scale or 1.0) if math.isfinite(difference) else math.inf


def wrong(found: Mapping[str, float], yardstick: Mapping[str, float], dtype: torch.dtype) -> str | None:
    """The worst result in one sentence if it is farther off than plain torch in the same type explains, else None."""
    limits = {name: SLACK * min(yardstick.get(name, 0.0), 0.5) + FLOOR[dtype] for name in found}
    over = {name: value / limits[name] for name, value in found.items() if not value <= limits[name]}
    if not over:
        return None
    name = max(over, key=lambda one: over[one])
    what = f"the gradient of {name[1:]}" if name.startswith("d") and len(name) > 1 else f"the result {name}"
    if not math.isfinite(found[name]):
        return f"{what} is not finite"
    return f"{what} has a relative error of {found[name]:.2g}; at most {limits[name]:.2g} was expected"


def self_check(op: str, key: str, device: torch.device | str) -> str | None:
    """What is wrong with the Triton form of ``op`` at the widths of ``key``, with the configuration set; None if right.

    Held against the chunked form: in float64 as the truth, and in the same type as the yardstick.
    """
    probe = PROBES[op]
    dtype, sizes, words = tuning.parse_key(key)
    cases = [case for case in probe.cases if case in words] or ["plain"]
    for case in cases:
        settings: dict[str, Any] = {
            "case": case,
            "sizes": {**sizes, **probe.widths(words, {**probe.small, **sizes})},
            "truth": probe.yardstick,
        }
        found = error(probe, "triton", device, dtype, **settings)
        if not wrong(found, {}, dtype):  # the usual case, which needs no yardstick
            continue
        said = wrong(found, error(probe, probe.yardstick, device, dtype, **settings), dtype)
        if said:
            return said
    return None


def measure(
    probe: Probe,
    implementation: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    length: int,
    sizes: Mapping[str, int] | None = None,
    budget: float = 0.5,
    least: int = 3,
) -> float:
    """Seconds of one forward and backward pass: the median over about ``budget`` seconds, after a warm-up.

    Args:
        least: how many passes are timed however long one takes.
    """
    device = torch.device(device)
    given = inputs(probe, device, dtype, length=length, sizes={**probe.large, **(sizes or {})})

    incoming = [torch.ones_like(value) for value in call(probe, given, implementation).values()]

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        outputs = call(probe, given, implementation)
        torch.autograd.grad(list(outputs.values()), list(given.learned.values()), incoming, allow_unused=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    once()
    first = once()
    return statistics.median([once() for _ in range(max(least, min(50, int(budget / max(first, 1e-6)))))])
