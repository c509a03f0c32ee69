"""Labelled records to train, validation and test: as files say, or drawn so that classes keep their shares."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.leakage import either_strand
from seqlong.datamodules.dna.records import Records
from seqlong.datamodules.sampler import mix
from seqlong.errors import ConfigError

_ORDER = 1 << 41  # names the draw


def folds_of(records: Records, folds: int, seed: int) -> NDArray[np.int64]:
    """``(n)`` the fold of each record, 0 to ``folds - 1``.

    Records with the same bases on either strand go to the same fold. Within each label, folds differ by a record at
    most (by a group of the same ones).

    Raises:
        ConfigError: fewer than two folds.
    """
    if folds < 2:
        raise ConfigError(f"{folds} folds; expected 2 or more")
    fold = np.zeros(len(records), dtype=np.int64)
    for turn, group in enumerate(_groups(records, seed)):
        fold[group] = turn % folds
    return fold


def hold_out(records: Records, share: float, seed: int) -> NDArray[np.bool_]:
    """``(n)`` True for ``share`` of the records of each label; the same bases stay together, as in ``folds_of``.

    Raises:
        ConfigError: ``share`` is not between 0 and a half.
    """
    if not 0 < share <= 0.5:
        raise ConfigError(f"a share of {share} cannot be held out; expected more than 0 and at most 0.5")
    held = np.zeros(len(records), dtype=np.bool_)
    for turn, group in enumerate(_groups(records, seed)):
        held[group] = int((turn + 1) * share) > int(turn * share)
    return held


def _groups(records: Records, seed: int) -> list[list[int]]:
    """Records by their bases, label after label, within a label in an order drawn by ``seed``."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for number in range(len(records)):
        groups[either_strand(records.sequence(number))].append(number)
    members = list(groups.values())
    by_label: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for group, numbers in enumerate(members):
        by_label[records.labels[numbers[0]]].append(group)
    if len(by_label) > max(50, len(members) // 4):  # values, not classes
        by_label = defaultdict(list, {(): list(range(len(members)))})
    ordered = []
    for label in sorted(by_label):
        listed = np.array(by_label[label])
        ordered += [members[group] for group in listed[np.argsort(mix(seed, _ORDER, listed))].tolist()]
    return ordered


def ends_held_out(records: Records, share: float) -> tuple[Records, Records]:
    """Each record without its last ``share`` of bases, and that share: for genomes, whose parts are cut to windows."""
    if not 0 < share <= 0.5:
        raise ConfigError(f"a share of {share} cannot be held out; expected more than 0 and at most 0.5")
    middle = records.ends - np.maximum(1, np.round(share * records.lengths)).astype(np.int64)
    first = records.take(np.arange(len(records)))
    second = records.take(np.arange(len(records)))
    first.ends, second.starts = middle, middle
    return first, second
