"""Objectives beside the next token: prefixes, fill-in-the-middle, infilling, copying, retrieval. Each says how a row is
rearranged; ``MixedObjectives`` trains on several of them."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from seqlong.errors import ConfigError
from seqlong.tasks import rearranging
from seqlong.tasks.rearranging import Arrangement, Segments


class Objective:
    """What a row is made into, and what of it is asked. Segments shorter than ``shortest`` stay as they are.

    Attributes:
        signs: tokens that it puts between parts. Objectives that name the same sign share it.
        reads_prefix: whether it lets mixers read a part in both directions.
        weight: its share of the rows, beside those of others.
        shortest: positions of the smallest segment that it rearranges.
    """

    signs: ClassVar[tuple[str, ...]] = ()
    reads_prefix: ClassVar[bool] = False
    shortest: int = 16

    def __init__(self, weight: float) -> None:
        if not weight >= 0:
            raise ConfigError(f"{type(self).__name__}: weight {weight} must be 0 or more")
        self.weight = weight

    def arrange(self, parts: Segments) -> Arrangement:
        """The rows of a batch, rearranged."""
        raise NotImplementedError(f"{type(self).__name__} must define arrange(parts)")

    def _range(self, **shares: float) -> None:
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ConfigError(f"{type(self).__name__}: {name} {value} must lie between 0 and 1")


class Causal(Objective):
    """The next token, of the text as it is.

    Args:
        weight: share of the rows, beside the other objectives'.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)

    def arrange(self, parts: Segments) -> Arrangement:
        every: Bool[Tensor, "b t"] = parts.offset >= 0
        return Arrangement(None, every)


class Prefix(Objective):
    """``[P] S``: S is asked; P may be read in both directions, by mixers that can (arXiv 1910.10683, 2411.01030).

    Args:
        weight: share of the rows, beside the other objectives'.
        least: smallest share of a segment that is P.
        most: largest share.
    """

    reads_prefix = True

    def __init__(self, weight: float = 1.0, least: float = 0.1, most: float = 0.9) -> None:
        super().__init__(weight)
        self._range(least=least, most=most)
        self.least, self.most = least, most

    def arrange(self, parts: Segments) -> Arrangement:
        return rearranging.prefix(parts, self.least, self.most)


class ReadTwice(Objective):
    """``P <again> P S``: S is asked, of a prefix that was read twice. When it reads it the second time, any model knows
    what is to come (JRT-prompt, arXiv 2407.05483).

    Args:
        weight: share of the rows, beside the other objectives'.
        least: smallest share of a segment that is P.
        most: largest share; at most half of a segment can be read twice.
    """

    signs = ("again",)

    def __init__(self, weight: float = 1.0, least: float = 0.1, most: float = 0.5) -> None:
        super().__init__(weight)
        self._range(least=least, most=most)
        self.least, self.most = least, most

    def arrange(self, parts: Segments) -> Arrangement:
        return rearranging.again(parts, self.least, self.most, copies=False)


class Copy(ReadTwice):
    """``P <again> P S``: the second P is asked too (arXiv 2402.01032, 2411.01030).

    Args:
        weight: share of the rows, beside the other objectives'.
        least: smallest share of a segment that is P.
        most: largest share; at most half.
    """

    def arrange(self, parts: Segments) -> Arrangement:
        return rearranging.again(parts, self.least, self.most, copies=True)


class FillMiddle(Objective):
    """Fill-in-the-middle, document by document: all tokens are asked, and the order lets a model write the middle last.

    ``<prefix> P <suffix> S <middle> M <end>`` or ``<prefix> <suffix> S <middle> P M <end>``. Four signs take the place
    of the last four tokens of a segment. Source: arXiv 2207.14255.

    Args:
        weight: share of the rows, beside the other objectives'.
        suffix_first: share of segments of the second form (SPM).
    """

    signs = ("prefix", "suffix", "middle", "end")

    def __init__(self, weight: float = 1.0, suffix_first: float = 0.5) -> None:
        super().__init__(weight)
        self._range(suffix_first=suffix_first)
        self.suffix_first = suffix_first

    def arrange(self, parts: Segments) -> Arrangement:
        return rearranging.middle(parts, self.suffix_first)


class Infill(Objective):
    """``[text with holes <fill>] hole <gap> hole <gap> ...``: the holes are asked (span corruption for decoders).

    Args:
        weight: share of the rows, beside the other objectives'.
        rate: share of a segment that is in holes.
        span: mean tokens of a hole.
    """

    signs = ("gap", "fill")
    reads_prefix = True
    shortest = 24

    def __init__(self, weight: float = 1.0, rate: float = 0.15, span: int = 8) -> None:
        super().__init__(weight)
        if not 0 < rate <= 0.5 or span < 1:
            raise ConfigError(f"Infill: rate {rate} must lie above 0 and up to 0.5, span {span} must be 1 or more")
        self.rate, self.span = rate, span

    def arrange(self, parts: Segments) -> Arrangement:
        return rearranging.infill(parts, self.rate, self.span)


class Retrieve(Objective):
    """``[text] <find> key rest ...``: a few tokens of the text, and what follows them there is asked.

    Args:
        weight: share of the rows, beside the other objectives'.
        rate: share of a segment that is questions.
        key: tokens that a question shows.
        copied: tokens that are asked.
    """

    signs = ("find",)
    reads_prefix = True

    def __init__(self, weight: float = 1.0, rate: float = 0.2, key: int = 8, copied: int = 16) -> None:
        super().__init__(weight)
        if not 0 < rate <= 0.5 or min(key, copied) < 1:
            raise ConfigError(
                f"Retrieve: rate {rate} must lie above 0 and up to 0.5, key {key} and copied {copied} must be 1 or more"
            )
        self.rate, self.key, self.copied = rate, key, copied
        self.shortest = 3 * (1 + key + copied)

    def arrange(self, parts: Segments) -> Arrangement:
        return rearranging.retrieve(parts, self.rate, self.key, self.copied)
