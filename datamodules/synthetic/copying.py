"""Copying: the whole row, what stands among noise, what follows a key; and induction, the smallest of all."""

from __future__ import annotations

from typing import Literal

import numpy as np

from seqlong.datamodules.synthetic.draw import Draw
from seqlong.datamodules.synthetic.generator import RecallTask, Rows, at_least


class Induction(RecallTask):
    """Induction: one token stands twice, the second time at the end; the answer is what followed it the first time.

    Sources: arXiv 2209.11895; Mamba's form of it, with rows of 256 and a vocabulary of 16, arXiv 2312.00752.

    Args:
        vocab_size: tokens; 0 is the one that stands twice.

    Raises:
        ConfigError: no token is left to answer with.
    """

    title = "induction"
    counted = "facts"

    def __init__(self, vocab_size: int = 16) -> None:
        at_least("vocab_size", vocab_size, 3, "Induction")
        self.vocab_size = vocab_size

    def rows(self, draw: Draw, length: int) -> Rows:
        if length < 3:
            raise self.too_short(length, 3, "Induction's rows")
        tokens = 1 + draw.below(self.vocab_size - 1, length)
        place = draw.below(length - 2, 1)
        np.put_along_axis(tokens, place, 0, axis=1)
        tokens[:, -1] = 0
        targets, told = np.full_like(tokens, -1), np.full_like(tokens, -1)
        targets[:, -1] = np.take_along_axis(tokens, place + 1, axis=1)[:, 0]
        told[:, -1] = place[:, 0] + 1
        return Rows.of(tokens, targets, told, 1)

    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)


class Copy(RecallTask):
    """Copying: random tokens, a mark, and then the same tokens again, all of them.

    A state of fixed size cannot copy more than it holds: arXiv 2402.01032. The row is as full as its length allows.

    Args:
        vocab_size: tokens; 0 is the mark.

    Raises:
        ConfigError: no tokens are left to copy.
    """

    title = "copying"
    counted = "tokens"

    def __init__(self, vocab_size: int = 32) -> None:
        at_least("vocab_size", vocab_size, 3, type(self).__name__)
        self.vocab_size = vocab_size

    def rows(self, draw: Draw, length: int) -> Rows:
        if length < 2:
            raise self.too_short(length, 2, "copied rows")
        count = length // 2
        said = 1 + draw.below(self.vocab_size - 1, count)
        tokens = np.zeros((draw.rows, length), dtype=np.int64)
        targets, told = np.full_like(tokens, -1), np.full_like(tokens, -1)
        tokens[:, :count] = said
        tokens[:, count + 1 : 2 * count] = said[:, : count - 1]  # the mark at `count`, then what was said, but its last
        targets[:, count : 2 * count] = said
        told[:, count : 2 * count] = np.arange(count)
        return Rows.of(tokens, targets, told, count)

    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)


class SelectiveCopy(RecallTask):
    """Selective copying: some tokens stand anywhere among noise, and are to be said again in their order at the end.

    With one token of noise these are blanks; with more, what is noise must be learnt (noisy copying). At the end a mark
    asks once for every token. Sources: arXiv 2312.00752; MAD, arXiv 2403.17844.

    Args:
        tokens: to be copied.
        vocab_size: tokens in all: the mark 0, ``noise`` others, and those that are copied.
        noise: different tokens of noise.

    Raises:
        ConfigError: no tokens are left to copy.
    """

    title = "selective copying"
    counted = "tokens"
    varied = "tokens"

    def __init__(self, tokens: int = 16, vocab_size: int = 32, noise: int = 1) -> None:
        self.tokens, self.vocab_size, self.noise = tokens, vocab_size, noise
        at_least("noise", noise, 1, type(self).__name__)
        at_least("vocab_size", vocab_size, noise + 3, f"{type(self).__name__} with {noise} tokens of noise")
        self.check()

    def check(self) -> None:
        at_least("tokens", self.tokens, 1, type(self).__name__)

    def rows(self, draw: Draw, length: int) -> Rows:
        count, first = self.tokens, length - self.tokens
        if first < count:
            raise self.too_short(length, 2 * count, f"{count} tokens to copy")
        said = 1 + self.noise + draw.below(self.vocab_size - 1 - self.noise, count)
        place = draw.subset(first, count)
        tokens = 1 + draw.below(self.noise, length)
        np.put_along_axis(tokens, place, said, axis=1)
        targets, told = np.full_like(tokens, -1), np.full_like(tokens, -1)
        tokens[:, first:] = 0
        targets[:, first:], told[:, first:] = said, place
        return Rows.of(tokens, targets, told, count)

    def chance(self) -> float:
        return 1 / (self.vocab_size - 1 - self.noise)

    def settings(self) -> dict[str, object]:
        return {"tokens": self.tokens, "noise": self.noise}


