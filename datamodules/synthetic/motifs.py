"""Needles in DNA: motifs hidden in a genome, or in random bases, and asked for at the end of the row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.alphabet import BASE_TABLE, DnaVocabulary, N, translate
from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.synthetic.draw import Draw, Ints
from seqlong.datamodules.synthetic.generator import RecallTask, Rows, at_least
from seqlong.errors import ConfigError, DataError

_FIRST = 4  # token of the first base; the others follow


class DnaNeedle(RecallTask):
    """Motifs in DNA: each is a key of some bases and a value behind it. At the end N and a key ask for its value.

    The tokens are those of the genomic data, so a model that was trained on genomes can be asked. A key stands once in
    the row: where it came by chance once more, single bases there are changed.

    Args:
        motifs: hidden in a row.
        queries: of them that are asked for, each behind an N.
        key_bases: bases of a key, at most 31.
        value_bases: bases of a value, all of which must be right.
        background: ``random`` bases, ``ecoli`` (embedded), or the path of a FASTA or GenBank file.
        cache_dir: where the index of such a file goes; null for the user's cache.

    Raises:
        ConfigError: a setting is out of its range.
        DataError: the file cannot be read.
    """

    title = "motifs in DNA"
    counted = "motifs"
    varied = "motifs"
    vocab_size = DnaVocabulary.size

    def __init__(
        self,
        motifs: int = 1,
        queries: int = 1,
        key_bases: int = 12,
        value_bases: int = 6,
        background: str = "random",
        cache_dir: str | None = None,
    ) -> None:
        self.motifs, self.queries, self.background = motifs, queries, background
        self.key_bases, self.value_bases, self._cache_dir = key_bases, value_bases, cache_dir
        for name, value in (("queries", queries), ("key_bases", key_bases), ("value_bases", value_bases)):
            at_least(name, value, 1, "DnaNeedle")
        if key_bases > 31:
            raise ConfigError(f"DnaNeedle needs key_bases of at most 31, found {key_bases}")
        self._genome: Genome | None = None
        self.check()

    def check(self) -> None:
        at_least("motifs", self.motifs, self.queries, f"DnaNeedle with {self.queries} queries")
        if 4**self.key_bases < 4 * self.motifs:
            raise ConfigError(f"DnaNeedle has too few keys of {self.key_bases} bases for {self.motifs} motifs")

    def rows(self, draw: Draw, length: int) -> Rows:
        k, v, count = self.key_bases, self.value_bases, self.motifs
        body = length - self.queries * (1 + k + v) + 1  # the row ends before the last base of the last answer
        if body < count * (k + v):
            needed = length + count * (k + v) - body
            raise self.too_short(length, needed, f"{count} motifs and {self.queries} questions")
        if 4**k < 4 * body:
            raise ConfigError(
                f"DnaNeedle: keys of {k} bases come by chance in rows of {length:,}; raise key_bases to "
                f"{int(np.ceil(np.log2(4 * body) / 2))} or more"
            )
        keys = _bases(draw.distinct(4**k, count), k).reshape(draw.rows, count, k)
        values = draw.below(4, count * v).reshape(draw.rows, count, v)
        free = np.sort(draw.below(body - count * (k + v) + 1, count), axis=1)
        place = free + np.arange(count) * (k + v)  # of each motif, none over another
        text = self._hay(draw, body)
        inside = (place[:, :, None] + np.arange(k)).reshape(draw.rows, -1)
        np.put_along_axis(text, inside, keys.reshape(draw.rows, -1), axis=1)
        behind = (place[:, :, None] + k + np.arange(v)).reshape(draw.rows, -1)
        np.put_along_axis(text, behind, values.reshape(draw.rows, -1), axis=1)
        text = self._unique(draw, text, keys, place, inside)
        asked = draw.distinct(count, self.queries)
        return self._ask(text, place, asked, length)

    def _ask(self, text: Ints, place: Ints, asked: Ints, length: int) -> Rows:
        """Questions behind the text: N, a key, its value, and so on."""
        k, v = self.key_bases, self.value_bases
        rows, body = text.shape
        page = np.full((rows, length + 1), N, dtype=np.int64)
        page[:, :body] = np.where(text < 4, text + _FIRST, N)
        targets, told, answer = (np.full((rows, length), -1, dtype=np.int64) for _ in range(3))
        at = np.take_along_axis(place, asked, axis=1)
        for number in range(self.queries):
            begin = body + number * (1 + k + v) + 1
            motif = at[:, number : number + 1] + np.arange(k + v)
            page[:, begin : begin + k + v] = np.take_along_axis(page, motif, axis=1)
            where = slice(begin + k - 1, begin + k + v - 1)
            targets[:, where], told[:, where] = page[:, begin + k : begin + k + v], motif[:, k:]
            answer[:, where] = number
        return Rows.of(page[:, :-1].copy(), targets, told, self.motifs, answer)

    def _hay(self, draw: Draw, body: int) -> Ints:
        """``(b body)`` numbers of bases from 0, 4 where one is not known."""
        if self.background == "random":
            return draw.below(4, body)
        if self._genome is None:
            self._genome = Genome.open(self.background, self._cache_dir)
        sizes = np.array([contig.length - body + 1 for contig in self._genome.contigs])
        if sizes.max() < 1:
            longest = max(contig.length for contig in self._genome.contigs)
            raise DataError(
                f"{self.background}: the longest record has {longest:,} bases, but a row needs {body:,}; "
                "shorten the rows"
            )
        ends = np.cumsum(np.maximum(sizes, 0))
        where = draw.below(int(ends[-1]), 1)[:, 0]
        contigs = np.searchsorted(ends, where, side="right")
        starts = where - (ends - np.maximum(sizes, 0))[contigs]
        read = [self._genome.read(int(c), int(s), int(s) + body) for c, s in zip(contigs, starts, strict=True)]
        return translate(np.stack(read), BASE_TABLE).astype(np.int64)

    def _unique(self, draw: Draw, text: Ints, keys: Ints, place: Ints, inside: Ints) -> Ints:
        """The text with bases changed until each key stands in its place alone."""
        k = self.key_bases
        wanted = np.sort(_codes(keys.reshape(draw.rows, -1), k)[:, ::k], axis=1)
        fixed = np.zeros(text.shape, dtype=np.bool_)
        np.put_along_axis(fixed, inside, True, axis=1)
        source = draw.fork()
        while True:
            codes = _codes(text, k)
            found = np.stack([np.isin(codes[row], wanted[row]) for row in range(draw.rows)])
            np.put_along_axis(found, place, False, axis=1)
            if not found.any():
                return text
            touched = np.zeros(text.shape, dtype=np.bool_)
            for offset in range(k):
                touched[:, offset : offset + found.shape[1]] |= found
            text = np.where(touched & ~fixed, source.below(4, text.shape[1]), text)

    def chance(self) -> float:
        return 4.0**-self.value_bases

    def settings(self) -> dict[str, object]:
        return {"motifs": self.motifs, "queries": self.queries, "key_bases": self.key_bases,
                "value_bases": self.value_bases, "background": self.background}  # fmt: skip


def _bases(codes: Ints, k: int) -> Ints:
    """Bases of words of ``k``: ``(b n)`` to ``(b n k)``, the first base in the highest two bits."""
    return codes[..., None] >> 2 * np.arange(k - 1, -1, -1) & 3


def _codes(text: Ints, k: int) -> NDArray[np.int64]:
    """The word of ``k`` bases at each place, ``(b t - k + 1)``; -1 where one of them is not known."""
    size = text.shape[1] - k + 1
    codes, unknown = np.zeros((len(text), size), dtype=np.int64), np.zeros((len(text), size), dtype=np.bool_)
    for offset in range(k):
        part = text[:, offset : offset + size]
        codes = codes << 2 | part & 3
        unknown |= part > 3
    return np.where(unknown, -1, codes)
