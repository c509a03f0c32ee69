"""Variants a second of `seqlong score`: against scoring both whole windows of every variant, with the same model.

Every variant is scored on both strands. The peer is what tools without states do: a window for the reference and one
for the allele, each read from its first base, in batches of as many positions (on a CPU the faster of two sizes). Its
scores are compared with ours. "Dense" is every change of neighbouring bases, as in saturation mutagenesis; "sparse" has
a variant every two windows, so that only the left context of its own alleles can be shared. On a CPU it is the time of
the processor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from seqlong.backbone import BackboneConfig
from seqlong.bench import Row, main
from seqlong.datamodules.dna.genome import Genome
from seqlong.inference.model import Model, load
from seqlong.inference.strands import Strand, targets_of, tokens_of
from seqlong.inference.variants import Variant, Window, haplotype, score
from seqlong.mixers import Attention, Mamba2
from seqlong.tasks import CausalLM

PEER = "window by window"


def window_by_window(
    model: Model, strand: Strand, variants: Sequence[Variant], window: Window, batch_tokens: int
) -> NDArray[np.float64]:
    """The scores of substitutions from two whole windows each."""
    rows = []
    for variant in variants:
        begin = window.begin(variant.start, strand)
        rows += [haplotype(strand, begin, begin + window.length, allele) for allele in (None, variant)]
    sums = []
    size = max(2, batch_tokens // window.length)
    for first in range(0, len(rows), size):
        letters = np.stack(rows[first : first + size])
        values, _ = model.log_likelihood(tokens_of(letters)[:, :-1], targets_of(letters)[:, 1:])
        sums.append(values.double().sum(dim=1).cpu().numpy())
    return np.diff(np.concatenate(sums).reshape(-1, 2))[:, 0]


def substitutions(strand: Strand, places: Sequence[int], changes: int) -> list[Variant]:
    """``changes`` changes of each base."""
    found = []
    for place in places:
        ref = strand.read(place, place + 1).tobytes().upper()
        found += [Variant(place, ref, bytes([base])) for base in b"ACGT" if bytes([base]) != ref][:changes]
    return found


def seconds(run: Callable[[], NDArray[np.float64]], repeats: int) -> tuple[float, NDArray[np.float64]]:
    """The median time, after a first one to warm up a GPU, and the result."""
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time  # other programs' time is not ours
    result, times = run() if gpu else np.zeros(0), []
    for _ in range(repeats):
        if gpu:
            torch.cuda.synchronize()
        began = clock()
        result = run()
        if gpu:
            torch.cuda.synchronize()
        times.append(clock() - began)
    return float(np.median(times)), result


def untrained() -> Model:
    """As large as ``model=hybrid_small``; speed does not depend on what was learnt."""
    mixers = {"m": partial(Mamba2, d_state=32, head_dim=32), "a": partial(Attention, heads=4, window=512)}
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    task = CausalLM(BackboneConfig(d_model=128, pattern="mmma", mixers=mixers)).eval().requires_grad_(False).to(device)
    return Model(task, Path("hybrid_small"), device, "bfloat16" if gpu else "float32")


def rows(checkpoint: str | None, lengths: Sequence[int], dense: int, sparse: int, repeats: int) -> Iterator[Row]:
    """Measure, one row at a time."""
    model = load(checkpoint) if checkpoint else untrained()
    gpu = model.device.type == "cuda"
    batches = (262144,) if gpu else (4096, 16384)
    genome = Genome.open("ecoli")
    strands = [Strand(genome, 0), Strand(genome, 0, True)]
    name = f"{sum(p.numel() for p in model.task.parameters()) / 1e6:.1f} M parameters"
    for length in lengths:
        window = Window(length)
        fewer = max(1, length // lengths[0])  # so that each length reads about as many bases
        cases = {
            "dense": substitutions(strands[0], range(1_000_000, 1_000_000 + max(16, dense // 3 // fewer)), 3),
            "sparse": substitutions(strands[0], [500_000 + 2 * length * n for n in range(max(4, sparse // fewer))], 1),
        }
        for what, variants in cases.items():
            best = []
            for way in (score, window_by_window):
                each = [
                    seconds(partial(_both, way, model, strands, variants, window, batch), repeats) for batch in batches
                ]
                best.append(min(each, key=lambda pair: pair[0]))
            (ours, own), (theirs, peer) = best
            error = float(np.abs(own - peer).max() / max(1e-9, np.abs(peer).max()))
            if error > (0.3 if gpu else 1e-2):
                raise AssertionError(f"the two ways differ by {error:.2%} of the largest score")
            count = len(variants)
            yield Row(f"{what}, {name}, windows of {length:,}", "variants on both strands", count / ours, "variants/s",
                      PEER, count / theirs)  # fmt: skip


def _both(
    way: Callable[..., NDArray[np.float64]],
    model: Model,
    strands: Sequence[Strand],
    variants: Sequence[Variant],
    window: Window,
    batch_tokens: int,
) -> NDArray[np.float64]:
    each = [way(model, one, [v.on(one) for v in variants], window, batch_tokens=batch_tokens) for one in strands]
    return np.mean(each, axis=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", help="a checkpoint; an untrained model as large as hybrid_small if left out")
    parser.add_argument("--lengths", default=None, help="windows, with commas")
    parser.add_argument("--dense", type=int, default=None, help="neighbouring variants")
    parser.add_argument("--sparse", type=int, default=None, help="lone variants")
    parser.add_argument("--repeats", type=int, default=None, help="runs whose median counts")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(1)
    sizes = [int(text) for text in given.lengths.split(",")] if given.lengths else [8192, 65536] if on_gpu else [2048]
    many = given.dense or (768 if on_gpu else 48)
    few = given.sparse or (64 if on_gpu else 6)
    main("variants", rows(given.ckpt, sizes, many, few, given.repeats or (2 if on_gpu else 1)))
