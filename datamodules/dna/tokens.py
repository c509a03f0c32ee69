"""Tokens of DNA beside single bases: words of k bases, codons under a genetic code, pairs learnt from bases (BPE).

A tokenizer reads the same bytes that the store holds, a whole window at a time, in arrays. Ids are

    0 <pad>, 1 <mask>, 2 <bos>, 3 <eos>, then 4 + w for the word w, and last 4 + 4^k for a word that is not known

where ``w = Σ_i 4^(k-1-i) b_i`` and b is 0, 1, 2, 3 for A, C, G, T (U is read as T, lower case as upper case). Any other
letter (N and other IUPAC codes) makes its whole word unknown. Words of one base have the ids of `alphabet`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.alphabet import BASE_TABLE, LEGAL, LETTERS, MASK, PAD, A, Bytes, translate
from seqlong.errors import ConfigError, DataError

Ids = NDArray[np.int64]
#: Longest words; 4^k embeddings of 9 bases and more would be larger than the models that read them.
MAX_K = 10
SPECIAL = ("<pad>", "<mask>", "<bos>", "<eos>")


@dataclass(frozen=True)
class TokenizerSettings:
    """How bases become tokens.

    Attributes:
        kind: ``base``: a token a base; ``kmer``: words of ``k`` bases; ``codon``: words of three in their reading
            frame, with a genetic code; ``bpe``: pieces learnt by ``seqlong tokenizer train genome.fa``.
        k: bases of a word, 1 to 10; for ``kmer``.
        overlap: whether a word begins at every base, or where the one before ended; for ``kmer``.
        code: number of NCBI's genetic code, 1 is the standard one, 11 that of bacteria; for ``codon``.
        file: a tokenizer.json; for ``bpe``.
    """

    kind: Literal["base", "kmer", "codon", "bpe"] = "base"
    k: int = 6
    overlap: bool = False
    code: int = 1
    file: str | None = None


class DnaTokenizer(ABC):
    """Token ids and the bases that they stand for.

    Attributes:
        name: for people.
        unit: what a token is called.
        size: number of ids.
        pad: id of padding.
        mask: id that hides a token; None where there is none.
        unknown: id of a word or base that is not known, never predicted.
        span: bases of a token; None where they differ.
        stride: bases from one token to the next; of ``span`` None, 1.
        frame: windows begin at a multiple of so many bases of their record.
        complement: ``(size)`` the id of each token's reverse complement; None where no table can say it.
    """

    name: str
    unit: str
    size: int
    pad: int = PAD
    mask: int | None = MASK
    unknown: int
    span: int | None
    stride: int = 1
    frame: int = 1
    complement: Ids | None = None

    @abstractmethod
    def tokens(self, bases: Bytes) -> Ids:
        """Ids of the bytes of one strand, read from the first to the last."""

    @abstractmethod
    def widths(self, ids: Ids) -> Ids:
        """Bases that each id stands for."""

    @abstractmethod
    def decode(self, tokens: Sequence[int] | Ids) -> str:
        """The bases of ids, N where they are not known; special tokens by their names."""

    @property
    @abstractmethod
    def replacements(self) -> Sequence[int]:
        """Ids that a random corruption may draw."""

    def known(self, ids: Ids) -> NDArray[np.bool_]:
        """Which ids may be predicted."""
        return (ids >= len(SPECIAL)) & (ids != self.unknown)

    def encode(self, sequence: str) -> list[int]:
        """Ids of a string of bases, of any case.

        Raises:
            DataError: a letter is no nucleotide; with its place.
        """
        data = np.frombuffer(sequence.encode("latin-1", errors="replace"), dtype=np.uint8)
        wrong = np.flatnonzero(~np.isin(data, np.frombuffer(LEGAL, dtype=np.uint8)))
        if wrong.size:
            place = int(wrong[0])
            raise DataError(
                f"illegal letter {sequence[place]!r} at position {place + 1} of the sequence; expected {LETTERS} in "
                "either case"
            )
        return self.tokens(data).tolist()

    def check_strands(self, pairs: Sequence[int]) -> None:
        """Raise ConfigError unless ``pairs``, the model's table of complements, is this tokenizer's."""
        if self.complement is None:
            raise ConfigError(
                f"{self.name}: a token of one strand is no token of the other, so tokens cannot be turned; set "
                "model.backbone.rc=none and task.rc=none. (data.reverse_complement turns bases, and cuts them into "
                "tokens anew.)"
            )
        if list(pairs[: self.size]) != self.complement.tolist():
            raise ConfigError(
                f"{self.name}: model.backbone.complement pairs other tokens than the tokenizer's; set "
                "'model.backbone.complement=${complement_of:${data.tokenizer}}'"
            )


class KmerTokenizer(DnaTokenizer):
    """Words of k bases.

    With ``overlap`` there are ``t - k + 1`` of them in t bases, else ``t // k``, and the last ``t % k`` bases are left
    out. Reversing the ids and pairing each with its ``complement`` gives the ids of the other strand: always with
    overlap, else where t is a multiple of k.

    Args:
        k: bases of a word, 1 to 10.
        overlap: see above.

    Raises:
        ConfigError: k is out of its range.
    """

    def __init__(self, k: int, overlap: bool = False) -> None:
        if not 1 <= k <= MAX_K:
            raise ConfigError(f"data.tokenizer.k is {k}; expected 1 to {MAX_K} bases (there are 4^k words)")
        self.k, self.overlap = k, overlap
        self.span, self.stride = k, 1 if overlap else k
        self.words = 4**k
        self.unknown = A + self.words
        self.size = self.unknown + 1
        self.unit = f"{k}-mer"
        self.name = f"words of {k} bases" + (", one at every base" if overlap else "")

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("letters", "complement")}

    @property
    def replacements(self) -> Sequence[int]:
        return range(A, self.unknown)

    @cached_property
    def complement(self) -> Ids:  # type: ignore[override]
        """``(size)`` the id of each token's reverse complement."""
        left, turned = np.arange(self.words, dtype=np.int64), np.zeros(self.words, dtype=np.int64)
        for _ in range(self.k):
            turned = 4 * turned + 3 - left % 4
            left //= 4
        return np.concatenate([np.arange(A), turned + A, [self.unknown]]).astype(np.int64)

    @cached_property
    def letters(self) -> Sequence[str]:
        """What each id is called."""
        digits = self._digits(np.arange(self.words))
        shown = np.frombuffer(b"ACGT", dtype=np.uint8)[digits].tobytes().decode()
        return (*SPECIAL, *(shown[at : at + self.k] for at in range(0, len(shown), self.k)), "N" * self.k)

    def tokens(self, bases: Bytes) -> Ids:
        count = max(0, (bases.size - self.k) // self.stride + 1)
        digits = translate(bases, BASE_TABLE)
        word, bad = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
        for place in range(self.k if count else 0):
            column = digits[place : place + (count - 1) * self.stride + 1 : self.stride]
            bad |= column == 4
            word *= 4
            word += column
        word += A
        word[bad] = self.unknown
        return word

    def widths(self, ids: Ids) -> Ids:
        return np.where(ids >= A, self.k, 0).astype(np.int64)

    def decode(self, tokens: Sequence[int] | Ids) -> str:
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.size):
            raise DataError(f"{self.name}: found id {int(ids.max())}, expected 0 to {self.size - 1}")
        return "".join(self._written(run) for run in _runs(ids))

    def _written(self, run: Ids) -> str:
        """Bases of a run of words, or the names of special tokens. Where words overlap, any that is known tells."""
        if run[0] < A:
            return "".join(SPECIAL[number] for number in run.tolist())
        text = np.full((run.size - 1) * self.stride + self.k, ord("N"), dtype=np.uint8)
        good = run != self.unknown
        digits = np.frombuffer(b"ACGT", dtype=np.uint8)[self._digits(run[good] - A)]
        places = np.flatnonzero(good) * self.stride
        for place in range(self.k):
            text[places + place] = digits[:, place]
        return text.tobytes().decode()

    def _digits(self, words: Ids) -> NDArray[np.int64]:
        """``(n k)`` bases of words, 0 to 3."""
        return words[:, None] // 4 ** np.arange(self.k - 1, -1, -1, dtype=np.int64) % 4


