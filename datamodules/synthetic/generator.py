"""Rows and RecallTask: what every recall task shares. Something is told in a row, and asked for later in it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.synthetic.draw import Draw
from seqlong.errors import ConfigError

Ints = NDArray[np.int64]


@dataclass
class Rows:
    """Rows of a recall task, and what is known of every question.

    Attributes:
        tokens: ``(b t)``.
        targets: ``(b t)``, the token that a position is to answer with; -1 where nothing is asked.
        told: ``(b t)``, where the token asked for was told last; -1 where nothing is asked, or it stands in no one
            place, as a count does.
        answer: ``(b t)``, the number of the answer that an asked position is part of, from 0 along the row; -1
            elsewhere. An answer is right if every token of it is.
        items: how many things a row holds that could be asked for.
    """

    tokens: Ints
    targets: Ints
    told: Ints
    answer: Ints
    items: int

    @staticmethod
    def of(tokens: Ints, targets: Ints, told: Ints, items: int, answer: Ints | None = None) -> Rows:
        """Rows in which each asked position is an answer of its own, unless ``answer`` says otherwise."""
        if answer is None:
            asked = targets >= 0
            answer = np.where(asked, np.cumsum(asked, axis=1) - 1, -1)
        return Rows(tokens, targets, told, answer, items)


class RecallTask:
    """Makes rows: pure functions of the names of the rows, so that sample n of a seed is always the same.

    A subclass defines ``rows`` and ``chance``, and says in ``describe`` what is asked.
    """

    #: What the task is called in reports.
    title = "recall"
    #: What ``items`` counts, for reports and messages.
    counted = "items"
    #: The setting that ``items`` is, so that an evaluation may vary it; empty where it cannot be varied.
    varied = ""
    vocab_size: int

    def rows(self, draw: Draw, length: int) -> Rows:
        """``draw.rows`` rows of ``length`` positions.

        Raises:
            ConfigError: the rows are too short for what is asked.
        """
        raise NotImplementedError(f"{type(self).__name__} must define rows(draw, length)")

    def chance(self) -> float:
        """Share of answers that are right by guessing among all that could be."""
        raise NotImplementedError(f"{type(self).__name__} must define chance()")

    def row(self, random: np.random.Generator, length: int) -> Rows:
        """A single row without its first axis, named by a number from ``random``."""
        made = self.rows(Draw(random.integers(0, 2**62, 1)), length)
        return Rows(made.tokens[0], made.targets[0], made.told[0], made.answer[0], made.items)

    def with_items(self, items: int) -> RecallTask:
        """The same task with another number of items.

        Raises:
            ConfigError: the task's number of items cannot be chosen.
        """
        if not self.varied:
            raise ConfigError(
                f"{type(self).__name__} has no number of {self.counted} to vary: leave out items of the evaluation"
            )
        other = copy.copy(self)
        setattr(other, self.varied, items)
        other.check()
        return other

    def check(self) -> None:
        """Raise ConfigError unless the settings fit together."""

    def describe(self) -> dict[str, object]:
        """What is asked, and what guessing gives, for reports."""
        return {"task": self.title, **self.settings(), "vocab_size": self.vocab_size, "counted": self.counted,
                "chance": self.chance()}  # fmt: skip

    def settings(self) -> dict[str, object]:
        """The settings that reports show."""
        return {}

    def too_short(self, length: int, needed: int, what: str) -> ConfigError:
        """The error of rows that are too short."""
        return ConfigError(f"{what} need rows of {needed:,} positions, found length {length:,}")


def at_least(name: str, value: int, least: int, task: str) -> None:
    """Raise ConfigError unless a whole number is large enough."""
    if value < least:
        raise ConfigError(f"{task} needs {name} of {least} or more, found {value}")
