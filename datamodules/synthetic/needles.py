"""Needles in a haystack: numbers that a text mentions once, asked for at its end. Passkeys, phone books."""

from __future__ import annotations

from typing import Literal

import numpy as np

from seqlong.datamodules.synthetic.draw import Draw, Ints
from seqlong.datamodules.synthetic.generator import RecallTask, Rows, at_least
from seqlong.datamodules.synthetic.language import WORDS, Encoding, Haystack, Strings, words
from seqlong.datamodules.synthetic.pages import Page, empty, strewn, total
from seqlong.errors import ConfigError

Kind = Literal["number", "word", "uuid"]


class Needle(RecallTask):
    """Secrets hidden in a text, each under a key, and some of them asked for at the end.

    ``The secret of bakodi is 3141592. `` stands somewhere in the text; the row ends with
    ``The secret of bakodi is`` and the answer, of which every token must be right. The thirteen tasks of RULER (arXiv
    2404.06654) that are needles are settings of this one; see docs/recall.md. Keys are made-up words.

    Args:
        haystack: ``repeat`` (a few short sentences, over and over), ``book`` (Alice's Adventures in Wonderland), the
            path of a text file, or ``needles``: other keys with their secrets, as many as fit.
        keys: different keys; with a haystack of needles this is not used.
        values: secrets of each key, told apart from one another; the answer gives them in the order of the text.
        queries: keys that are asked for.
        key: what a key is: a ``word`` of six letters, a ``number`` or a ``uuid``.
        value: what a secret is.
        digits: of a number.
        tokenizer: ``bytes`` (a vocabulary of 260), or the path of a tokenizer.json.
        fewest: digits that a secret has at least in training, where each has a random number of them; evaluation always
            asks for all ``digits``. Short ones are learnt first, and lead to long ones. All ``digits`` if not given.

    Raises:
        ConfigError: a setting is out of its range.
        DataError: the haystack cannot be read.
    """

    title = "needles in a haystack"
    counted = "needles"
    varied = "keys"
    _TELL, _ASK, _END, _JOIN = "The secret of {key} is ", "\nThe secret of {key} is ", ". ", ", "
    _TELL_MANY, _ASK_MANY = "One secret of {key} is ", "\nThe secrets of {key} are "

    def __init__(
        self,
        haystack: str = "book",
        keys: int = 1,
        values: int = 1,
        queries: int = 1,
        key: Kind = "word",
        value: Kind = "number",
        digits: int = 7,
        tokenizer: str = "bytes",
        fewest: int | None = None,
    ) -> None:
        self.keys, self.values, self.queries = keys, values, queries
        self.key, self.value, self.digits = key, value, digits
        for name, given, least in (("values", values, 1), ("queries", queries, 1), ("digits", digits, 1)):
            at_least(name, given, least, type(self).__name__)
        if digits > 18:
            raise ConfigError(f"{type(self).__name__} needs digits of at most 18, found {digits}")
        if fewest is not None and not (1 <= fewest <= digits and value == "number"):
            raise ConfigError(
                f"{type(self).__name__} needs fewest of 1 to digits, {digits}, and value: number; "
                f"found fewest {fewest}, value {value}"
            )
        self.fewest = fewest
        self._encoding = Encoding(tokenizer)
        self.vocab_size = self._encoding.vocab_size
        self.haystack = haystack
        self._lines = haystack == "needles"
        self._text = Haystack("repeat" if self._lines else haystack, self._encoding)
        self.varied = "" if self._lines else "keys"
        self.check()

    def check(self) -> None:
        at_least("keys", self.keys, 1, type(self).__name__)
        if not self._lines and self.queries > self.keys:
            raise ConfigError(f"{type(self).__name__} asks for {self.queries} keys, but there are {self.keys}")

    # --- rows ----------------------------------------------------------------------------------------------------

    def rows(self, draw: Draw, length: int) -> Rows:
        many = self.values > 1
        tell, ask = (self._TELL_MANY, self._ASK_MANY) if many else (self._TELL, self._ASK)
        count = self._fitting(length, tell, ask) if self._lines else self.keys
        names = self._said(draw, self.key, count, True)
        secrets = self._said(draw, self.value, count * self.values, False).reshape(draw.rows, count, self.values)
        chosen = np.argsort(draw.uniform(count), axis=1, kind="stable")
        order = draw.distinct(count * self.values, count * self.values) // self.values  # key of each needle
        places, start = draw.uniform(count * self.values), draw.below(len(self._text.tokens), 1)
        made = empty(draw.rows, length, count)
        for row in range(draw.rows):
            page, told = Page(), {}
            needles = []
            seen = [0] * count
            for one in order[row].tolist():
                secret = secrets[row, one, seen[one]]
                needles.append((one, seen[one], self._pieces(tell, names[row, one], secret)))
                seen[one] += 1
            asked = chosen[row, : self.queries].tolist()
            questions = [self._question(ask, names[row, one], secrets[row, one], many) for one in asked]
            room = length + 1 - sum(total(pieces) for pieces in questions) + len(questions[-1][-1])
            hay = room - sum(total(pieces) for _, _, pieces in needles)
            while hay < 0 and self._lines and (spare := [n for n in needles if n[0] not in asked]):
                needles.remove(spare[-1])  # of a tokenizer, which needs more tokens for some words than for others
                hay += total(spare[-1][2])
            if hay < 0:
                raise self.too_short(length, length - hay, f"{len(needles)} {self.counted} and {len(asked)} questions")
            if self._lines:  # nothing stands between them; what is left over comes first, as empty lines
                page.add(np.resize(self._encoding.encode("\n"), hay))
                hay = 0
            for one, number, pieces in strewn(page, self._text, int(start[row, 0]), hay, places[row], needles):
                told[one, number] = page.add(pieces[0], pieces[1])
                page.add(pieces[2])
            for one, question in zip(asked, questions, strict=True):
                for number in range(self.values):
                    page.add(question[2 * number])
                    page.answer(question[2 * number + 1], told[one, number])
                if one != asked[-1]:
                    page.add(question[-1])
            page.fill(made, row)
        return made

    def _pieces(self, tell: str, name: str, secret: str) -> list[Ints]:
        return [self._encoding.encode(part) for part in (tell.format(key=name), secret, self._END)]

    def _question(self, ask: str, name: str, secrets: Strings, many: bool) -> list[Ints]:
        """What asks, then each answer with what stands before the next, and the end of it."""
        parts = [ask.format(key=name)]
        for secret in secrets.tolist():
            parts += [secret, self._JOIN]
        parts[-1] = self._END
        return [self._encoding.encode(part) for part in parts]

    def _fitting(self, length: int, tell: str, ask: str) -> int:
        """How many needles fit into a row beside its questions, as long as the longest that may come."""
        longest = {"word": "bakodi", "number": "8" * self.digits, "uuid": "-".join(["8" * 4] * 8)}
        key, value = longest[self.key], longest[self.value]
        needle = total(self._pieces(tell, key, value)) * self.values
        question = self._question(ask, key, np.array([value] * self.values), self.values > 1)
        count = (length + 1 - self.queries * total(question)) // needle
        if count < self.queries:
            needed = self.queries * (total(question) + needle)
            raise self.too_short(length, needed, f"{self.queries} {self.counted} and their questions")
        return count

    def _said(self, draw: Draw, kind: Kind, count: int, distinct: bool) -> Strings:
        """``(b count)`` words, numbers or identifiers."""
        if kind == "uuid":
            halves = np.stack([draw.bits(count), draw.bits(count)], axis=-1).reshape(-1, 2).tolist()
            texts = [f"{high:016x}{low:016x}" for high, low in halves]
            said = [f"{x[:8]}-{x[8:12]}-{x[12:16]}-{x[16:20]}-{x[20:]}" for x in texts]
            return np.array(said).reshape(draw.rows, count)
        low = 10 ** (self.digits - 1)
        bound = WORDS if kind == "word" else 9 * low
        if distinct and count > bound:
            raise ConfigError(f"{type(self).__name__} has {bound:,} different {kind}s, too few for {count:,} keys")
        chosen = draw.distinct(bound, count) if distinct else draw.below(bound, count)
        if kind == "word":
            return words(chosen)
        said = (low + chosen).astype(np.str_)
        if distinct or self.fewest is None or draw.part != 0:
            return said
        sizes = self.fewest + draw.below(self.digits - self.fewest + 1, count)
        cut = [text[:size] for text, size in zip(said.ravel().tolist(), sizes.ravel().tolist(), strict=True)]
        return np.array(cut).reshape(said.shape)

    def chance(self) -> float:
        return {"word": 1 / WORDS, "number": 1 / (9 * 10 ** (self.digits - 1)), "uuid": 2.0**-128}[self.value]

    def settings(self) -> dict[str, object]:
        return {"haystack": self.haystack, **({} if self._lines else {"keys": self.keys}), "values": self.values,
                "queries": self.queries, "key": self.key, "value": self.value,
                **({"digits": self.digits} if self.value == "number" else {}),
                **({"fewest": self.fewest} if self.fewest is not None else {})}  # fmt: skip


class Phonebook(Needle):
    """A phone book as long as the row, and at its end some of its names, whose numbers are the answers.

    Source: arXiv 2402.01032.

    Args:
        queries: names that are asked for.
        digits: of a number.
        tokenizer: ``bytes`` (a vocabulary of 260), or the path of a tokenizer.json.

    Raises:
        ConfigError: a setting is out of its range.
    """

    title = "phone book"
    counted = "entries"
    _TELL, _ASK, _END = "{key}: ", "?{key}: ", "\n"

    def __init__(self, queries: int = 1, digits: int = 7, tokenizer: str = "bytes") -> None:
        super().__init__("needles", queries=queries, digits=digits, tokenizer=tokenizer)

    def settings(self) -> dict[str, object]:
        return {"queries": self.queries, "digits": self.digits}
