"""Sequence parallelism: rows that several processes hold give what one process gives, output and every gradient."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from sequence_parallel import cases, gradients

#: Everything that works out a state or exchanges heads by itself, and of the rest, which gathers, a few.
NAMES = [
    "mamba2", "mamba2_groups", "mamba2_recompute", "attention_rope", "attention_gqa", "attention_mqa_alibi",
    "attention_window", "attention_both_sides", "attention_sinks", "attention_gated", "differential", "moba", "gla",
    "gla_conv", "hgrn2", "linear_attention", "linear_attention_softmax", "retnet", "lightning", "lightning_low_rank",
    "cosformer2", "simple_gla", "deltanet", "deltanet_negative", "gated_deltanet", "gated_deltanet_groups", "kda",
    "kda_safe", "rwkv7", "log_linear_mamba2", "mamba2_both_sides", "mamba2_both_sides_tied",
    "gla_joined", "latent", "parallel", "parallel_both_sides",
]  # fmt: skip


def spawn(ranks: int, folder: Path, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """What ``ranks`` processes find together."""
    script = Path(__file__).parent / "sequence_parallel.py"
    store, result = folder / "store", folder / "result.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(ranks), str(store), str(result), ",".join(names)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    said = []
    try:
        said = [child.communicate(timeout=240)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode == 0 for child in children), "\n".join(text[-2000:] for text in said)
    return torch.load(result, weights_only=True)


@pytest.mark.parametrize(("ranks", "names"), [(2, NAMES[::5]), (4, NAMES)])
def test_fragments_are_the_row(ranks: int, names: list[str], tmp_path: Path) -> None:
    found = spawn(ranks, tmp_path, names)
    wrong = []
    for case, mixer, hidden, weigh, whole in cases(names):
        exact = gradients(mixer, hidden, weigh, lambda mixer, x, whole=whole: mixer(x, whole)[0])
        assert set(found[case]) == set(exact), case
        for name, value in exact.items():
            away = (found[case][name] - value).abs().max() / value.abs().max().clamp(min=1)
            if not away < 1e-12:
                wrong.append(f"{case}: {name} {away:.1e}")
    assert not wrong, "\n".join(wrong)
