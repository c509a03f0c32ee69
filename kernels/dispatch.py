"""Which implementation of an op runs, and why.

Every op has a ``reference`` (a float64 loop over tokens: the definition) and faster implementations. ``choose`` returns
one together with the reason, and logs each distinct choice once, so that nothing is silently slower or different.
``SEQLONG_KERNELS=reference|chunked|...`` forces one for every op that has it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)

VARIABLE = "SEQLONG_KERNELS"
_announced: set[tuple[str, str, str]] = set()


@dataclass(frozen=True)
class Choice:
    """An implementation and the reason that it was chosen."""

    implementation: str
    reason: str


def choose(op: str, offered: dict[str, str], preferred: str, forced: str | None = None) -> Choice:
    """Choose an implementation of ``op``.

    Args:
        op: name of the op, for the log.
        offered: implementation -> why it would be chosen (or simply what it is).
        preferred: the one that the op's own rule prefers for these inputs.
        forced: the caller's demand; else ``SEQLONG_KERNELS`` is asked.

    Raises:
        ValueError: the forced implementation does not exist for this op (caller's demand only; the environment
            variable covers all ops, so an op that lacks the named one keeps its preferred one and says so).
    """
    if forced is not None:
        if forced not in offered:
            raise ValueError(f"{op} has no implementation '{forced}'; it has {', '.join(sorted(offered))}")
        return Choice(forced, "asked for by the caller")
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted in offered:
        choice = Choice(wanted, f"{VARIABLE}={wanted}")
    elif wanted:
        choice = Choice(preferred, f"{offered[preferred]}; {VARIABLE}={wanted} cannot be used by this op here")
    else:
        choice = Choice(preferred, offered[preferred])
    if torch.compiler.is_compiling():
        return choice
    key = (op, choice.implementation, choice.reason)
    if key not in _announced:
        _announced.add(key)
        log.info("%s runs as %s: %s", op, choice.implementation, choice.reason)
    return choice
