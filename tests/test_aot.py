"""Every kernel compiles for GPUs that are not here, fits their shared memory, and keeps its values in registers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from aot import CASES, GPUS, compiled_elsewhere

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

#: What training in bfloat16 launches; the others take a minute.
FIRST = ["gla64", "gla128", "ssd", "vector64", "vector128", "delta64", "delta128_gated", "delta128_kda", "dplr64",
         "short_conv", "rms_norm_1024", "gated_norm", "rotary"]  # fmt: skip
#: Bytes that a thread of a kernel may spill; 32 where nothing is said.
SPILLS = {"both_fused": 460, "fused": 260, "keys": 440, "shared_keys": 400, "values": 120, "forward": 80}
#: The same in families whose kernels have names that others have too, by the beginning of a case's name.
FAMILIES = {
    "vector": {"keys": 200},
    "delta": {"walk": 300, "adjoint": 400, "products": 300, "keys": 600, "scan": 300},
    "dplr": {},
}  # fmt: skip
#: Heads wider than the kernels are made for: right, and slower; threads may spill 300 bytes.
WIDE = ("gla256", "delta256_gated", "delta256_kda", "dplr128")


def _check(names: list[str], gpu: str) -> None:
    kernels, nothing = compiled_elsewhere(names, gpu)
    if not kernels:
        pytest.skip(f"no op offers Triton yet: {nothing}")
    wrong = []
    for kernel in kernels:
        where = f"{kernel.case}, {kernel.kernel} ({kernel.constants})"
        if kernel.error:
            wrong.append(f"{where} does not compile: {kernel.error}")
        if kernel.shared > GPUS[gpu].shared_per_program:
            wrong.append(f"{where} wants {kernel.shared} bytes of shared memory; a program has no more than "
                         f"{GPUS[gpu].shared_per_program}")  # fmt: skip
        family = next((bytes for name, bytes in FAMILIES.items() if kernel.case.startswith(name)), SPILLS)
        stated = max(family.get(kernel.kernel, 32), 330 if kernel.case in WIDE else 0)
        if gpu == "h100" and kernel.spilled > stated:
            wrong.append(f"{where} spills {kernel.spilled} bytes a thread; stated: {stated}")
    assert not wrong, "\n".join(wrong)


def test_training_kernels_compile_for_an_h100() -> None:
    _check(FIRST, "h100")


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_all_kernels_compile(gpu: str) -> None:
    others = [name for name in CASES if name not in FIRST and not name.endswith("fp32")]  # those assemble for minutes
    _check(others if gpu == "h100" else FIRST, gpu)


def test_a_kernel_that_cannot_compile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import aot, torch, triton, triton.language as tl\n"
        "@triton.jit\n"
        "def small(x, N: tl.constexpr):\n"
        "    i = tl.arange(0, N)\n"
        "    a = tl.load(x + i[:, None] * N + i[None, :])\n"
        "    tl.store(x + i[:, None] * N + i[None, :], tl.dot(a, tl.no_such_thing(a)))\n"
        "@triton.jit\n"
        "def right(x, N: tl.constexpr):\n"
        "    i = tl.arange(0, N)\n"
        "    a = tl.load(x + i[:, None] * N + i[None, :])\n"
        "    tl.store(x + i[:, None] * N + i[None, :], tl.dot(a, a).to(tl.bfloat16))\n"
        "def case():\n"
        "    x = torch.zeros(64, 64, dtype=torch.bfloat16)\n"
        "    small[(1,)](x, N=16)\n"
        "    right[(1,)](x, N=64, num_warps=4)\n"
        "    return x\n"
        "aot.CASES['mine'] = case\n"
        "sys.argv[1:] = ['mine']\n"
        "aot.main()\n"
    )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    said = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    assert "small" in said and "DOES NOT COMPILE" in said and "no_such_thing" in said
    line = next(line for line in said.splitlines() if "right" in line).split()
    assert int(line[3]) > 20 and line[4] == "0" and int(line[5]) > 0 and int(line[7]) > 0
