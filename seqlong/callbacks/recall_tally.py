"""Tally: counts of right answers, and what they are worth."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Depths are counted in tenths of what stands before the question.
DEPTHS = 10


@dataclass
class Tally:
    """Answers that are alike.

    Attributes:
        length: positions of their rows.
        items: pairs, needles, ... of their rows.
        depth: where they were told, in tenths of what stands before the question, 0 to 9; -1 for no one place.
        distance: tokens from there to the question, the power of two at or below; -1 likewise.
        answers: how many.
        right: how many of them are right, every token of them.
    """

    length: int
    items: int
    depth: int
    distance: int
    answers: int
    right: int


def wilson(right: int, answers: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927)."""
    if not answers:
        return 0.0, 1.0
    share, extra = right / answers, z * z / answers
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / answers + extra / answers / 4)
    return max(0.0, middle - half), min(1.0, middle + half)