class CodonTokenizer(KmerTokenizer):
    """Codons in their reading frame: words of three bases, side by side from a record's first base on.

    Args:
        code: number of NCBI's genetic code.

    Attributes:
        residues: ``size`` letters: the amino acid of each id, ``*`` a stop, X one that is not known, - a special id.

    Raises:
        ConfigError: there is no such code.
    """

    def __init__(self, code: int = 1) -> None:
        super().__init__(3)
        table = genetic_code(code)
        self.code, self.frame, self.unit = code, 3, "codon"
        self.name = f"codons, genetic code {code}"
        self.residues = "-" * A + "".join(table[word] for word in self.letters[A : self.unknown]) + "X"
        self.stops = tuple(number for number, residue in enumerate(self.residues) if residue == "*")

    def translate(self, tokens: Sequence[int] | Ids) -> str:
        """Amino acids of ids, ``*`` for stops."""
        return "".join(self.residues[number] for number in np.asarray(tokens).tolist())


def genetic_code(number: int) -> dict[str, str]:
    """Codon -> amino acid, ``*`` for stops, of a genetic code of NCBI; where a codon is both, the amino acid.

    Raises:
        ConfigError: there is no such code; it names those that there are.
    """
    from Bio.Data import CodonTable

    tables = CodonTable.unambiguous_dna_by_id
    if number not in tables:
        listed = ", ".join(f"{one} {table.names[0]}" for one, table in sorted(tables.items()))
        raise ConfigError(f"NCBI has no genetic code {number}; there are: {listed}")
    table = tables[number]
    return {**dict.fromkeys(table.stop_codons, "*"), **table.forward_table}


