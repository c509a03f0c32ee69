"""Hidden states of variants: what an allele changes in what a model makes of the bases around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqlong.inference.model import Model
from seqlong.inference.strands import Strand, targets_of, tokens_of
from seqlong.inference.variants import (
    Shared,
    Variant,
    Window,
    _plan,
    _stop,
    _together,
    difference,
    haplotype,
    read_windows,
)
from seqlong.state import BackboneState


def differences(
    model: Model,
    strand: Strand,
    variants: Sequence[Variant],
    window: Window,
    spans: Sequence[int],
    batch_tokens: int = 65536,
) -> tuple[NDArray[np.float32], NDArray[np.float64] | None]:
    """``(n, spans · d)``: the mean state of the first ``span`` bases from the variant on, ALT less REF, for each span.

    Causal models read what stands before the variants once for all of them; from the same reading comes the
    ``score`` of each variant, ``(n)``. Of models that see both sides, the window is read with and without each
    variant, and ``span`` bases on either side count; there is no score (None).

    Args:
        model: of single bases, of any task.
        strand: what the variants stand on.
        variants: on that strand, none longer than ``window.longest``.
        window: what is read.
        spans: bases.
        batch_tokens: positions to run at once.
    """
    found = np.zeros((len(variants), len(spans) * model.width), dtype=np.float32)
    if model.causal:
        likely = np.zeros(len(variants)) if model.kind == "causal" else None

        def finish(shares: list[Shared], rows: list[tuple[int, int | None]], state: BackboneState | None) -> None:
            _changed(model, strand, variants, window, spans, shares, rows, state, found, likely)

        for several in _together(_plan(strand, variants, window, batch_tokens), window, batch_tokens):
            read_windows(model, strand, window, batch_tokens, several, finish)
        return found, likely
    size = max(1, batch_tokens // window.length // 2)
    for first in range(0, len(variants), size):
        part = range(first, min(first + size, len(variants)))
        begins = [window.centred(variants[number], strand) for number in part]
        ends = [_stop(begin, window, strand) for begin in begins]
        rows = [haplotype(strand, a, z, None) for a, z in zip(begins, ends, strict=True)]
        rows += [haplotype(strand, a, z, variants[n]) for a, z, n in zip(begins, ends, part, strict=True)]
        states = _states(model, rows, None, [])
        for place, number in enumerate(part):
            variant, at = variants[number], variants[number].start - begins[place]
            own, reference = states[len(part) + place], states[place]
            means = []
            for span in spans:
                low = max(0, at - span)
                means.append(
                    own[low : at + len(variant.alt) + span].mean(0)
                    - reference[low : at + len(variant.ref) + span].mean(0)
                )
            found[number] = torch.cat(means).cpu().numpy()
    return found, None


def _changed(
    model: Model,
    strand: Strand,
    variants: Sequence[Variant],
    window: Window,
    spans: Sequence[int],
    shares: list[Shared],
    rows: list[tuple[int, int | None]],
    state: BackboneState | None,
    found: NDArray[np.float32],
    likely: NDArray[np.float64] | None,
) -> None:
    """Of the alleles in ``rows``, which go on from ``state`` with the reference's row before them."""
    letters = []
    for number, member in rows:
        share = shares[number]
        begin = max(share.begin, share.split - 1)
        stop = _stop(share.begin, window, strand)
        if likely is None:  # no more is needed than the states that count
            stop = min(stop, max(variants[one].start for one in share.members) + max(spans))
        letters.append(haplotype(strand, begin, stop, None if member is None else variants[member]))
    states = _states(model, letters, state, [number for number, _ in rows])
    values, known = _likelihoods(model, letters, states) if likely is not None else ([], [])
    reference = 0
    for row, (number, member) in enumerate(rows):
        if member is None:
            reference = row
            continue
        variant = variants[member]
        at = variant.start - max(shares[number].begin, shares[number].split - 1)
        if likely is not None:
            sizes = len(letters[row]), len(letters[reference])
            likely[member] = difference(values[row], values[reference], known[reference], at, variant, *sizes)
        means = []
        for span in spans:
            own, other = states[row][at : at + span], states[reference][at : at + span]
            means.append(own.mean(0) - other.mean(0) if len(own) and len(other) else torch.zeros_like(states[row][0]))
        found[member] = torch.cat(means).cpu().numpy()


def _states(
    model: Model, letters: list[NDArray[np.uint8]], state: BackboneState | None, owner: list[int]
) -> list[Tensor]:
    """``(t d)`` of each row, without the padding that makes them alike."""
    length = max(map(len, letters))
    table = np.zeros((len(letters), length), dtype=np.uint8)
    for row, line in enumerate(letters):
        table[row, : len(line)] = line
    tokens = tokens_of(table)
    if not model.causal and min(map(len, letters)) < length:  # padding would be seen: each row by itself
        return [model.hidden(tokens[row : row + 1, : len(line)])[0][0] for row, line in enumerate(letters)]
    carried = None
    if state is not None:
        index = torch.tensor(owner, device=model.device)
        carried = state.map(lambda value: value.index_select(0, index))
    hidden, _ = model.hidden(tokens, carried)
    return [hidden[row, : len(line)] for row, line in enumerate(letters)]


def _likelihoods(
    model: Model, letters: list[NDArray[np.uint8]], states: list[Tensor]
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.bool_]]]:
    """``ln p`` of each letter of each row but the first, 0 where it is not known; and where it is."""
    values, known = [], []
    for line, hidden in zip(letters, states, strict=True):
        targets = targets_of(line)
        found = np.zeros(len(line))
        with torch.no_grad(), model.products():
            found[1:] = -model.task.head.loss(hidden[None, :-1], targets[None, 1:].to(hidden.device))[0].double().cpu()
        values.append(found)
        known.append((targets >= 0).numpy())
    return values, known
