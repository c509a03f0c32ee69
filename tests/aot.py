"""Compiles every Triton kernel of the ops for a GPU that need not be here: registers, spills, shared memory, occupancy.

    python tests/aot.py                     every case, for an H100 with the configurations shipped for it
    python tests/aot.py gla64 ssd           cases whose name begins so
    python tests/aot.py --gpu a100          h100 (sm_90), a100 (sm_80), l40s (sm_89)
    python tests/aot.py --tuned my.json     other configurations; --tuned none: the defaults

A case calls an op forwards and backwards on the CPU. Each launch is compiled with the very types, alignments and
constants that it was asked for, and not run, so results are garbage: only shapes matter. Must not run under
TRITON_INTERPRET=1: a kernel decorated for the interpreter cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Gpu:
    """What a program may use: bytes of shared memory, and what a multiprocessor shares out."""

    capability: int
    shared_per_program: int
    shared: int
    warps: int


GPUS = {
    "h100": Gpu(90, 227 << 10, 228 << 10, 64),
    "a100": Gpu(80, 163 << 10, 164 << 10, 64),
    "l40s": Gpu(89, 99 << 10, 100 << 10, 48),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one launch.

    Attributes:
        registers: of a thread; spilled: bytes that a thread stores because they do not suffice; stack: bytes.
        shared: bytes of a program. programs: that fit a multiprocessor at once.
        tensor_cores: instructions for them, of Hopper (wgmma) or older ones (mma).
        error: why it did not compile; None if it did.
    """

    case: str
    kernel: str
    constants: str
    warps: int = 0
    registers: int = 0
    spilled: int = 0
    stack: int = 0
    shared: int = 0
    programs: int = 0
    tensor_cores: int = 0
    error: str | None = None


# -- Cases: one line an op and shape that matters ----------------------------------------------------------------------


def _scalar_decay(k: int, v: int, dtype: torch.dtype = torch.bfloat16, groups: int = 2, constant: bool = False,
                  both: bool = False, state: bool = False, starts: bool = False, reverse: bool = False,
                  t: int = 1024) -> Tensor:  # fmt: skip
    from seqlong.kernels import scalar_decay as package

    b, h = 1, 2  # few heads, so that the row is cut into segments
    q, key = (torch.zeros(b, t, groups, k, dtype=dtype, requires_grad=True) for _ in range(2))
    value = torch.zeros(b, t, h, v, dtype=dtype, requires_grad=True)
    decay = torch.zeros(h) if constant else torch.zeros(b, t, h, requires_grad=True)
    begins = torch.zeros(b, t, dtype=torch.bool) if starts else None
    if both:
        return package.bidirectional_decay(q, key, value, decay, starts=begins, implementation="triton")
    initial = torch.zeros(b, h, k, v, requires_grad=True) if state else None
    output, final = package.scalar_decay(
        q, key, value, decay, starts=begins, initial_state=initial, reverse=reverse, implementation="triton"
    )
    return output.sum() + final.sum() if state else output


def _ssd(h: int = 2, v: int = 64, k: int = 128, g: int = 1, dtype: torch.dtype = torch.bfloat16, state: bool = False,
         t: int = 1024) -> Tensor:  # fmt: skip
    from seqlong.kernels.scalar_decay import ssd

    x = torch.zeros(1, t, h, v, dtype=dtype, requires_grad=True)
    dt = torch.zeros(1, t, h, dtype=dtype, requires_grad=True)
    b, c = (torch.zeros(1, t, g, k, dtype=dtype, requires_grad=True) for _ in range(2))
    a, d, bias = (torch.zeros(h, requires_grad=True) for _ in range(3))
    initial = torch.zeros(1, h, k, v, requires_grad=True) if state else None
    y, final = ssd(x, dt, a, b, c, d=d, dt_bias=bias, initial_state=initial, implementation="triton")
    return y.sum() + final.sum() if state else y


def _short_conv(dtype: torch.dtype = torch.bfloat16, starts: bool = False) -> Tensor:
    from seqlong.kernels.short_conv import short_conv

    x = torch.zeros(1, 1024, 2304, dtype=dtype, requires_grad=True)
    weight, bias = torch.zeros(2304, 4, requires_grad=True), torch.zeros(2304, requires_grad=True)
    begins = torch.zeros(1, 1024, dtype=torch.bool) if starts else None
    return short_conv(x, weight, bias, starts=begins, implementation="triton")[0]


