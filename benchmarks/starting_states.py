"""Rows 64 times as long as those of training: DeltaNet that starts from zero, passed states or noise; RoPE stretched.

Books as bytes; a tiny model for each, trained with the same rows, 32 bytes each, and tested on rows of 2,048 of another
book. The peer of ``task.start`` is the same model that always starts from zero (arXiv 2507.02782); that of position
interpolation is the same attention without it. Draws bits by position. ``--path FOLDER`` measures on text of your own.
"""

from __future__ import annotations

import argparse
import gzip
import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from seqlong.backbone import BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.bench import Row, main
from seqlong.callbacks.loss_by_position import show
from seqlong.datamodules import synthetic
from seqlong.mixers import Attention, DeltaNet
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks import CausalLM

LENGTH, TIMES, BATCH = 32, 64, 16
CURVES: dict[str, list[tuple[int, float]]] = {}


def books(path: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Text to train on and to test on; without a path the first and the last part of the bundled book."""
    if path is None:
        packed = Path(synthetic.__file__).with_name("data") / "alice.txt.gz"
        data = np.frombuffer(gzip.decompress(packed.read_bytes()), dtype=np.uint8)
        return data[: len(data) * 3 // 4], data[len(data) * 3 // 4 :]
    files = sorted(Path(path).glob("*.txt"))
    parts = [np.frombuffer(file.read_bytes(), dtype=np.uint8) for file in files]
    return np.concatenate(parts[:-1]), parts[-1]


def rows(text: np.ndarray, starts: np.ndarray, length: int, first: int = 0) -> SequenceBatch:
    """Rows of ``length`` bytes from ``starts`` on."""
    found = torch.from_numpy(np.stack([text[at : at + length + 1] for at in starts]).astype(np.int64)) + 4
    return SequenceBatch(found[:, :-1], found[:, 1:], index=torch.arange(first, first + len(starts)))


def trained(kind: str, start: str, text: np.ndarray, steps: int) -> CausalLM:
    """Two blocks of width 64 after ``steps`` steps."""
    torch.manual_seed(0)
    mixer = partial(DeltaNet, heads=2) if kind == "delta" else partial(Attention, heads=2)
    task = CausalLM(BackboneConfig(260, 64, "mm", {"m": mixer}), start=start)  # type: ignore[arg-type]
    optimizer = Optimizer(lr=4e-3).build(task)
    schedule = Schedule().build(optimizer, steps)
    generator = np.random.default_rng(0)
    for step in range(steps):
        batch = rows(text, generator.integers(0, len(text) - LENGTH - 1, BATCH), LENGTH, step * BATCH)
        task.objective(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return task.eval()


@torch.no_grad()
def bits(task: CausalLM, text: np.ndarray, name: str) -> tuple[float, float]:
    """Within the length of training, and in the last half of 64 times it; keeps the curve."""
    length = LENGTH * TIMES
    batch = rows(text, np.linspace(0, len(text) - length - 1, 12).astype(np.int64), length)
    assert batch.targets is not None
    found = task.head.loss(task.backbone(batch).hidden, batch.targets).mean(0) / math.log(2)
    edges = sorted({round(2 ** (n / 2)) for n in range(2, 2 * int(math.log2(length)) + 1)})
    CURVES[name] = [(a, float(found[a - 1 : b - 1].mean())) for a, b in pairwise(edges)]
    return float(found[LENGTH // 2 : LENGTH].mean()), float(found[length // 2 :].mean())


def measured(given: argparse.Namespace) -> Iterator[Row]:
    """One row a comparison."""
    torch.set_num_threads(1)
    text, test = books(given.path)
    zero = bits(trained("delta", "zero", text, given.steps), test, "DeltaNet, start=zero")
    for start in ("passed", "noise"):
        near, far = bits(trained("delta", start, text, given.steps), test, f"DeltaNet, start={start}")
        peer = "seqlong start=zero"
        yield Row(f"DeltaNet, start={start}", "bits a byte, within 32", near, "bits", peer, zero[0])
        yield Row(f"DeltaNet, start={start}", "bits a byte, 1,024 to 2,048", far, "bits", peer, zero[1])
    attention = trained("attention", "zero", text, given.steps)
    plain = bits(attention, test, "attention, RoPE")
    for block in attention.backbone.blocks:
        block.mixer.rope_scale = float(TIMES)  # type: ignore[union-attr]
    near, far = bits(attention, test, f"attention, rope_scale={TIMES}")
    peer = "seqlong rope_scale=1"
    yield Row(f"attention, rope_scale={TIMES}", "bits a byte, 1,024 to 2,048", far, "bits", peer, plain[1])


def draw(found: list[Row], figure: Figure) -> None:
    """Bits by position."""
    show(figure, CURVES, LENGTH)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", help="a folder of .txt files of your own; the last is for the test")
    parser.add_argument("--steps", type=int, default=500, help="of training")
    main("starting_states", measured(parser.parse_args()), draw, on="cpu")
