"""Which implementation of an op runs, and why.

Every op has a ``reference`` (a float64 loop over tokens: the definition) and faster implementations. ``choose`` returns
one together with the reason, and logs each distinct choice once, so that nothing is silently slower or different.
``SEQLONG_KERNELS=reference|chunked|...`` forces one for every op that has it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from seqlong.errors import ConfigError, nearest
from seqlong.kernels.runtime import triton_runs_on

log = logging.getLogger(__name__)

VARIABLE = "SEQLONG_KERNELS"
#: What ops that go along a row have.
ALONG_A_ROW = {
    "triton": "Triton kernels on this GPU",
    "chunked": "matrix products over chunks in torch, any device",
    "reference": "float64 loop over tokens",
}
#: Every name that some op gives an implementation: what ``SEQLONG_KERNELS`` may say.
KNOWN = ("reference", "chunked", "triton", "grouped_mm", "sdpa", "varlen", "segments", "blocks", "gathered")
#: How the text begins of an implementation that an op has and that cannot serve these inputs; the reason follows.
NOT_HERE = "not here: "
_announced: set[tuple[str, str, str]] = set()


@dataclass(frozen=True)
class Choice:
    """An implementation and the reason that it was chosen."""

    implementation: str
    reason: str


def demanded() -> str:
    """What ``SEQLONG_KERNELS`` asks for; nothing if it is not set.

    Raises:
        ConfigError: it names what no op has.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in KNOWN:
        raise ConfigError(
            f"{VARIABLE}={wanted} names no implementation{nearest(wanted, KNOWN) or '.'} It may be {', '.join(KNOWN)}"
        )
    return wanted


def choose(op: str, offered: dict[str, str], preferred: str, forced: str | None = None) -> Choice:
    """Choose an implementation of ``op``.

    Args:
        op: name of the op, for the log.
        offered: implementation -> why it would be chosen (or simply what it is), or ``NOT_HERE`` and why it cannot be.
        preferred: the one that the op's own rule prefers for these inputs.
        forced: the caller's demand; else ``SEQLONG_KERNELS`` is asked.

    Raises:
        ValueError: the forced implementation does not exist for this op, or cannot serve (caller's demand only; the
            environment variable covers all ops, so an op that lacks the named one keeps its preferred one and says so).
        ConfigError: the environment variable names what no op has.
    """
    if forced is not None:
        if forced not in offered:
            known = ", ".join(sorted(offered))
            raise ValueError(f"{op} has no implementation '{forced}'; it has {known}{nearest(forced, offered)}")
        if offered[forced].startswith(NOT_HERE):
            name = "in Triton" if forced == "triton" else f"as {forced}"
            raise ValueError(f"{op} cannot run {name}: {offered[forced].removeprefix(NOT_HERE)}")
        return Choice(forced, "asked for by the caller")
    wanted, unheard = os.environ.get(VARIABLE, ""), False
    if wanted and not offered.get(wanted, NOT_HERE).startswith(NOT_HERE):
        choice = Choice(wanted, f"{VARIABLE}={wanted}")
    elif demanded():
        choice = Choice(preferred, f"{offered[preferred]}; {VARIABLE}={wanted} cannot be used by this op here")
        unheard = True
    else:
        choice = Choice(preferred, offered[preferred])
    if torch.compiler.is_compiling():
        return choice
    key = (op, choice.implementation, choice.reason)
    if key not in _announced:
        _announced.add(key)
        log.log(
            logging.WARNING if unheard else logging.INFO, "%s runs as %s: %s", op, choice.implementation, choice.reason
        )
    return choice


def without_triton(offered: dict[str, str], obstacle: str) -> dict[str, str]:
    """What an op offers where its Triton kernels do not serve, and why they do not."""
    return {**offered, "chunked": f"{offered['chunked']} ({obstacle})", "triton": f"{NOT_HERE}{obstacle}"}


#: What the steps of those ops have, ``scalar_decay_step`` and the like.
STEPS = {
    "triton": "one launch, through which the state passes once",
    "chunked": "torch, any device: a token by its formula, more as one chunk",
    "reference": "float64 loop over tokens",
}
#: Tokens up to which the Triton step, which takes one after another, is the quickest.
FEW_TOKENS = 16
#: Widest keys of which it holds a few value columns.
WIDEST_STEP = 1024


def choose_step(
    op: str, q: Tensor, v: Tensor, inputs: Iterable[Tensor | None], forced: str | None, obstacle: str | None = None
) -> Choice:
    """``choose`` for the next tokens of a recurrence.

    Args:
        op: name of the step.
        q: queries (b n g k).
        v: values (b n h v).
        inputs: all that could need a gradient, which the Triton kernel does not have.
        forced: the caller's demand.
        obstacle: why Triton cannot serve, as far as the op itself knows.

    Raises:
        ValueError: the forced implementation cannot serve, or does not exist.
    """
    obstacle = obstacle or triton_runs_on(v.device)
    if v.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        obstacle = f"the Triton kernel does not compute in {v.dtype}"
    elif q.shape[3] > WIDEST_STEP:
        obstacle = f"the Triton kernel holds keys up to {WIDEST_STEP} wide, not {q.shape[3]}"
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        obstacle = "the Triton kernel has no gradient"
    if obstacle is None:
        quick = v.is_cuda and v.shape[1] <= FEW_TOKENS
        return choose(op, STEPS, "triton" if quick else "chunked", forced)
    if forced == "triton":
        raise ValueError(f"{op} cannot run in Triton: {obstacle}")
    return choose(op, without_triton(STEPS, obstacle), "chunked", forced)


def choose_along_a_row(op: str, v: Tensor, obstacle: str | None, forced: str | None = None) -> Choice:
    """``choose`` for an op that goes along a row.

    Args:
        op: name of the op.
        v: its values.
        obstacle: why its Triton kernels cannot serve; None if they can.
        forced: the caller's demand.

    Raises:
        ValueError: the forced implementation cannot serve, or does not exist.
    """
    if obstacle is None:
        # Tensor cores have no float32: plain torch, with tf32 or without as its user set it, is as good there.
        best = v.is_cuda and v.dtype != torch.float32
        return choose(op, ALONG_A_ROW, "triton" if best else "chunked", forced)
    return choose(op, without_triton(ALONG_A_ROW, obstacle), "chunked", forced)