def _rms_norm(width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    from seqlong.kernels.norm import rms_norm

    x = torch.zeros(1024, width, dtype=dtype, requires_grad=True)
    return rms_norm(x, torch.ones(width, requires_grad=True), implementation="triton")


def _gated_norm(width: int, groups: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    from seqlong.kernels.norm import gated_rms_norm

    x, gate = (torch.zeros(1024, width, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.ones(width, requires_grad=True)
    return gated_rms_norm(x, gate, weight, groups=groups, implementation="triton")


def _cross_entropy(classes: int) -> Tensor:
    from seqlong.kernels.cross_entropy import linear_cross_entropy

    hidden = torch.zeros(1, 512, 256, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(classes, 256, requires_grad=True)
    return linear_cross_entropy(hidden, weight, torch.zeros(1, 512, dtype=torch.long), implementation="triton")


def _rotary() -> Tensor:
    from seqlong.kernels.rotary import rotary

    x = torch.zeros(1, 512, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    return rotary(x, torch.arange(512)[None], implementation="triton")


def _drawn(count: int, width: int, t: int = 256, h: int = 2) -> list[Tensor]:
    return [torch.zeros(1, t, h, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(count)]


def _vector_decay(width: int, bound: bool = False) -> Tensor:
    from seqlong.kernels.vector_decay import vector_decay

    q, k, v, gate = _drawn(4, width)
    if bound:
        lower = torch.zeros(2, width, requires_grad=True)
        return vector_decay(q, None, v, gate, activation="lower_bound", lower_bound=lower, implementation="triton")[0]
    return vector_decay(q, k, v, gate, activation="logsigmoid", divisor=16.0, implementation="triton")[0]


def _delta_rule(width: int, gate: str) -> Tensor:
    from seqlong.kernels.delta_rule import delta_rule

    q, k, v = _drawn(3, width)
    shape = {"none": None, "head": (1, 256, 2), "channel": (1, 256, 2, width)}[gate]
    decay = None if shape is None else torch.zeros(shape, requires_grad=True)
    beta = torch.zeros(1, 256, 2, requires_grad=True)
    return delta_rule(q, k, v, beta, decay, normalize=True, implementation="triton")[0]


def _token_step(family: str, tokens: int = 1) -> Tensor:
    from seqlong.kernels import delta_rule, dplr, vector_decay

    x = [torch.zeros(2, tokens, 4, 128, dtype=torch.bfloat16) for _ in range(5)]
    gate, state, row = torch.zeros(2, tokens, 4, 128), torch.zeros(2, 4, 128, 128), torch.zeros(2, tokens, 4)
    if family == "vector":
        return vector_decay.vector_decay_step(*x[:4], state, activation="logsigmoid", implementation="triton")[0]
    if family == "delta":
        softplus = {"gate_activation": "softplus", "rate": torch.zeros(4), "gate_bias": torch.zeros(4, 128)}
        return delta_rule.delta_rule_step(
            *x[:3], row, gate, state, normalize=True, beta_activation="sigmoid", **softplus, implementation="triton"
        )[0]
    return dplr.dplr_step(*x, gate, state, implementation="triton")[0]


def _dplr(width: int) -> Tensor:
    from seqlong.kernels.dplr import dplr

    decay = torch.zeros(1, 256, 2, width, requires_grad=True)
    initial = torch.zeros(1, 2, width, width, requires_grad=True)
    output, final = dplr(*_drawn(5, width), decay, initial_state=initial, implementation="triton")
    return output.sum() + final.sum()


CASES: dict[str, Callable[[], Tensor]] = {
    "gla64": lambda: _scalar_decay(64, 64),
    "gla64_state": lambda: _scalar_decay(64, 64, state=True),
    "gla64_reverse_starts": lambda: _scalar_decay(64, 64, reverse=True, starts=True),
    "gla64_one_segment": lambda: _scalar_decay(64, 64, t=64),
    "gla64_both_ways": lambda: _scalar_decay(64, 64, both=True),
    "gla64_fp32": lambda: _scalar_decay(64, 64, torch.float32),
    "gla128": lambda: _scalar_decay(128, 128),
    "gla128_both_ways": lambda: _scalar_decay(128, 128, both=True),
    "gla256": lambda: _scalar_decay(256, 256),
    "gla128_fp32": lambda: _scalar_decay(128, 128, torch.float32),
    "gla64x128_grouped": lambda: _scalar_decay(64, 128, groups=1),
    "gla16": lambda: _scalar_decay(16, 16),
    "gla_odd": lambda: _scalar_decay(24, 40),
    "constant64": lambda: _scalar_decay(64, 64, constant=True),
    "constant128": lambda: _scalar_decay(128, 128, constant=True),
    "ssd": _ssd,
    "ssd_state": lambda: _ssd(state=True),
    "ssd_groups": lambda: _ssd(g=2),
    "ssd_state64": lambda: _ssd(k=64),
    "ssd_fp32": lambda: _ssd(dtype=torch.float32),
    "ssd_step": lambda: _ssd(t=1),
    "vector64": lambda: _vector_decay(64),
    "vector128": lambda: _vector_decay(128),
    "vector64_bound": lambda: _vector_decay(64, bound=True),
    "delta64": lambda: _delta_rule(64, "none"),
    "delta128_gated": lambda: _delta_rule(128, "head"),
    "delta64_gated": lambda: _delta_rule(64, "head"),
    "delta128_kda": lambda: _delta_rule(128, "channel"),
    "delta256_gated": lambda: _delta_rule(256, "head"),
    "delta256_kda": lambda: _delta_rule(256, "channel"),
    "dplr64": lambda: _dplr(64),
    "dplr128": lambda: _dplr(128),
    "vector_step": lambda: _token_step("vector"),
    "delta_step": lambda: _token_step("delta", 4),
    "dplr_step": lambda: _token_step("dplr"),
    "short_conv": _short_conv,
    "short_conv_starts": lambda: _short_conv(starts=True),
    "short_conv_fp32": lambda: _short_conv(torch.float32),
    "rms_norm_1024": lambda: _rms_norm(1024),
    "rms_norm_4096_fp32": lambda: _rms_norm(4096, torch.float32),
    "gated_norm": lambda: _gated_norm(2048, 1),
    "gated_norm_groups": lambda: _gated_norm(2048, 8),
    "cross_entropy_dna": lambda: _cross_entropy(16),
    "cross_entropy_words": lambda: _cross_entropy(50_280),
    "rotary": _rotary,
}


# -- Compiling ---------------------------------------------------------------------------------------------------------


def compile_cases(names: list[str], gpu: str, tuned: str | None = "shipped") -> tuple[list[Compiled], dict[str, str]]:
    """Compile all launches of the named cases; what compiled, and why other cases have nothing to compile.

    Args:
        names: keys of ``CASES``.
        gpu: key of ``GPUS``.
        tuned: ``shipped``, a file of configurations, or None for the ops' defaults.
    """
    if tuned == "shipped":
        shipped = ROOT / "kernels" / "tuned" / f"{gpu}.json"
        tuned = str(shipped) if shipped.is_file() else None
    if tuned is not None:
        os.environ["SEQLONG_TUNED"] = tuned
    # The ops take CPU tensors where they believe in the interpreter; Triton itself, read before, must not.
    import triton

    os.environ["TRITON_INTERPRET"] = "1"
    import seqlong.kernels.runtime

    del os.environ["TRITON_INTERPRET"]
    assert seqlong.kernels.runtime.INTERPRETED
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class NoGpu:
        """As much of a driver as compiling asks for."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", GPUS[gpu].capability, 32)

    driver.set_active(NoGpu())
    case = ""
    seen: dict[str, tuple[Compiled, str]] = {}
    stock = triton.runtime.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = self.fn.__name__
        constants = " ".join(
            f"{key}={value:d}" if isinstance(value, bool) else f"{key}={value}"
            for key, value in options.items()
            if key.isupper() or key == "num_warps"
        )
        try:
            made = stock(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # a compiler fails in any way; the table tells which
            text = str(error).strip().splitlines()
            line = " | ".join(text[-6:])[-700:]
            known = Compiled(case, name, constants, error=f"{type(error).__name__}: {line}")
            seen.setdefault(f"{name} {constants}", (known, ""))
            return
        found = Compiled(case, name, constants, warps=made.metadata.num_warps, shared=made.metadata.shared)
        seen.setdefault(made.hash, (found, made.asm["ptx"]))

    triton.runtime.JITFunction.run = compile_only
    nothing: dict[str, str] = {}
    for case in names:
        before = len(seen)
        try:
            output = CASES[case]()
            if output.requires_grad:
                output.backward(torch.zeros_like(output))
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).strip()[:300]}"
            if isinstance(error, ImportError | AttributeError) or "has no implementation 'triton'" in said:
                nothing[case] = said
            else:  # one case that fails must not hide the others
                seen[case] = (Compiled(case, "(the call)", "", error=said), "")
        if len(seen) == before and case not in nothing:
            nothing[case] = "every kernel of it is already in the table"
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda item: _measured(*item, GPUS[gpu]), seen.values())), nothing


def _measured(found: Compiled, ptx: str, gpu: Gpu) -> Compiled:
    """Ask the assembler that Triton brings along."""
    if not ptx:
        return found
    import triton

    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert target is not None
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for assembler in sorted(
            folder.glob("ptxas*"), reverse=True
        ):  # some Tritons bring a newer one under a longer name
            command = [str(assembler), "-v", f"-arch={target[1]}", file.name, "-o", os.devnull]
            said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
            if "registers" in said:
                break
    numbers = {
        name: int(match[1]) if (match := re.search(pattern, said)) else 0
        for name, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("spilled", r"(\d+) bytes spill stores"),
            ("stack", r"(\d+) bytes stack frame"),
        )
    }
    if not numbers["registers"]:
        return replace(found, error=f"ptxas: {' '.join(said.split())[:300]}")
    held = -(-numbers["registers"] // 8) * 8 * 32 * found.warps
    programs = min(65536 // held, gpu.shared // (found.shared + 1024), gpu.warps // found.warps)
    matrix = len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx))
    return replace(found, **numbers, programs=programs, tensor_cores=matrix)


def compiled_elsewhere(names: list[str], gpu: str, tuned: str = "shipped") -> tuple[list[Compiled], dict[str, str]]:
    """``compile_cases`` in a process of its own, free of the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, *names, "--exact", "--gpu", gpu, "--tuned", tuned, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [Compiled(**kernel) for kernel in found["kernels"]], found["nothing"]


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="cases whose name begins so; default: all")
    parser.add_argument("--exact", action="store_true", help="names are whole names")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--tuned", default="shipped", help="'shipped', 'none', or a file of configurations")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: kernels decorated for the interpreter cannot be compiled")

    def wanted(name: str) -> bool:
        return any(name == one if given.exact else name.startswith(one) for one in given.names or [""])

    names = [name for name in CASES if wanted(name)]
    kernels, nothing = compile_cases(names, given.gpu, None if given.tuned == "none" else given.tuned)
    if given.json:
        print(json.dumps({"kernels": [asdict(kernel) for kernel in kernels], "nothing": nothing}))
        return
    import triton

    limit = GPUS[given.gpu].shared_per_program
    print(f"triton {triton.__version__}, {given.gpu}; spilled: bytes a thread; fit: programs a multiprocessor holds")
    print(f"{'case':22}{'kernel':18}{'warps':>6}{'regs':>6}{'spilled':>8}{'shared':>9}{'fit':>5}{'mma':>5}  constants")
    for kernel in kernels:
        where = f"{kernel.case:22}{kernel.kernel:18}"
        if kernel.error:
            print(f"{where}DOES NOT COMPILE: {kernel.error}\n{'':40}{kernel.constants}")
            continue
        over = "!" if kernel.shared > limit else " "
        print(
            f"{where}{kernel.warps:6}{kernel.registers:6}{kernel.spilled:8}{kernel.shared:8}{over}{kernel.programs:5}"
            f"{kernel.tensor_cores:5}  {kernel.constants}"
        )
    for case, why in nothing.items():
        print(f"{case:22}nothing: {why}")


if __name__ == "__main__":
    main()
