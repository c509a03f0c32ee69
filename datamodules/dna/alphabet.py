"""The DNA alphabet: bytes of a sequence file to tokens and back, complements, and what counts as known or masked.

Every table has 256 entries and is applied with ``bytes.translate``, which takes about a nanosecond a base.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PAD, MASK, BOS, EOS, A, C, G, T, N = range(9)

#: IUPAC nucleotide letters, with U (read as T) and X (masked, read as N); either case. A byte outside is an error.
_COMPLEMENTS = dict(zip("ACGTURYSWKMBDHVNX", "TGCAAYRSWMKVHDBNX", strict=True))
LETTERS = "".join(_COMPLEMENTS)

#: Letters of amino acids, and the stop, that no nucleotide code has.
PROTEIN_LETTERS = "EFIJLOPQZ*"


def _table(default: int, entries: dict[str, int]) -> bytes:
    table = bytearray([default]) * 256
    for letter, value in entries.items():
        table[ord(letter)] = table[ord(letter.lower())] = value
    return bytes(table)


_BASES = {"A": A, "C": C, "G": G, "T": T, "U": T}
#: byte -> token; byte 0, which stands for "nothing here", is PAD.
TOKEN_TABLE = bytes([PAD]) + _table(N, _BASES)[1:]
#: byte -> token to predict, or 255 (-1 as int8) where there is nothing known to predict.
TARGET_TABLE = _table(255, _BASES)
#: byte -> 0, 1, 2, 3 for A, C, G, T; 4 for all else.
BASE_TABLE = _table(4, {"A": 0, "C": 1, "G": 2, "T": 3, "U": 3})
COMPLEMENT_TABLE = bytes.maketrans(
    "".join(_COMPLEMENTS).encode() + "".join(_COMPLEMENTS).lower().encode(),
    "".join(_COMPLEMENTS.values()).encode() + "".join(_COMPLEMENTS.values()).lower().encode(),
)
LEGAL = (LETTERS + LETTERS.lower()).encode()

Bytes = NDArray[np.uint8]


def translate(sequence: Bytes, table: bytes) -> Bytes:
    """Apply a 256-entry table to every byte; any shape."""
    # numpy's own indexing would widen the bytes to eight each first, and take several times as long.
    return np.frombuffer(sequence.tobytes().translate(table), dtype=np.uint8).reshape(sequence.shape)


def reverse_complement(sequence: Bytes) -> Bytes:
    """The other strand of ``(t)`` bytes, read in its own direction. Case and IUPAC codes are kept; U pairs as A."""
    return np.frombuffer(sequence[::-1].tobytes().translate(COMPLEMENT_TABLE), dtype=np.uint8)


def encode(sequence: Bytes) -> Bytes:
    """Tokens of bytes, any shape: A, C, G, T (and U) are 4 to 7, every other letter is N = 8, byte 0 is PAD."""
    return translate(sequence, TOKEN_TABLE)


def encode_targets(sequence: Bytes) -> NDArray[np.int8]:
    """The token to predict at each byte, -1 where the base is not known."""
    return translate(sequence, TARGET_TABLE).view(np.int8)


def is_unknown(sequence: Bytes) -> NDArray[np.bool_]:
    """True where a byte is not one of A, C, G, T, U in either case."""
    return translate(sequence, BASE_TABLE) == 4


def is_soft_masked(sequence: Bytes) -> NDArray[np.bool_]:
    """True where a base is written in lower case, as repeats are."""
    return (sequence & 0x20).astype(bool)


class DnaVocabulary:
    """The 16 tokens of DNA.

    Attributes:
        size: 16; ids above 8 are reserved, so that a model can learn new symbols without a new shape.
        pad: id of padding.
        mask: id that hides a base in masked modelling.
        letters: what each id is called.
        replacements: ids that a random corruption may draw: the four bases.
    """

    size: int = 16
    pad: int = PAD
    mask: int = MASK
    letters: Sequence[str] = (
        *("<pad>", "<mask>", "<bos>", "<eos>", "A", "C", "G", "T", "N"),
        *(f"<reserved-{number}>" for number in range(9, 16)),
    )
    replacements: Sequence[int] = (A, C, G, T)

    def encode(self, sequence: str) -> list[int]:
        """Token ids of a string of bases, of any case."""
        return encode(np.frombuffer(sequence.encode(), dtype=np.uint8)).tolist()

    def decode(self, tokens: Sequence[int]) -> str:
        """The letters of token ids, joined."""
        return "".join(self.letters[token] for token in tokens)
