"""SyntheticVideo: clips of a generator for Lightning, resumable to the batch."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.base import SequenceData
from seqlong.datamodules.sampler import BatchRequest, mix
from seqlong.datamodules.video.clips import Clip, join
from seqlong.datamodules.video.synthetic import FlashOrder, VideoGenerator
from seqlong.datamodules.video.tubelets import Tubelets
from seqlong.errors import ConfigError

#: What tells the clips of training, validation and test apart.
TRAIN, VALIDATION, TEST = 0, 1, 2


class SyntheticVideo(SequenceData):
    """Clips that a generator makes up: endless ones to train on, and others, always the same, to measure with.

    Args:
        generator: what is filmed and asked; FlashOrder if not given.
        frames: of a clip.
        size: pixels of each side.
        tubelets: how clips are cut into patches.
        batch_size: clips in a batch over all ranks.
        labels: whether labels are wanted; tasks on pixels alone have no use for them.
        eval_frames: frames of a clip of evaluation; null is ``frames``.
        eval_rows: clips of validation, and of test.
        eval_batch_size: clips in an evaluation batch over all ranks; null is ``batch_size``.
        seed: number that names the clips.
        workers: loader processes of each rank.

    Raises:
        ConfigError: a setting is out of its range, or clips are too short for what is asked.
    """

    #: What a label is: a class of the clip, at its last patch.
    targets = "label"
    views = 1

    def __init__(
        self,
        generator: VideoGenerator | None = None,
        frames: int = 12,
        size: int = 24,
        tubelets: Tubelets = Tubelets(1, 8, 8),  # noqa: B008 (frozen)
        batch_size: int = 32,
        labels: bool = True,
        eval_frames: int | None = None,
        eval_rows: int = 512,
        eval_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if min(frames, size, eval_rows, eval_frames or 1) < 1:
            raise ConfigError(f"frames {frames}, size {size} and eval_rows {eval_rows} must be 1 or more")
        self.frames, self.size, self.tubelets = frames, size, tubelets
        self.eval_frames = frames if eval_frames is None else eval_frames
        lengths = [tubelets.count(count, size, size) for count in (frames, self.eval_frames)]
        super().__init__(lengths[0], batch_size, None, lengths[1], eval_batch_size, seed, workers)
        self.generator: VideoGenerator = FlashOrder() if generator is None else generator
        self.labels = labels
        self.eval_rows, self.classes = eval_rows, self.generator.classes
        for count in {frames, self.eval_frames}:
            self.generator.clip(np.random.default_rng(0), count, size)  # says at once what does not fit

    def training_batches(self) -> Dataset[SequenceBatch]:
        return _Clips(self, self.frames, (self.seed, TRAIN))

    def val_dataloader(self) -> DataLoader[SequenceBatch]:
        """Clips of validation."""
        return self.evaluation_loader(_Clips(self, self.eval_frames, (VALIDATION,)), self.eval_rows)

    def test_dataloader(self) -> DataLoader[SequenceBatch]:
        """Clips of test."""
        return self.evaluation_loader(_Clips(self, self.eval_frames, (TEST,)), self.eval_rows)

    def describe(self) -> dict[str, object]:
        """What is asked, for reports."""
        said = self.generator.describe()
        return {
            "title": f"made-up video: {said.get('task', 'synthetic')}",
            "generator": said,
            "stages": [{"length": self.length, "batch_size": self.batch_size, "steps": None}],
            "evaluation": {"length": self.eval_length, "rows": self.eval_rows},
            "notes": [
                f"Clips of {self.frames} frames of {self.size} x {self.size} pixels; patches of {self.tubelets.time} x "
                f"{self.tubelets.height} x {self.tubelets.width}."
            ],
        }

    def floors(self) -> list[dict[str, object]]:
        """Bits of a label that is guessed."""
        return [{"name": "chance", "bits": math.log2(self.classes)}] if self.labels else []


class _Clips(Dataset[SequenceBatch]):
    """Clips by number; a negative one is a row that counts for nothing."""

    def __init__(self, data: SyntheticVideo, frames: int, name: tuple[int, ...]) -> None:
        self.generator, self.tubelets, self.labels = data.generator, data.tubelets, data.labels
        self.frames, self.size, self.name = frames, data.size, name

    def __getitem__(self, asked: BatchRequest | NDArray[np.int64]) -> SequenceBatch:
        numbers = asked.samples if isinstance(asked, BatchRequest) else asked
        made = []
        for number in numbers.tolist():
            if number < 0:
                made.append(Clip(None))
                continue
            keys = [int(mix(*self.name, number, part)[0]) for part in range(2)]
            random = np.random.Generator(np.random.Philox(key=keys))
            filmed = self.generator.clip(random, self.frames, self.size)
            made.append(Clip(torch.from_numpy(filmed.pixels), filmed.label if self.labels else -1))
        length = self.tubelets.count(self.frames, self.size, self.size)
        return join(made, torch.from_numpy(numbers.copy()), self.tubelets, length)
