"""Numbers to predict of a video in place of a class: from the list, or features of another model from files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from seqlong.batch import SequenceBatch
from seqlong.datamodules.video.listing import Video
from seqlong.errors import DataError
from seqlong.labels import LabelledBatch


@dataclass(frozen=True)
class ValueNames:
    """What values are called, and how they are spread in training.

    Attributes:
        names: of each.
        mean: in training.
        deviation: in training; 1 where all are alike.
    """

    names: list[str]
    mean: list[float]
    deviation: list[float]


@dataclass(frozen=True)
class Values:
    """Looks values up.

    Attributes:
        source: ``label``: a video's label is its number; else a folder with a ``.npy`` vector for each video, at the
            video's place in its own folder, named after it: ``a.mp4.npy`` or ``a.npy``.
        root: folder that videos' paths are taken from.
    """

    source: str
    root: Path

    def __call__(self, video: Video) -> NDArray[np.float32]:
        """``(y)``.

        Raises:
            DataError: there is none for this video, or it is none.
        """
        if self.source == "label":
            try:
                number = float(video.label)
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise DataError(f"{video.path}: its label '{video.label}' is no number, as data.values=label needs")
            return np.array([number], dtype=np.float32)
        inside = video.path.relative_to(self.root) if video.path.is_relative_to(self.root) else Path(video.path.name)
        folder = Path(self.source).expanduser()
        tried = [folder / inside.with_name(f"{name}.npy") for name in (inside.name, inside.stem)]
        found = next((path for path in tried if path.is_file()), None)
        if found is None:
            raise DataError(f"{video.path}: data.values has neither {tried[0]} nor {tried[1].name}")
        try:
            vector = np.load(found, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{found}: is no .npy file that can be read ({error})") from error
        if vector.ndim != 1 or vector.dtype.kind not in "fiu" or not np.isfinite(vector).all():
            raise DataError(
                f"{found}: holds {vector.dtype} of shape {vector.shape}; expected one vector of finite numbers for "
                "the whole video"
            )
        return vector.astype(np.float32)

    def names(self, videos: Sequence[Video]) -> ValueNames:
        """How many values there are, and how they are spread over ``videos``.

        Raises:
            DataError: vectors of several sizes.
        """
        rows = []
        for video in videos:
            rows.append(self(video))
            if rows[-1].shape != rows[0].shape:
                raise DataError(
                    f"{video.path}: has {rows[-1].size} values, but {videos[0].path} has {rows[0].size}; all videos "
                    "need vectors of one size"
                )
        every = np.stack(rows).astype(np.float64)
        spread = every.std(axis=0)
        names = ["label"] if self.source == "label" else [str(number) for number in range(every.shape[1])]
        return ValueNames(names, every.mean(axis=0).tolist(), np.where(spread > 0, spread, 1).tolist())


def with_values(batch: SequenceBatch, values: Float[Tensor, "b y"]) -> LabelledBatch:
    """A batch of one clip a row, as a batch of records with values; rows of nothing have none (NaN)."""
    rows, length = batch.shape
    filled = torch.full((rows,), length) if batch.segment_ids is None else (batch.segment_ids != 0).sum(dim=1)
    starts = torch.arange(rows) * length
    given = {field.name: getattr(batch, field.name) for field in dataclasses.fields(SequenceBatch)}
    given |= {"tokens": torch.full((rows, length), -1)}
    return LabelledBatch(
        **given,
        starts=starts,
        ends=starts + filled.clamp(min=1) - 1,
        labels=torch.where((filled > 0)[:, None], values, math.nan),
        records=batch.index,
    )
