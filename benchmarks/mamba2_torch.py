"""Chunked Mamba2 on a CPU against transformers' torch path: time, peak memory, and cost per token up to 131,072."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from seqlong.bench import Row, main

WIDTH, STATE, HEAD = 256, 128, 64
PEER = "transformers Mamba2Model"


def ours() -> Callable[[torch.Tensor], torch.Tensor]:
    """Embedding, one Mamba2 block, norm."""
    from seqlong.backbone import Backbone, BackboneConfig
    from seqlong.batch import SequenceBatch
    from seqlong.mixers import Mamba2

    mixer = partial(Mamba2, d_state=STATE, head_dim=HEAD)
    model = Backbone(BackboneConfig(vocab_size=16, d_model=WIDTH, pattern="m", mixers={"m": mixer}, ffn=None))
    return lambda tokens: model(SequenceBatch(tokens=tokens)).hidden


def theirs() -> Callable[[torch.Tensor], torch.Tensor]:
    """The same model, of transformers, on its torch path (its default chunk of 256)."""
    for kernel_package in ("fla", "mamba_ssm", "causal_conv1d"):
        sys.modules[kernel_package] = None  # type: ignore[assignment]
    from transformers import Mamba2Config, Mamba2Model

    model = Mamba2Model(
        Mamba2Config(
            vocab_size=16, hidden_size=WIDTH, state_size=STATE, num_heads=2 * WIDTH // HEAD, head_dim=HEAD, expand=2,
            n_groups=1, num_hidden_layers=1,
        )
    )  # fmt: skip
    return lambda tokens: model(tokens).last_hidden_state


def measure(who: str, length: int) -> dict[str, float]:
    """In a fresh process: the best of three steps, and the memory that they add to the process's peak."""
    command = [sys.executable, __file__, "--measure", who, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure_here(who: str, length: int) -> None:
    torch.manual_seed(0)
    forward = {"ours": ours, "theirs": theirs}[who]()
    forward(torch.randint(0, 16, (1, 256))).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens, times = torch.randint(0, 16, (1, length)), []
    for _ in range(3):
        start = time.perf_counter()
        forward(tokens).square().mean().backward()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": min(times), "mib": peak / 1024}))


def rows() -> Iterator[Row]:
    shape = f"one block, width {WIDTH}, state {STATE}"
    mine, other = measure("ours", 8192), measure("theirs", 8192)
    yield Row(f"8,192 tokens, {shape}", "forward and backward", mine["seconds"], "s", PEER, other["seconds"])
    yield Row(f"8,192 tokens, {shape}", "peak memory", mine["mib"], "MiB", PEER, other["mib"])
    for length in (8192, 32768, 131072):
        found = measure("ours", length)
        yield Row(f"{length:,} tokens, {shape}", "time per token", found["seconds"] / length * 1e6, "µs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    if asked := parser.parse_args().measure:
        _measure_here(asked[0], int(asked[1]))
    else:
        main("mamba2_torch", rows(), on="cpu")
