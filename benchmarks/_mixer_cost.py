"""Every mixer at one width, and what a row costs it: CPU time and memory, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import math
import resource
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from seqlong import mixers
from seqlong.layout import SequenceLayout
from seqlong.mixers import MixerFactory
from seqlong.mixers.cache import Seen

REFERENCE = "Mamba2"
HEAD = 32
#: Bytes that a process may hold: a machine that swaps measures nothing.
ROOM = 8 << 30
MAMBA2: MixerFactory = partial(mixers.Mamba2, d_state=64, head_dim=HEAD)


def factories(width: int) -> dict[str, MixerFactory]:
    """Every mixer with heads of 32, states as wide as a head unless it says otherwise, and its own defaults."""
    heads = width // HEAD
    local: MixerFactory = partial(mixers.Attention, heads=heads, window=512)
    found: dict[str, MixerFactory] = {
        "Mamba2": MAMBA2,
        "LogLinearMamba2": partial(mixers.LogLinearMamba2, d_state=64, head_dim=HEAD),
        "Mamba1": mixers.Mamba1,
        "S4D": mixers.S4D,
        "RGLRU": partial(mixers.RGLRU, heads=heads),
        "GatedDeltaNet": partial(mixers.GatedDeltaNet, heads=heads, head_dim=HEAD),
        "LogLinearGatedDeltaNet": partial(mixers.LogLinearGatedDeltaNet, heads=heads, head_dim=HEAD),
        "NativeSparseAttention": partial(mixers.NativeSparseAttention, heads=heads),
        "Attention, window 512": local,
        "MoM": partial(mixers.MoM, mixer=partial(mixers.GatedDeltaNet, heads=heads, head_dim=HEAD)),
        "MoH": partial(mixers.MoH, heads=2 * heads, shared=heads, active=heads // 2),
        "Scout": partial(mixers.Scout, mixer=MAMBA2, heads=heads),
        "Parallel": partial(mixers.Parallel, mixers={"a": local, "m": MAMBA2}),
        "Bidirectional": partial(mixers.Bidirectional, mixer=MAMBA2),
        "PrefixMixer": partial(mixers.PrefixMixer, mixer=MAMBA2),
        "GatedMemoryUnit": mixers.GatedMemoryUnit,
        "Convolution": mixers.Convolution,
    }
    for name in mixers.__all__:
        kind = getattr(mixers, name)
        if isinstance(kind, type) and issubclass(kind, mixers.Mixer) and kind is not mixers.Mixer:
            found.setdefault(name, partial(kind, heads=heads))
    return found


def _forget_peak() -> bool:
    """Give freed memory back and let the system count the peak from here."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _held(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


class Pass:
    """One forward and backward pass of a mixer over one row, ``run`` as often as you like."""

    def __init__(self, make: MixerFactory, width: int, length: int) -> None:
        torch.manual_seed(0)
        self.mixer = make(width)
        self.hidden = torch.randn(1, length, width, requires_grad=True)
        self.layout = SequenceLayout.build(1, length)
        self.more: tuple[Any, ...] = ()
        if isinstance(self.mixer, mixers.GatedMemoryUnit):  # what another block has made: its cost is that block's
            self.more = (None, torch.randn(1, length, self.mixer.width))
        elif isinstance(self.mixer, mixers.SharedAttention):
            keys, values = torch.randn(2, 1, length, self.mixer.heads, self.mixer.head_dim)
            self.more = (None, Seen(keys, values))

    def run(self) -> float:
        """CPU seconds of all threads of this process."""
        self.mixer.zero_grad()
        self.hidden.grad = None
        begin = time.process_time()
        self.mixer(self.hidden, self.layout, *self.more)[0].square().mean().backward()
        return time.process_time() - begin


def measure(name: str, width: int, lengths: list[int], repeats: int, limit: float) -> Iterator[dict[str, Any]]:
    """Cost of mixer ``name`` and, beside it in the same process, of the reference, a line for each length.

    Short rows are run ``repeats`` times, the two in turn, and the least time counts, since what else runs on the
    machine can only add to it; rows beyond 65,536 tokens once. After ``limit`` CPU seconds the system ends the process;
    beyond ``ROOM`` bytes torch does.
    """
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (ROOM, resource.RLIM_INFINITY))
    known = factories(width)
    for make in (known[name], known[REFERENCE]):
        Pass(make, width, 300).run()  # what is loaded or prepared once
    for length in lengths:
        used = math.ceil(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + math.ceil(limit), resource.RLIM_INFINITY))
        ours = Pass(known[name], width, length)
        able = _forget_peak()
        before = _held("VmRSS")
        times = [ours.run()]
        peak = _held("VmHWM") - before if able else None
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        theirs = Pass(known[REFERENCE], width, length)
        reference = [theirs.run()]
        for _ in range(repeats - 1 if length <= 65536 and times[0] < 0.2 * limit else 0):
            times.append(ours.run())
            reference.append(theirs.run())
        yield {"mixer": name, "width": width, "tokens": length, "limit": limit, "cpu_s": min(times),
               "reference_cpu_s": min(reference), "peak_bytes": peak, "runs": len(times)}  # fmt: skip
