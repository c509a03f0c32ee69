"""Variable tracking: names that are given a value, and names that are given those names."""

from __future__ import annotations

from seqlong.datamodules.synthetic.draw import Draw
from seqlong.datamodules.synthetic.generator import RecallTask, Rows, at_least
from seqlong.datamodules.synthetic.language import WORDS, Encoding, Haystack, words
from seqlong.datamodules.synthetic.pages import Page, empty, strewn, total


class VariableTracking(RecallTask):
    """Chains of variables: ``VAR bakodi = 31415. VAR fumela = VAR bakodi. `` ... and which of them hold 31415?

    Every chain begins with a number of its own, and each further variable is given the one before it. The statements
    stand in this order, those of several chains mixed, anywhere in the text. The row ends with one chain's number, and
    the answers are the names of its variables in the order of the text. Source: RULER, arXiv 2404.06654.

    Args:
        chains: how many.
        hops: variables of a chain behind its first.
        haystack: ``repeat``, ``book``, or the path of a text file, see ``Needle``.
        tokenizer: ``bytes`` (a vocabulary of 260), or the path of a tokenizer.json.

    Raises:
        ConfigError: a setting is out of its range.
        DataError: the haystack cannot be read.
    """

    title = "variable tracking"
    counted = "chains"
    varied = "chains"

    def __init__(self, chains: int = 1, hops: int = 4, haystack: str = "repeat", tokenizer: str = "bytes") -> None:
        self.chains, self.hops, self.haystack = chains, hops, haystack
        at_least("hops", hops, 0, "VariableTracking")
        self._encoding = Encoding(tokenizer)
        self.vocab_size = self._encoding.vocab_size
        self._text = Haystack(haystack, self._encoding)
        self.check()

    def check(self) -> None:
        at_least("chains", self.chains, 1, "VariableTracking")

    def rows(self, draw: Draw, length: int) -> Rows:
        each = self.hops + 1
        count = self.chains * each
        names = words(draw.distinct(WORDS, count)).reshape(draw.rows, self.chains, each)
        numbers = 10_000 + draw.distinct(90_000, self.chains)
        order = draw.distinct(count, count) % self.chains  # which chain each statement is of
        asked, places, start = draw.below(self.chains, 1), draw.uniform(count), draw.below(len(self._text.tokens), 1)
        encode = self._encoding.encode
        made = empty(draw.rows, length, self.chains)
        for row in range(draw.rows):
            chain = int(asked[row, 0])
            ask = [encode(f"\nThese hold {numbers[row, chain]}: ")] + [encode(", ")] * self.hops
            answers = [encode(str(name)) for name in names[row, chain]]
            done = [0] * self.chains
            statements = []
            for one in order[row].tolist():
                number, name = done[one], names[row, one, done[one]]
                given = f"VAR {names[row, one, number - 1]}" if number else str(numbers[row, one])
                statements.append((one, [encode("VAR "), encode(str(name)), encode(f" = {given}. ")]))
                done[one] += 1
            hay = length + 1 - total(ask) - total(answers) - sum(total(pieces) for _, pieces in statements)
            if hay < 0:
                raise self.too_short(length, length - hay, f"{self.chains} chains of {each} variables")
            page, told = Page(), []
            for one, pieces in strewn(page, self._text, int(start[row, 0]), hay, places[row], statements):
                where = page.add(pieces[0], pieces[1])
                if one == chain:
                    told.append(where)
                page.add(pieces[2])
            for question, answer, where in zip(ask, answers, told, strict=True):
                page.add(question)
                page.answer(answer, where)
            page.fill(made, row)
        return made

    def chance(self) -> float:
        return 1 / WORDS

    def settings(self) -> dict[str, object]:
        return {"chains": self.chains, "hops": self.hops, "haystack": self.haystack}
