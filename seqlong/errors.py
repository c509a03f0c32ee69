"""One family of exceptions for mistakes that a user can mend.

Each message says what was found, what was expected and what to do. The command line prints the message alone; a
traceback is kept for our own mistakes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class SeqlongError(Exception):
    """A mistake in what the user gave: input, configuration or environment. Never a bug of ours."""


class ConfigError(SeqlongError):
    """A setting that does not exist, has the wrong type, or contradicts another."""


class DataError(SeqlongError):
    """An input file that cannot be read as what it is said to be."""


class CheckpointError(SeqlongError):
    """A checkpoint that does not fit the model, or is not whole."""


class TrainingError(SeqlongError):
    """A run that cannot go on, such as one whose gradients stay non-finite."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``valid``, or an empty string when nothing is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def located(path: str | Path, line: int | None, message: str) -> str:
    """Prefix ``message`` with ``path:line``, the form that editors make clickable."""
    return f"{path}:{line}: {message}" if line is not None else f"{path}: {message}"
