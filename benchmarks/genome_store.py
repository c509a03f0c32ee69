"""Windows of a genome as token ids, reverse complement included, on one core: against pyfaidx with Python loops.

The peer does what the public training codes do (HyenaDNA, Caduceus): a pyfaidx slice, a reverse complement and a
tokenizer character by character, a list to a LongTensor. Both read the embedded E. coli genome, from a warm page cache.
"""

from __future__ import annotations

import argparse
import gzip
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyfaidx
import torch

from seqlong.bench import Row, main
from seqlong.datamodules.dna.alphabet import TOKEN_TABLE, encode, reverse_complement
from seqlong.datamodules.dna.datamodule import GenomeData
from seqlong.datamodules.dna.store import GenomeStore

LENGTHS = (8_192, 131_072, 1_048_576)
PEER = "pyfaidx + Python loops"
COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N", "a": "t", "c": "g", "g": "c", "t": "a", "n": "n"}
TOKENS = {letter: TOKEN_TABLE[ord(letter)] for letter in "ACGTN"}


def windows_per_second(window: Callable[[int], torch.Tensor], bases: int, length: int, seconds: float = 2.0) -> float:
    """Windows a second at random starts, after three to warm up."""
    starts = random.Random(0)
    for _ in range(3):
        window(starts.randrange(bases - length))
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        window(starts.randrange(bases - length))
        done += 1
    return done / (time.perf_counter() - begin)


def rows() -> Iterator[Row]:
    """Measure, one row at a time."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        store = GenomeStore.build_or_open("ecoli", folder)
        built = time.perf_counter() - begin
        plain = Path(folder) / "ecoli.fa"
        begin = time.perf_counter()
        with gzip.open(store.path) as source, plain.open("wb") as target:  # pyfaidx reads no plain gzip
            shutil.copyfileobj(source, target)
        fasta = pyfaidx.Fasta(str(plain))
        yield Row(
            "E. coli, gzip", "index from nothing", built, "s", "pyfaidx after gunzip", time.perf_counter() - begin
        )

        contig = store.contigs[0].name
        for length in LENGTHS:

            def ours(start: int, length: int = length) -> torch.Tensor:
                tokens = encode(reverse_complement(store.window(contig, start, start + length)))
                return torch.from_numpy(tokens.astype(np.int64))

            def theirs(start: int, length: int = length) -> torch.Tensor:
                bases = str(fasta[contig][start : start + length])
                turned = "".join(COMPLEMENT[base] for base in reversed(bases))
                return torch.LongTensor([TOKENS[base] for base in turned.upper()])

            if not torch.equal(ours(1_000), theirs(1_000)):
                raise AssertionError("the two ways to make a window differ")
            value, peer = (windows_per_second(window, store.bases, length) for window in (ours, theirs))
            yield Row(f"{length:,} bases", "windows with reverse complement", value, "windows/s", PEER, peer)

        for length in LENGTHS:
            data = GenomeData(length=length, batch_size=1, cache_dir=folder)
            batches = iter(data.train_dataloader())
            value = windows_per_second(lambda _, batches=batches: next(batches).tokens, store.bases, length)
            yield Row(f"{length:,} bases", "whole training batches of one row", value, "windows/s")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main("genome_store", rows(), on="cpu")