class KeyedCopy(RecallTask):
    """Find a short key in random tokens, and copy what follows it.

    With the key behind the tokens (``suffix``) a model must remember all of them; with the key before them
    (``prefix``) a state of fixed size need only wait for it. Source: n-gram lookup, arXiv 2402.01032. The key stands
    once in the tokens.

    Args:
        key: whether it stands before the tokens or behind them.
        key_length: tokens of the key.
        copied: tokens to copy.
        vocab_size: tokens; 0 is a mark around the key.

    Raises:
        ConfigError: a setting is out of its range.
    """

    counted = "tokens"

    def __init__(
        self, key: Literal["prefix", "suffix"] = "suffix", key_length: int = 2, copied: int = 4, vocab_size: int = 64
    ) -> None:
        self.key, self.key_length, self.copied, self.vocab_size = key, key_length, copied, vocab_size
        self.title = f"copying what follows a key, key {'before' if key == 'prefix' else 'behind'} the text"
        for name, value in (("key_length", key_length), ("copied", copied)):
            at_least(name, value, 1, "KeyedCopy")
        at_least("vocab_size", vocab_size, 4, "KeyedCopy")

    def rows(self, draw: Draw, length: int) -> Rows:
        n, k = self.key_length, self.copied
        first = n + 1 if self.key == "prefix" else 0
        count = length - n - k - (first > 0)  # of the tokens to search; the row ends before the answer's last token
        if count < n + k:
            raise self.too_short(length, 2 * (n + k) + 1, f"a key of {n} and {k} tokens to copy")
        text = 1 + draw.below(self.vocab_size - 1, count)
        place = draw.below(count - n - k + 1, 1)
        text = self._once(draw, text, place)
        key = np.take_along_axis(text, place + np.arange(n), axis=1)
        answer = np.take_along_axis(text, place + n + np.arange(k), axis=1)
        tokens = np.zeros((draw.rows, length), dtype=np.int64)
        tokens[:, first : first + count] = text
        asked = length - k
        if self.key == "prefix":
            tokens[:, 1 : n + 1] = key  # 0 key text 0, answer
        else:
            tokens[:, count + 1 : count + 1 + n] = key  # text 0 key, answer
        tokens[:, asked + 1 :] = answer[:, : k - 1]
        targets, told, number = np.full_like(tokens, -1), np.full_like(tokens, -1), np.full_like(tokens, -1)
        targets[:, asked:], number[:, asked:] = answer, 0
        told[:, asked:] = first + place + n + np.arange(k)
        return Rows.of(tokens, targets, told, count, number)

    def _once(self, draw: Draw, text: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The text with tokens changed until the key stands once in it."""
        n, count = self.key_length, text.shape[1]
        key = np.take_along_axis(text, place + np.arange(n), axis=1)
        where = np.arange(count - n + 1)[None]
        protected = (np.arange(count)[None] >= place) & (np.arange(count)[None] < place + n)
        source = draw.fork()
        while True:
            found = np.ones((draw.rows, count - n + 1), dtype=np.bool_)
            for offset in range(n):
                found &= text[:, offset : count - n + 1 + offset] == key[:, offset : offset + 1]
            found &= where != place
            if not found.any():
                return text
            # A match that overlaps the key itself is broken outside of it, at its first or its last token.
            ends = np.zeros_like(protected)
            ends[:, : count - n + 1] |= found
            ends[:, n - 1 :] |= found
            text = np.where(ends & ~protected, 1 + source.below(self.vocab_size - 1, count), text)

    def chance(self) -> float:
        return (self.vocab_size - 1.0) ** -self.copied

    def settings(self) -> dict[str, object]:
        return {"key": self.key, "key_length": self.key_length, "copied": self.copied}
