"""Counting words: which are common in a long list, and which of a made-up language are the most frequent."""

from __future__ import annotations

import numpy as np

from seqlong.datamodules.synthetic.draw import Draw, Ints
from seqlong.datamodules.synthetic.generator import RecallTask, Rows, at_least
from seqlong.datamodules.synthetic.language import WORDS, Encoding, Strings, words
from seqlong.datamodules.synthetic.pages import Page, empty, total
from seqlong.errors import ConfigError


class _WordList(RecallTask):
    """A row of words with spaces between, and a question about how often they stand in it."""

    _ASK = ""

    def __init__(self, tokenizer: str) -> None:
        self._encoding = Encoding(tokenizer)
        self.vocab_size = self._encoding.vocab_size

    def _room(self, length: int, answers: int) -> int:
        """Words that fit beside the question and the answers."""
        word = total([self._encoding.encode("bakodi ")])
        asked = total([self._encoding.encode(self._ask())]) + answers * total([self._encoding.encode("bakodi, ")])
        return (length + 1 - asked) // word

    def _ask(self) -> str:
        return self._ASK

    def _written(self, listed: Ints, names: Strings, answers: Ints, length: int, items: int) -> Rows:
        """Rows of words: ``listed`` ``(b n)`` and ``answers`` ``(b a)`` are numbers of columns of ``names``."""
        encode = self._encoding.encode
        made = empty(len(listed), length, items)
        for row in range(len(listed)):
            spelt = [encode(f"{name} ") for name in names[row].tolist()]
            question, comma = encode(self._ask()), encode(", ")
            said = [encode(str(names[row, one])) for one in answers[row]]
            tail = total([question, *said, *[comma] * (len(said) - 1)])
            body = [spelt[one] for one in listed[row].tolist()]
            if (spare := length + 1 - tail - total(body)) < 0:
                raise self.too_short(length, length - spare, f"{len(body)} words of this tokenizer")
            page = Page()
            page.add(np.resize(encode("\n"), spare), *body)
            for number, piece in enumerate(said):
                page.add(question if number == 0 else comma)
                page.answer(piece, -1)
            page.fill(made, row)
        return made

    def chance(self) -> float:
        return 1 / WORDS


class CommonWords(_WordList):
    """Common words: a list in which some words stand often, all others seldom; name the common ones.

    The answers are the common words in the order in which they first stand in the list. The list is as long as the row
    allows. Source: RULER, arXiv 2404.06654, where 10 words stand 30 times and the others 3 times.

    Args:
        common: common words.
        often: how often each of them stands in the list.
        seldom: how often each other does.
        tokenizer: ``bytes`` (a vocabulary of 260), or the path of a tokenizer.json.

    Raises:
        ConfigError: a setting is out of its range.
    """

    title = "common words"
    counted = "common words"
    varied = "common"

    def __init__(self, common: int = 10, often: int = 30, seldom: int = 3, tokenizer: str = "bytes") -> None:
        super().__init__(tokenizer)
        self.common, self.often, self.seldom = common, often, seldom
        at_least("seldom", seldom, 1, "CommonWords")
        at_least("often", often, seldom + 1, "CommonWords")
        self.check()

    def check(self) -> None:
        at_least("common", self.common, 1, "CommonWords")

    def _ask(self) -> str:
        return f"\nThe {self.common} most common words: "

    def rows(self, draw: Draw, length: int) -> Rows:
        room = self._room(length, self.common)
        others = (room - self.common * self.often) // self.seldom
        if others < 1:
            needed = length + 8 * (self.common * self.often + self.seldom - room)
            raise self.too_short(length, needed, f"{self.common} words that stand {self.often} times")
        if self.common + others > WORDS:
            raise ConfigError(f"rows of {length:,} want {others:,} different words, but there are {WORDS:,}")
        counts = np.repeat([self.often, self.seldom], [self.common, others])
        words_in_order = np.repeat(np.arange(self.common + others), counts)
        listed = words_in_order[draw.distinct(len(words_in_order), len(words_in_order))]
        first = np.stack([np.argmax(listed == one, axis=1) for one in range(self.common)], axis=1)
        names = words(draw.distinct(WORDS, self.common + others))
        return self._written(listed, names, np.argsort(first, axis=1), length, self.common)

    def settings(self) -> dict[str, object]:
        return {"common": self.common, "often": self.often, "seldom": self.seldom}


class FrequentWords(_WordList):
    """Frequent words: a made-up language whose k-th word has a share of ``k^-alpha``; name the most frequent ones.

    The answers are in the order of how often they stand, each more often than the next. Source: RULER, arXiv
    2404.06654, where the answers are three and alpha is 2.

    Args:
        asked: words to name.
        alpha: exponent of the shares.
        vocabulary: words of the language.
        tokenizer: ``bytes`` (a vocabulary of 260), or the path of a tokenizer.json.

    Raises:
        ConfigError: a setting is out of its range.
    """

    title = "frequent words"
    counted = "words asked for"

    def __init__(self, asked: int = 3, alpha: float = 2.0, vocabulary: int = 100, tokenizer: str = "bytes") -> None:
        super().__init__(tokenizer)
        self.asked, self.alpha, self.vocabulary = asked, alpha, vocabulary
        at_least("asked", asked, 1, "FrequentWords")
        at_least("vocabulary", vocabulary, asked + 1, "FrequentWords")
        if alpha <= 0:
            raise ConfigError(f"FrequentWords needs alpha above 0, found {alpha}")

    def _ask(self) -> str:
        return f"\nThe {self.asked} most frequent words: "

    def rows(self, draw: Draw, length: int) -> Rows:
        room = self._room(length, self.asked)
        share = np.arange(1, self.vocabulary + 1) ** -self.alpha
        counts = np.floor(room * share / share.sum()).astype(np.int64) if room > 0 else np.zeros(2, dtype=np.int64)
        if not (np.diff(counts[: self.asked + 1]) < 0).all():
            raise self.too_short(length, 4 * max(length, 64), f"{self.asked} words whose counts differ")
        listed = np.repeat(np.arange(self.vocabulary), counts)
        listed = listed[draw.distinct(len(listed), len(listed))]
        names = words(draw.distinct(WORDS, self.vocabulary))
        answers = np.tile(np.arange(self.asked), (draw.rows, 1))
        return self._written(listed, names, answers, length, self.asked)

    def settings(self) -> dict[str, object]:
        return {"asked": self.asked, "alpha": self.alpha, "vocabulary": self.vocabulary}
