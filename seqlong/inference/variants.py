"""How much likelier a model finds an allele than the reference: over whole windows, or locally for masked models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from seqlong.errors import ConfigError
from seqlong.inference.model import Model
from seqlong.inference.strands import Strand, targets_of, tokens_of
from seqlong.state import BackboneState

Indels = Literal["calibrated", "window"]


@dataclass(frozen=True)
class Variant:
    """One allele in place of the reference.

    Attributes:
        start: first base that it replaces, from 0, on the strand that it is given for.
        ref: the reference's bases there; empty for an insertion.
        alt: its own; empty for a deletion.
    """

    start: int
    ref: bytes
    alt: bytes

    @staticmethod
    def trimmed(start: int, ref: bytes, alt: bytes) -> Variant:
        """Without the bases that both begin or end with, as VCF pads indels: the fewest that differ, leftmost last."""
        end = 0
        while end < min(len(ref), len(alt)) and ref[-1 - end] == alt[-1 - end]:
            end += 1
        ref, alt = ref[: len(ref) - end], alt[: len(alt) - end]
        begin = 0
        while begin < min(len(ref), len(alt)) and ref[begin] == alt[begin]:
            begin += 1
        return Variant(start + begin, ref[begin:], alt[begin:])

    def on(self, strand: Strand) -> Variant:
        """The same, as ``strand`` reads it; given for the forward strand."""
        place = strand.place(self.start, len(self.ref))
        return Variant(place, strand.allele(self.ref).tobytes(), strand.allele(self.alt).tobytes())


@dataclass(frozen=True)
class Window:
    """The bases that are scored around a variant.

    Windows begin at multiples of ``grid``, so that neighbouring variants share one, whatever else the file holds: a
    variant has ``length - after`` bases before it, or up to a ``grid`` more. At the end of a linear contig the window
    is moved inwards; only a shorter contig makes it shorter.

    Attributes:
        length: bases in all.
        after: bases from the variant on; 0 is half of them.
    """

    length: int
    after: int = 0

    def __post_init__(self) -> None:
        if self.length < 16:
            raise ConfigError(f"a window of {self.length} bases is too short; give at least 16")
        if not self.after:
            object.__setattr__(self, "after", self.length // 2)
        if not 0 < self.after < self.length:
            raise ConfigError(f"{self.after} bases after the variant do not fit a window of {self.length:,}")

    @property
    def grid(self) -> int:
        """Windows begin at multiples of this."""
        return max(1, min(self.length // 16, self.after // 2))

    @property
    def step(self) -> int:
        """A shared context ends at multiples of this from the window's beginning."""
        return max(1, self.length // 64)

    @property
    def longest(self) -> int:
        """Bases of the longest allele that leave as many behind it to be scored."""
        return (self.after - self.grid) // 2

    def begin(self, position: int, strand: Strand) -> int:
        """First base of the window of a variant at ``position``."""
        start = (position - (self.length - self.after)) // self.grid * self.grid
        return start if strand.circular else max(0, min(start, strand.length - self.length))

    def centred(self, variant: Variant, strand: Strand) -> int:
        """First base of the window with the variant in its middle."""
        start = variant.start - (self.length - len(variant.ref)) // 2
        return start if strand.circular else max(0, min(start, strand.length - self.length))


@dataclass
class Shared:
    """Variants of one window that go on from one state: that before base ``split - 1``."""

    begin: int
    split: int
    members: list[int]


def score(
    model: Model,
    strand: Strand,
    variants: Sequence[Variant],
    window: Window,
    indels: Indels = "calibrated",
    batch_tokens: int = 65536,
    flank: int = 4,
) -> NDArray[np.float64]:
    """``ln p(allele's window) - ln p(reference's window)`` of each variant, nats, on one strand.

    Causal models: every base of the window counts, and since both windows are the same up to the variant, only those
    from it on are computed twice. Masked models: the bases of the allele, hidden, in the window around it; of
    insertions and deletions ``flank`` bases on either side too.

    Where an allele makes the sequence longer or shorter by ``n`` bases:

    - ``window``: both windows have the same length, so that the longer allele's ends ``n`` bases earlier.
    - ``calibrated``: the flank that both windows hold counts, and each of the ``n`` bases is set against the mean of
      the reference's from the variant on (of the hidden ones, for a masked model).

    Both are the same for substitutions.

    Args:
        model: a causal or masked language model of single bases.
        strand: what the variants stand on.
        variants: on that strand, none longer than ``window.longest``.
        window: what to score.
        indels: see above.
        batch_tokens: positions to run at once.
        flank: see above.
    """
    if model.kind == "masked":
        return _masked(model, strand, variants, window, batch_tokens, flank)
    found = np.zeros(len(variants))

    def finish(shares: list[Shared], rows: list[tuple[int, int | None]], state: BackboneState | None) -> None:
        _finish(model, strand, variants, window, indels, shares, rows, state, found)

    for several in _together(_plan(strand, variants, window, batch_tokens), window, batch_tokens):
        read_windows(model, strand, window, batch_tokens, several, finish)
    return found


# --- causal ----------------------------------------------------------------------------------------------------------


def _plan(strand: Strand, variants: Sequence[Variant], window: Window, batch_tokens: int) -> list[list[Shared]]:
    """For each window, which variants go on from which states, in the order of reading.

    Variants at several splits go on from the first of them where computing the bases between again costs less than
    another row of the reference.
    """
    by_window: dict[int, dict[int, list[int]]] = {}
    for number, variant in enumerate(variants):
        begin = window.begin(variant.start, strand)
        split = begin + (variant.start - begin) // window.step * window.step
        by_window.setdefault(begin, {}).setdefault(split, []).append(number)
    plans = []
    for begin, splits in sorted(by_window.items()):
        stop = _stop(begin, window, strand)
        plan: list[Shared] = []
        for split, members in sorted(splits.items()):
            last = plan[-1] if plan else None
            most = batch_tokens // max(1, stop - last.split + 1) if last else 0
            if last and len(last.members) + len(members) < most and (split - last.split) * len(members) <= stop - split:
                last.members += members
            else:
                plan.append(Shared(begin, split, list(members)))
        plans.append(plan)
    return plans


def _together(plans: list[list[Shared]], window: Window, batch_tokens: int) -> Iterator[list[list[Shared]]]:
    """Windows that are read in one batch: those of one split at one distance, as many as fit; others alone."""
    alike: dict[int, list[list[Shared]]] = {}
    for plan in plans:
        if len(plan) > 1:
            yield [plan]
            continue
        distance = plan[0].split - plan[0].begin
        kept = alike.setdefault(distance, [])
        rows = sum(len(other[0].members) + 1 for other in [*kept, plan])
        if kept and (rows * (window.length - distance) > batch_tokens or len(kept) * distance > batch_tokens):
            yield kept
            kept = alike[distance] = []
        kept.append(plan)
    yield from (kept for kept in alike.values() if kept)


def _stop(begin: int, window: Window, strand: Strand) -> int:
    return begin + window.length if strand.circular else min(begin + window.length, strand.length)


def read_windows(
    model: Model,
    strand: Strand,
    window: Window,
    batch_tokens: int,
    plans: list[list[Shared]],
    finish: Callable[[list[Shared], list[tuple[int, int | None]], BackboneState | None], None],
) -> None:
    """Read the windows of ``plans``, all at once, up to each split, and let ``finish`` go on with every allele.

    ``finish`` is given the shares, rows as ``(share, allele)`` with None for the reference's before those of its
    alleles, and the state of each share.
    """
    state: BackboneState | None = None
    done = [plan[0].begin for plan in plans]
    for place in range(len(plans[0])):
        shares = [plan[place] for plan in plans]
        # The state is that before base split - 1, whose reading predicts the base at the split.
        parts = [strand.read(a, share.split - 1) for a, share in zip(done, shares, strict=True)]
        if len(parts[0]):
            state = model.initial_state(len(plans)) if state is None else state
            _, state = model.hidden(tokens_of(np.stack(parts)), state)
            done = [share.split - 1 for share in shares]
        rows: list[tuple[int, int | None]] = []
        for number, share in enumerate(shares):
            most = max(2, batch_tokens // (_stop(share.begin, window, strand) - share.split + 1))
            for first in range(0, len(share.members), most - 1):
                part: list[tuple[int, int | None]] = [(number, None)]
                part += [(number, member) for member in share.members[first : first + most - 1]]
                if len(rows) + len(part) > most and rows:
                    finish(shares, rows, state)
                    rows = []
                rows += part
        if rows:
            finish(shares, rows, state)


def _finish(
    model: Model,
    strand: Strand,
    variants: Sequence[Variant],
    window: Window,
    indels: Indels,
    shares: list[Shared],
    rows: list[tuple[int, int | None]],
    state: BackboneState | None,
    found: NDArray[np.float64],
) -> None:
    """The rest of the window, once for the reference (None) and once for each allele that goes on from its state.

    The reference's row is in the batch of its alleles, so that rounding, which is alike for alike rows, cancels.
    """
    letters = []
    for number, member in rows:
        share = shares[number]
        begin, stop = max(share.begin, share.split - 1), _stop(share.begin, window, strand)
        letters.append(haplotype(strand, begin, stop, None if member is None else variants[member]))
    values, known = _likelihoods(model, letters, state, [number for number, _ in rows])
    reference: tuple[int, int] = (0, 0)
    for row, (number, member) in enumerate(rows):
        if member is None:
            reference = (row, len(letters[row]))
            continue
        variant = variants[member]
        at = variant.start - max(shares[number].begin, shares[number].split - 1)
        found[member] = difference(
            values[row], values[reference[0]], known[reference[0]], at, variant, len(letters[row]), reference[1], indels
        )


def haplotype(strand: Strand, begin: int, stop: int, variant: Variant | None) -> NDArray[np.uint8]:
    """The ``stop - begin`` letters from ``begin`` on, with an allele in its place; fewer where the contig ends."""
    if variant is None:
        return strand.read(begin, stop)
    longer = len(variant.alt) - len(variant.ref)
    parts = [
        strand.read(begin, variant.start),
        np.frombuffer(variant.alt, dtype=np.uint8),
        strand.read(variant.start + len(variant.ref), stop - longer),
    ]
    return np.concatenate(parts)[: stop - begin]


def _likelihoods(
    model: Model, letters: list[NDArray[np.uint8]], state: BackboneState | None, owner: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """``ln p`` of each letter but the first given those before it, 0 where it is not known, and where it is."""
    length = max(map(len, letters))
    rows = np.zeros((len(letters), length), dtype=np.uint8)
    for row, line in enumerate(letters):
        rows[row, : len(line)] = line  # the rest is padding, which nothing comes after
    tokens, targets = tokens_of(rows), targets_of(rows)
    index = torch.tensor(owner, device=model.device)
    carried = None if state is None else state.map(lambda value: value.index_select(0, index))
    values, _ = model.log_likelihood(tokens[:, :-1], targets[:, 1:], carried)
    found = np.zeros(rows.shape)
    found[:, 1:] = values.double().cpu().numpy()
    return found, (targets >= 0).numpy()


def difference(
    allele: NDArray[np.float64],
    reference: NDArray[np.float64],
    known: NDArray[np.bool_],
    at: int,
    variant: Variant,
    length: int,
    reference_length: int,
    indels: Indels = "calibrated",
) -> float:
    """The score of an allele from the ``ln p`` of its row's letters and the reference's; see ``score``.

    Args:
        allele: ``(t)`` of the allele's row.
        reference: ``(t)`` of the reference's.
        known: ``(t)`` where the reference's letters are known.
        at: place of the variant in both rows.
        variant: what it is.
        length: letters of the allele's row.
        reference_length: of the reference's.
        indels: see ``score``.
    """
    longer = len(variant.alt) - len(variant.ref)
    if not longer or indels == "window":
        return float(allele[at:].sum() - reference[at:].sum())
    flank = min(length - at - len(variant.alt), reference_length - at - len(variant.ref))
    counted = known[at:reference_length]
    mean = reference[at:reference_length].sum() / max(1, int(counted.sum()))
    own = allele[at : at + len(variant.alt) + flank].sum()
    return float(own - reference[at : at + len(variant.ref) + flank].sum() - longer * mean)


# --- masked ----------------------------------------------------------------------------------------------------------


def _masked(
    model: Model, strand: Strand, variants: Sequence[Variant], window: Window, batch_tokens: int, flank: int
) -> NDArray[np.float64]:
    """See ``score``. Alleles of as many bases in one place share the row in which these are hidden."""
    rows: dict[tuple[int, int, int, bytes], int] = {}
    pairs = []
    for variant in variants:
        begin = window.centred(variant, strand)
        margin = flank if len(variant.ref) != len(variant.alt) else 0
        reference = (begin, variant.start - margin, len(variant.ref) + 2 * margin, b"")
        own = reference
        if margin:
            own = (begin, variant.start - margin, len(variant.alt) + 2 * margin, variant.ref + b">" + variant.alt)
        pairs.append((rows.setdefault(reference, len(rows)), rows.setdefault(own, len(rows))))
    owners: list[Variant | None] = [None] * len(rows)
    for variant, (reference_row, own_row) in zip(variants, pairs, strict=True):
        if own_row != reference_row:
            owners[own_row] = variant
    keys, found = list(rows), np.zeros(len(variants))
    hidden: list[NDArray[np.float64]] = []
    truths: list[NDArray[np.int64]] = []
    size = max(1, batch_tokens // window.length)
    for first in range(0, len(keys), size):
        lines, spans = [], []
        for row in range(first, min(first + size, len(keys))):
            begin, start, span, _ = keys[row]
            lines.append(haplotype(strand, begin, _stop(begin, window, strand), owners[row]))
            low = max(0, start - begin)
            spans.append((low, max(low, min(start - begin + span, len(lines[-1])))))
        for line, (low, high), said in zip(lines, spans, _hidden_rows(model, lines, spans), strict=True):
            truths.append(targets_of(line[low:high]).numpy())
            hidden.append(said)
    for number, (variant, (reference_row, own_row)) in enumerate(zip(variants, pairs, strict=True)):
        truth, said = truths[reference_row], hidden[reference_row]
        before = _picked(said, truth)
        if own_row == reference_row:
            asked = targets_of(np.frombuffer(variant.alt, dtype=np.uint8)).numpy()
            found[number] = (_picked(said, asked) - before)[truth >= 0].sum()
        else:
            after = _picked(hidden[own_row], truths[own_row])
            longer = len(variant.alt) - len(variant.ref)
            found[number] = after.sum() - before.sum() - longer * before.sum() / max(1, (truth >= 0).sum())
    return found


def _hidden_rows(
    model: Model, lines: list[NDArray[np.uint8]], spans: list[tuple[int, int]]
) -> list[NDArray[np.float64]]:
    """``(n y)`` log-probabilities of each row's hidden letters."""
    length = max(map(len, lines))
    groups: dict[int, list[int]] = {}
    for row, line in enumerate(lines):
        groups.setdefault(len(line), []).append(row)  # a row that a contig's end made shorter is run by itself
    found: list[NDArray[np.float64]] = [np.zeros((0, 0))] * len(lines)
    for length, several in groups.items():
        tokens = torch.zeros(len(several), length, dtype=torch.int64)
        for place, row in enumerate(several):
            tokens[place] = tokens_of(lines[row])
            tokens[place, spans[row][0] : spans[row][1]] = model.mask_token
        hidden, _ = model.hidden(tokens)
        for place, row in enumerate(several):
            part = hidden[place : place + 1, spans[row][0] : spans[row][1]]
            said = model.task.head.logits(part)[0].double().log_softmax(dim=-1)
            found[row] = said.cpu().numpy()
    return found


def _picked(said: NDArray[np.float64], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """The log-probability of each token, 0 where it is not known."""
    values: NDArray[np.float64] = said[np.arange(len(tokens)), np.maximum(tokens, 0)]
    return np.where(tokens >= 0, values, 0.0)
