"""Multi-query associative recall: keys with values, then the keys again. Plain, rewritten, and at chosen distances."""

from __future__ import annotations

from typing import Literal

import numpy as np

from seqlong.datamodules.synthetic.draw import Draw
from seqlong.datamodules.synthetic.generator import Ints, RecallTask, Rows, at_least
from seqlong.errors import ConfigError


class MQAR(RecallTask):
    """Multi-query associative recall: pairs of a key and a value, then keys again in any order, each to be answered.

    A row begins with ``pairs`` keys, each followed by its value. Behind them each key stands once more, at an even
    distance drawn from a power law (``alpha``; 1 would be even), and the model is to answer with its value right there.
    Other positions ask nothing. Keys are the lower half of the vocabulary, values the upper; rows may be of any length,
    whatever the vocabulary. Source: zoology, arXiv 2312.04927.

    Args:
        pairs: of a key and a value.
        vocab_size: of keys and values together; token 0 is never a key.
        alpha: exponent of the power law of distances, in (0, 1].
        fill: what stands where nothing is told or asked: ``random`` tokens that are no key of the row, or ``zero``, as
            in zoology's published settings.

    Raises:
        ConfigError: too few tokens for so many keys.
    """

    title = "multi-query associative recall"
    counted = "pairs"
    varied = "pairs"

    def __init__(
        self, pairs: int = 16, vocab_size: int = 256, alpha: float = 0.1, fill: Literal["random", "zero"] = "random"
    ) -> None:
        if not 0 < alpha <= 1:
            raise ConfigError(f"{type(self).__name__} needs alpha in (0, 1], found {alpha}")
        self.pairs, self.vocab_size, self.alpha, self.fill = pairs, vocab_size, alpha, fill
        self.check()

    def check(self) -> None:
        keys = max(self.vocab_size // 2 - 1, 0)
        if self.pairs < 1 or keys < self.pairs:
            raise ConfigError(
                f"{type(self).__name__} needs more keys than pairs: vocab_size {self.vocab_size} has {keys} keys for "
                f"{self.pairs} pairs; raise vocab_size above {2 * max(self.pairs, 1) + 1}"
            )

    def rows(self, draw: Draw, length: int) -> Rows:
        return self._rows(draw, length, tells=1)

    def _rows(self, draw: Draw, length: int, tells: int) -> Rows:
        """Rows in which every key is told ``tells`` times, in any order, and asked for once."""
        pairs, said = self.pairs, self.pairs * tells
        if length < 2 * said + 2 * pairs:
            times = f" told {tells} times" if tells > 1 else ""
            raise self.too_short(length, 2 * said + 2 * pairs, f"{pairs} pairs{times}")
        keys, values = self._keys(draw), self._values(draw, said)
        # Slot s of the beginning tells key order[s]; the last slot that tells a key is the one that counts.
        order = draw.distinct(said, said) % pairs if tells > 1 else np.tile(np.arange(pairs), (draw.rows, 1))
        last = np.zeros((draw.rows, pairs), dtype=np.int64)
        np.maximum.at(last, (np.arange(draw.rows)[:, None], order), np.arange(said)[None])
        places = (length - 2 * said) // 2
        asked = 2 * said + 2 * draw.weighted((self.alpha - 1) * np.log(np.arange(1, places + 1)), pairs)
        tokens = self._filled(draw, length, keys)
        tokens[:, 0 : 2 * said : 2] = np.take_along_axis(keys, order, axis=1)
        tokens[:, 1 : 2 * said : 2] = values
        return self._ask(tokens, keys, asked, np.take_along_axis(values, last, axis=1), 2 * last + 1)

    def _keys(self, draw: Draw) -> Ints:
        return 1 + draw.distinct(self.vocab_size // 2 - 1, self.pairs)

    def _values(self, draw: Draw, count: int) -> Ints:
        half = self.vocab_size // 2
        return half + draw.below(self.vocab_size - half, count)

    def _filled(self, draw: Draw, length: int, keys: Ints) -> Ints:
        """Tokens for where nothing is told or asked: none of them is a key of the row, which would have another
        answer."""
        if self.fill == "zero":
            return np.zeros((draw.rows, length), dtype=np.int64)
        tokens = 1 + draw.below(self.vocab_size - 1, length)
        is_key = np.zeros((draw.rows, self.vocab_size), dtype=np.bool_)
        np.put_along_axis(is_key, keys, True, axis=1)
        return np.where(np.take_along_axis(is_key, tokens, axis=1), self._values(draw, length), tokens)

    def _ask(self, tokens: Ints, keys: Ints, asked: Ints, values: Ints, told: Ints) -> Rows:
        targets, where = np.full_like(tokens, -1), np.full_like(tokens, -1)
        np.put_along_axis(tokens, asked, keys, axis=1)
        np.put_along_axis(targets, asked, values, axis=1)
        np.put_along_axis(where, asked, told, axis=1)
        return Rows.of(tokens, targets, where, self.pairs)

    def chance(self) -> float:
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def settings(self) -> dict[str, object]:
        return {"pairs": self.pairs, "alpha": self.alpha, "fill": self.fill}


class RewriteMQAR(MQAR):
    """MQAR in which keys are told several times, in any order, with a new value each time: the last one is the answer.

    A state that can only add must tell the values of a key apart by their age; one that can erase need not.

    Args:
        pairs: different keys.
        tells: how often each is told.
        vocab_size: of keys and values together; token 0 is never a key.
        alpha: exponent of the power law of distances, in (0, 1].
        fill: ``random`` or ``zero``, see ``MQAR``.

    Raises:
        ConfigError: too few tokens for so many keys.
    """

    title = "associative recall with rewritten values"

    def __init__(
        self,
        pairs: int = 16,
        tells: int = 2,
        vocab_size: int = 256,
        alpha: float = 0.1,
        fill: Literal["random", "zero"] = "random",
    ) -> None:
        super().__init__(pairs, vocab_size, alpha, fill)
        at_least("tells", tells, 1, type(self).__name__)
        self.tells = tells

    def rows(self, draw: Draw, length: int) -> Rows:
        return self._rows(draw, length, self.tells)

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "tells": self.tells}


class GapMQAR(MQAR):
    """MQAR at chosen distances: keys are told anywhere, and each is asked for ``gap`` positions after its value.

    Which distance a model can bridge is then apart from how long the row is and how much it holds.

    Args:
        pairs: of a key and a value.
        vocab_size: of keys and values together; token 0 is never a key.
        shortest: smallest distance from a value to the question for it, an odd number of positions.
        longest: largest; null is half of a row. Rows draw theirs evenly on a logarithmic scale.
        fill: ``random`` or ``zero``, see ``MQAR``.

    Raises:
        ConfigError: too few tokens for so many keys, or distances that are not possible.
    """

    title = "associative recall at chosen distances"

    def __init__(
        self,
        pairs: int = 8,
        vocab_size: int = 256,
        shortest: int = 3,
        longest: int | None = None,
        fill: Literal["random", "zero"] = "random",
    ) -> None:
        super().__init__(pairs, vocab_size, 1.0, fill)
        at_least("shortest", shortest, 1, type(self).__name__)
        if longest is not None and longest < shortest:
            raise ConfigError(f"GapMQAR needs longest {longest} to be at least shortest {shortest}")
        self.shortest, self.longest = shortest, longest

    def rows(self, draw: Draw, length: int) -> Rows:
        slots = length // 2
        low = (self.shortest + 1) // 2  # a slot is a key and its value: the question is `gap` slots later
        high = slots // 2 if self.longest is None else (self.longest + 1) // 2
        room = (slots - high) if 2 * high >= slots else slots // 2 - high
        if high < low or room < self.pairs:
            reach = 2 * high - 1 if self.longest is not None else self.shortest
            raise self.too_short(length, 4 * self.pairs + 4 * reach + 4, f"{self.pairs} pairs at distance {reach}")
        gap = np.exp(np.log(low) + (np.log(high + 1) - np.log(low)) * draw.uniform(1)).astype(np.int64)
        gap = np.clip(gap, low, high)
        keys, values = self._keys(draw), self._values(draw, self.pairs)
        # Every other stretch of `gap` slots tells, and the one behind it asks, so that no two want the same place.
        slot = np.arange(slots)[None]
        free = (slot // gap % 2 == 0) & (slot < slots - gap)
        tell = draw.weighted(np.where(free, 0.0, -np.inf), self.pairs)
        tokens = self._filled(draw, length, keys)
        np.put_along_axis(tokens, 2 * tell, keys, axis=1)
        np.put_along_axis(tokens, 2 * tell + 1, values, axis=1)
        return self._ask(tokens, keys, 2 * (tell + gap), values, 2 * tell + 1)

    def settings(self) -> dict[str, object]:
        return {"pairs": self.pairs, "shortest": self.shortest, "longest": self.longest, "fill": self.fill}
