"""Language of the text tasks: bytes or a tokenizer's tokens, texts to hide things in, and words that nobody knows."""

from __future__ import annotations

import gzip
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.synthetic.draw import Ints
from seqlong.datamodules.text.vocabulary import ByteVocabulary, load_vocabulary
from seqlong.errors import DataError, located

_BOOK = Path(__file__).with_name("data") / "alice.txt.gz"
#: Own wording; one sentence after the other makes a text in which nothing but the needle is worth remembering.
_SENTENCES = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
#: Arrays of words.
Strings = NDArray[Any]
#: A file is read up to here; a haystack need not be longer than the longest row.
MOST = 64 << 20
#: Words are three of these syllables: 421,875 of them, all six letters long, none of them English on purpose.
_SYLLABLES = np.array([a + b for a in "bdfghjklmnprstz" for b in "aeiou"])
WORDS = len(_SYLLABLES) ** 3


class Encoding:
    """Text to tokens, those of the text data module.

    Args:
        tokenizer: ``bytes``, or the path of a tokenizer.json.

    Raises:
        DataError: there is no such tokenizer.
    """

    def __init__(self, tokenizer: str = "bytes") -> None:
        self._vocabulary = load_vocabulary(tokenizer)
        self.vocab_size = self._vocabulary.size
        self.bytes = isinstance(self._vocabulary, ByteVocabulary)

    def encode(self, text: str) -> Ints:
        """``(n)`` tokens."""
        if self.bytes:
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) + self._vocabulary.offset
        return np.array(self._vocabulary.encode(text), dtype=np.int64)


class Haystack:
    """A text that goes round and round, to hide things in.

    Args:
        source: ``repeat`` for a few short sentences, ``book`` for Alice's Adventures in Wonderland, or the path of a
            text file (.txt or .txt.gz), of which up to 64 MiB are read.
        encoding: its tokens.

    Raises:
        DataError: the file is missing, empty or not a text.
    """

    def __init__(self, source: str, encoding: Encoding) -> None:
        self.source, self._encoding = source, encoding
        if source not in ("repeat", "book") and not Path(source).is_file():
            raise DataError(
                f"haystack: there is no file {source}; expected 'repeat', 'book', or the path of a text file"
            )

    @cached_property
    def tokens(self) -> Ints:
        """All of them, read when first asked for."""
        text = _SENTENCES if self.source == "repeat" else _read(_BOOK if self.source == "book" else Path(self.source))
        tokens = self._encoding.encode(text)
        if not len(tokens):
            raise DataError(f"haystack: {self.source} holds no text")
        return tokens

    @cached_property
    def _back(self) -> NDArray[np.int64]:
        """How far before each token a word begins (bytes), 0 where none does within 32 of it."""
        if not self._encoding.bytes:
            return np.zeros(len(self.tokens), dtype=np.int64)
        places = np.arange(len(self.tokens))
        space = np.isin(np.roll(self.tokens, 1), self._encoding.encode(" \n"))
        space[0] = True
        back = places - np.maximum.accumulate(np.where(space, places, 0))
        return np.where(back <= 32, back, 0)

    def take(self, start: int, count: int) -> Ints:
        """``count`` tokens from ``start`` on, around the end."""
        return np.take(self.tokens, np.arange(start, start + count), mode="wrap")

    def word(self, start: int, place: int) -> int:
        """The beginning of the word that ``place`` of ``take(start, ...)`` is in."""
        return max(0, place - int(self._back[(start + place) % len(self._back)]))


def _read(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(2)
    with gzip.open(path, "rb") if head == b"\x1f\x8b" else path.open("rb") as file:
        data = file.read(MOST)
    if b"\0" in data[:4096]:
        raise DataError(f"haystack: {path} is not a text: it holds zero bytes; expected UTF-8, plain or gzip")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if len(data) == MOST and error.start >= MOST - 4:  # cut in the middle of a letter
            return data[: error.start].decode()
        line = data[: error.start].count(b"\n") + 1
        found = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise DataError(located(path, line, f"{found}; expected a text file in UTF-8, plain or gzip")) from error


def words(numbers: Ints) -> Strings:
    """Made-up words, one for each number below ``WORDS``, such as ``bakodi``."""
    size = len(_SYLLABLES)
    first, second, third = (_SYLLABLES[numbers // size**power % size] for power in (2, 1, 0))
    return np.char.add(np.char.add(first, second), third)
