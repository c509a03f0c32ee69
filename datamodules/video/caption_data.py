"""SyntheticCaptions: made-up clips with captions for Lightning, resumable to the batch."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.base import SequenceData
from seqlong.datamodules.sampler import BatchRequest, mix
from seqlong.datamodules.video.captions import CaptionGenerator, MovingShapes
from seqlong.datamodules.video.clips import Clip
from seqlong.datamodules.video.multimodal import MultimodalVocabulary, Rows, Targets, Told
from seqlong.datamodules.video.synthetic_data import TEST, TRAIN, VALIDATION
from seqlong.datamodules.video.tubelets import Tubelets
from seqlong.errors import ConfigError


class SyntheticCaptions(SequenceData):
    """Clips with a caption that a generator makes up: endless ones to train on, and others to measure with.

    Args:
        generator: what is filmed and said; MovingShapes if not given.
        frames: of a clip.
        size: pixels of each side.
        tubelets: how clips are cut into patches.
        text_length: bytes of a text, at most.
        targets: ``next`` or ``same`` byte of the text, in rows of a video and its text; ``pair``: which text is of
            which video, in rows whose text does not see the video.
        batch_size: pairs in a batch over all ranks.
        eval_rows: pairs of validation, and of test.
        eval_batch_size: pairs in an evaluation batch over all ranks; null is ``batch_size``.
        seed: number that names the clips.
        workers: loader processes of each rank.

    Raises:
        ConfigError: a setting is out of its range, or clips are too short for what is filmed.
    """

    views = 1
    vocabulary = MultimodalVocabulary()

    def __init__(
        self,
        generator: CaptionGenerator | None = None,
        frames: int = 8,
        size: int = 24,
        tubelets: Tubelets = Tubelets(2, 8, 8),  # noqa: B008 (frozen)
        text_length: int = 62,
        targets: Targets = "next",
        batch_size: int = 32,
        eval_rows: int = 256,
        eval_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if min(frames, size, eval_rows) < 1:
            raise ConfigError(f"frames {frames}, size {size} and eval_rows {eval_rows} must be 1 or more")
        self.rows = Rows(tubelets, tubelets.count(frames, size, size), text_length, 0, targets)
        super().__init__(self.rows.length, batch_size, None, None, eval_batch_size, seed, workers)
        self.generator: CaptionGenerator = MovingShapes() if generator is None else generator
        self.frames, self.size, self.tubelets = frames, size, tubelets
        self.targets, self.eval_rows = targets, eval_rows
        self.generator.clip(np.random.default_rng(0), frames, size)  # says at once what does not fit

    def training_batches(self) -> Dataset[SequenceBatch]:
        return _Clips(self, (self.seed, TRAIN))

    def val_dataloader(self) -> DataLoader[SequenceBatch]:
        """Pairs of validation."""
        return self.evaluation_loader(_Clips(self, (VALIDATION,)), self.eval_rows)

    def test_dataloader(self) -> DataLoader[SequenceBatch]:
        """Pairs of test."""
        return self.evaluation_loader(_Clips(self, (TEST,)), self.eval_rows)

    def describe(self) -> dict[str, Any]:
        """What is filmed, for reports."""
        said = self.generator.describe()
        return {
            "title": f"made-up video with captions: {said.get('task', 'synthetic')}",
            "unit": "token" if self.targets == "pair" else "byte",
            "generator": said,
            "stages": [{"length": self.length, "batch_size": self.batch_size, "steps": None}],
            "evaluation": {"length": self.eval_length, "rows": self.eval_rows},
            "notes": [
                f"Clips of {self.frames} frames of {self.size} x {self.size} pixels; patches of {self.tubelets.time} x "
                f"{self.tubelets.height} x {self.tubelets.width}; texts as bytes.",
                f"Such as: {self._example()}",
            ],
        }

    def floors(self) -> list[dict[str, object]]:
        """What can be had without the video: for pairs a guess among those of a batch; for texts the bits of a byte
        that are left where all is known of captions, but not which one it is."""
        if self.targets == "pair":
            return [{"name": "chance", "bits": math.log2(self.batch_size)}]
        sizes = [len(_film(self.generator, (VALIDATION,), n, self.frames, self.size).text) + 1 for n in range(64)]
        return [
            {"name": "captions without the video", "bits": math.log2(self.generator.captions) / float(np.mean(sizes))}
        ]

    def _example(self) -> str:
        return _film(self.generator, (VALIDATION,), 0, self.frames, self.size).text


def _film(generator: CaptionGenerator, name: tuple[int, ...], number: int, frames: int, size: int) -> Any:
    keys = [int(mix(*name, number, part)[0]) for part in range(2)]
    return generator.clip(np.random.Generator(np.random.Philox(key=keys)), frames, size)


class _Clips(Dataset[SequenceBatch]):
    """Pairs by number; a negative one is a row that counts for nothing."""

    def __init__(self, data: SyntheticCaptions, name: tuple[int, ...]) -> None:
        self.generator, self.rows, self.name = data.generator, data.rows, name
        self.frames, self.size = data.frames, data.size

    def __getitem__(self, asked: BatchRequest | NDArray[np.int64]) -> SequenceBatch:
        numbers = asked.samples if isinstance(asked, BatchRequest) else asked
        clips, told = [], []
        for number in numbers.tolist():
            if number < 0:
                clips.append(Clip(None))
                told.append(Told())
                continue
            pixels, text = _film(self.generator, self.name, number, self.frames, self.size)
            clips.append(Clip(torch.from_numpy(pixels), source=text))
            told.append(Told(text, video=number, name=number_of(text)))
        return self.rows.join(clips, told, torch.from_numpy(numbers.copy()))


def number_of(text: str) -> int:
    """63 bits that name a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
