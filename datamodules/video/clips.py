"""Clips of pictures with a label, joined to a SequenceBatch of patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from seqlong.batch import SequenceBatch
from seqlong.datamodules.video.tubelets import Tubelets


@dataclass
class Clip:
    """One row to be.

    Attributes:
        pixels: ``(n h w 3)`` uint8; None for a row that counts for nothing.
        label: class, or -1 for none.
        source: where it is from.
        first: place in time of the first frame, in frames, for a clip that another one goes before.
        continues: whether it goes on from the same row of the batch before.
        labels: class of each frame, instead of ``label``.
    """

    pixels: UInt8[Tensor, "n h w 3"] | None
    label: int = -1
    source: str = ""
    first: int = 0
    continues: bool = False
    labels: Sequence[int] | None = None


def join(
    clips: Sequence[Clip], numbers: Tensor, tubelets: Tubelets, length: int, carried: bool = False
) -> SequenceBatch:
    """Rows of ``length`` patches. A clip that is shorter, or none, leaves padding.

    The label stands as the target of the last patch of its clip; labels of frames at the last patch of each step in
    time (the last of its frames counts). Everywhere else the target is -1.

    Args:
        clips: one a row.
        numbers: of the samples; ``index`` of the batch.
        tubelets: how clips are cut.
        length: positions in a row.
        carried: whether ``continues`` is to be given.
    """
    rows = len(clips)
    patches = torch.zeros(rows, length, tubelets.size)
    positions = torch.zeros(rows, length, 3, dtype=torch.int64)
    segments = torch.zeros(rows, length, dtype=torch.int32)
    targets = torch.full((rows, length), -1, dtype=torch.int64)
    for row, clip in enumerate(clips):
        if clip.pixels is None or not len(clip.pixels):
            continue
        grid = tubelets.grid(*clip.pixels.shape[:3])
        count = min(grid[0] * grid[1] * grid[2], length)
        patches[row, :count] = tubelets.cut(clip.pixels)[:count]
        positions[row, :count] = tubelets.positions(grid, clip.first // tubelets.time)[:count]
        segments[row, :count] = 1
        if clip.labels is not None:
            step = grid[1] * grid[2]
            for place in range(count // step):
                targets[row, (place + 1) * step - 1] = clip.labels[
                    min((place + 1) * tubelets.time, len(clip.labels)) - 1
                ]
        else:
            targets[row, count - 1] = clip.label
    return SequenceBatch(
        targets=targets,
        segment_ids=None if bool((segments == 1).all()) else segments,
        positions=positions,
        continues=torch.tensor([clip.continues for clip in clips]) if carried else None,
        index=numbers,
        source=[clip.source for clip in clips],
        patches=patches,
    )