def build_tokenizer(settings: TokenizerSettings) -> DnaTokenizer | None:
    """The tokenizer of ``settings``; None for single bases, which need none.

    Raises:
        ConfigError: a setting is out of its range, or one is given that this kind does not have.
        DataError: the file is no tokenizer of bases.
    """
    defaults, kind = TokenizerSettings(), settings.kind
    own = {"base": (), "kmer": ("k", "overlap"), "codon": ("code",), "bpe": ("file",)}[kind]
    for name in ("k", "overlap", "code", "file"):
        if name not in own and getattr(settings, name) != getattr(defaults, name):
            raise ConfigError(
                f"data.tokenizer.{name}={getattr(settings, name)} says nothing where data.tokenizer.kind={kind}"
            )
    if kind == "kmer":
        return KmerTokenizer(settings.k, settings.overlap)
    if kind == "codon":
        return CodonTokenizer(settings.code)
    if kind == "bpe":
        if settings.file is None:
            raise ConfigError(
                "data.tokenizer.kind=bpe needs data.tokenizer.file, a tokenizer.json; make one with "
                "seqlong tokenizer train genome.fa --size 4096"
            )
        from seqlong.datamodules.dna.bpe import BpeTokenizer  # which stands on this module

        return BpeTokenizer(settings.file)
    return None


def lower_share(tokenizer: DnaTokenizer, ids: Ids, lower: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The share of the bases of each token that are in lower case; the ids are the first of those bases."""
    if tokenizer.span is not None:
        starts = np.arange(ids.size, dtype=np.int64) * tokenizer.stride
        ends = starts + tokenizer.span
    else:
        ends = np.cumsum(tokenizer.widths(ids))
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    counted = np.concatenate([[0], np.cumsum(lower, dtype=np.int64)])
    return ((counted[ends] - counted[starts]) / np.maximum(ends - starts, 1)).astype(np.float32)


def _runs(ids: Ids) -> Iterator[Ids]:
    """Runs of words, and of special tokens, in order."""
    cuts = np.flatnonzero(np.diff(ids < A)) + 1
    return (run for run in np.split(ids, cuts) if run.size)
