"""A contig read along one of its strands, as bytes and as tokens: the coordinates that scoring works in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from seqlong.datamodules.dna.alphabet import encode, encode_targets, reverse_complement
from seqlong.datamodules.dna.genome import Genome


@dataclass(frozen=True)
class Strand:
    """One strand of a contig, its bases numbered from 0 in its own reading direction.

    Attributes:
        genome: where the bases are.
        contig: number of the contig.
        reverse: False for the strand that the file holds, True for its reverse complement.
    """

    genome: Genome
    contig: int
    reverse: bool = False

    @property
    def length(self) -> int:
        """Bases."""
        return self.genome.contigs[self.contig].length

    @property
    def circular(self) -> bool:
        """Whether reading goes on past the end, from the beginning."""
        return self.genome.contigs[self.contig].circular

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Letters of ``start`` to ``stop``; less where a linear contig ends, none where ``stop <= start``."""
        if not self.circular:
            start, stop = max(start, 0), min(stop, self.length)
        if stop <= start:
            return np.zeros(0, dtype=np.uint8)
        if not self.reverse:
            return self.genome.read(self.contig, start, stop)
        return reverse_complement(self.genome.read(self.contig, self.length - stop, self.length - start))

    def place(self, start: int, size: int) -> int:
        """Where ``size`` bases at ``start`` of the forward strand begin on this one."""
        return self.length - start - size if self.reverse else start

    def allele(self, letters: bytes) -> NDArray[np.uint8]:
        """An allele of the forward strand, as this one reads it."""
        bases = np.frombuffer(letters, dtype=np.uint8)
        return reverse_complement(bases) if self.reverse else bases


def tokens_of(letters: NDArray[np.uint8]) -> Int[Tensor, "..."]:
    """Tokens of letters, int64."""
    return torch.from_numpy(encode(letters).astype(np.int64))


def targets_of(letters: NDArray[np.uint8]) -> Int[Tensor, "..."]:
    """The tokens to predict: -1 where the base is not known."""
    return torch.from_numpy(encode_targets(letters).astype(np.int64))
