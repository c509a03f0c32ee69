"""VideoText: video files with texts, and DNA, as rows of patches, bases and bytes; resumable to the batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.sampler import Stage
from seqlong.datamodules.video.caption_data import number_of
from seqlong.datamodules.video.clips import Clip
from seqlong.datamodules.video.datamodule import EvaluationClips, TrainingClips, VideoData
from seqlong.datamodules.video.decode import Backend
from seqlong.datamodules.video.faults import Policy
from seqlong.datamodules.video.listing import PARTS, Part, Video
from seqlong.datamodules.video.multimodal import Kind, MultimodalVocabulary, Rows, Targets, Told
from seqlong.datamodules.video.sampling import Sampling
from seqlong.datamodules.video.tubelets import Tubelets
from seqlong.errors import DataError


class VideoText(VideoData):
    """Clips of video files and what is said of them, one row for each.

    Args:
        path: a .csv or .jsonl with ``path`` and ``text`` (and ``dna``, ``start``, ``end`` in seconds, ``split``,
            ``group``, as far as known), a line for each text: a video with five captions has five. Or a webdataset .tar
            whose samples have a .txt, or a .json with these names.
        sampling: which frames make a clip.
        size: pixels of a clip, or [height, width].
        tubelets: how clips are cut into patches.
        text_length: bytes of a text, at most; longer ones are cut.
        dna_length: bases, at most; 0 leaves DNA out.
        targets: ``next`` (causal_lm) or ``same`` (masked_text) token, in rows ``video, DNA, text``; ``pair``
            (video_text_matching): which text is of which video, in rows whose text does not see the video.
        losses: what is to be predicted: text, dna or both. All of a row is seen, whatever is predicted.
        batch_size: rows in a batch over all ranks.
        resize: pixels of the shorter side before cropping; null is the shorter side of ``size``.
        flip: probability that a training clip is mirrored; 0, since texts say left and right.
        transforms: of training clips, drawn once a clip: torchvision.transforms.v2, or any module on (n 3 h w) uint8.
        validation: share of the videos (by whole groups) to validate on, where the list does not say.
        test: share of the videos to test on, where the list does not say.
        group_pattern: regular expression; what its bracket finds in a file's name is the video's group, never parted.
        eval_batch_size: rows in an evaluation batch over all ranks; null is ``batch_size``.
        broken: what becomes of a video that does not decode: raise, skip or partial; counted and named.
        backend: pyav, torchcodec, or auto, which is pyav.
        threads: of a decoder; 1 is best with workers.
        seed: number that names everything random about the clips.
        workers: loader processes of each rank.

    Raises:
        ConfigError: a setting is out of its range.
    """

    vocabulary = MultimodalVocabulary()

    def __init__(
        self,
        path: str,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        size: int | list[int] = 112,
        tubelets: Tubelets = Tubelets(2, 16, 16),  # noqa: B008 (frozen)
        text_length: int = 256,
        dna_length: int = 0,
        targets: Targets = "next",
        losses: Sequence[Kind] = ("text",),
        batch_size: int = 8,
        resize: int | None = None,
        flip: float = 0.0,
        transforms: list[nn.Module] | None = None,
        validation: float = 0.1,
        test: float = 0.1,
        group_pattern: str | None = None,
        eval_batch_size: int | None = None,
        broken: Policy = "raise",
        backend: Backend = "auto",
        threads: int = 1,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(
            path, sampling, size, tubelets, batch_size, resize, flip, transforms, False, None, validation, test,
            group_pattern, "shuffle", 1, 1, eval_batch_size, broken, backend, threads, seed, workers,
        )  # fmt: skip
        self.rows = Rows(
            tubelets, tubelets.count(sampling.frames, *self.size), text_length, dna_length, targets, tuple(losses)
        )
        self.targets = targets
        self.stages = [Stage(self.rows.length, batch_size)]
        self.length = self.eval_length = self.rows.length

    @property
    def videos(self) -> dict[Part, list[Video]]:
        """The videos of train, validation and test, all of them with what is to be learnt.

        Raises:
            DataError: one has no text (or DNA, where that is all that is predicted).
        """
        if self._parts is None:
            parts = super().videos
            wanted = "text" if "text" in self.rows.losses else "dna"
            without = [video for part in PARTS for video in parts[part] if not getattr(video, wanted)]
            if without:
                self._parts, total = None, sum(map(len, parts.values()))
                first = min(without, key=lambda video: video.line)
                where = f" (line {first.line})" if first.line else ""
                raise DataError(
                    f"{self.path}: {len(without)} of {total} videos have no {wanted}, such as {first.path}{where}; a "
                    f"list needs a column '{wanted}', a tar a .txt or a .json with '{wanted}' for each video"
                )
        return super().videos

    def describe(self) -> dict[str, object]:
        """Everything about the data that a reader of the results needs, JSON-able."""
        said = super().describe()
        every = [video for videos in self.videos.values() for video in videos]
        cut = sum(len(video.text.encode()) > self.rows.text_length for video in every)
        notes = list(said["notes"])  # type: ignore[call-overload]
        notes.append(
            f"Texts as bytes, up to {self.rows.text_length}"
            + (f" ({cut} of {len(every)} are longer, and cut)" if cut else "")
            + (f"; DNA up to {self.rows.dna_length} bases" if self.rows.dna_length else "")
            + f". Predicted: {'which is of which video' if self.targets == 'pair' else ', '.join(self.rows.losses)}."
        )
        return said | {"notes": notes, "unit": "token" if self.targets == "pair" else "byte"}

    def floors(self) -> list[dict[str, object]]:
        """What can be had without the video, on the validation texts: a guess among the pairs of a batch; for texts
        bits of a byte by what stood before it in those of training (add one)."""
        if self.targets == "pair":
            among = min(self.batch_size, len(self.videos["validation"]))
            return [{"name": "chance", "bits": math.log2(among)}] if among > 1 else []
        trained, asked = ([self._bytes(video) for video in self.videos[part]] for part in ("train", "validation"))
        if self.targets != "next" or self.rows.losses != ("text",) or not asked:
            return []
        pairs = Counter(pair for ids in trained for pair in pairwise(ids))
        firsts = Counter(first for ids in trained for first in ids[:-1])
        bits = [
            -math.log2((pairs[pair] + 1) / (firsts[pair[0]] + self.vocabulary.size))
            for ids in asked
            for pair in pairwise(ids)
        ]
        return [{"name": "pairs of bytes", "bits": sum(bits) / len(bits)}]

    def _bytes(self, video: Video) -> list[int]:
        return [int(token) for kind, ids in self.rows.tokens(Told(video.text)) if kind == "text" for token in ids]

    def training_batches(self) -> Dataset[SequenceBatch]:
        return _TrainingPairs(self)

    def evaluation_batches(self, videos: list[Video]) -> Dataset[SequenceBatch]:
        return _EvaluationPairs(self, videos)


class _TrainingPairs(TrainingClips):
    def __init__(self, data: VideoText) -> None:
        super().__init__(data)
        self.rows = data.rows

    def join(
        self, clips: Sequence[Clip], videos: Sequence[Video | None], numbers: NDArray[np.int64], carried: bool = False
    ) -> SequenceBatch:
        return self.rows.join(clips, [_told(video) for video in videos], torch.from_numpy(numbers.copy()))


class _EvaluationPairs(EvaluationClips):
    def __init__(self, data: VideoText, videos: list[Video]) -> None:
        super().__init__(data, videos)
        self.rows = data.rows

    def join(
        self, clips: Sequence[Clip], videos: Sequence[Video | None], numbers: NDArray[np.int64], carried: bool = False
    ) -> SequenceBatch:
        return self.rows.join(clips, [_told(video) for video in videos], torch.from_numpy(numbers.copy()))


def _told(video: Video | None) -> Told:
    if video is None:
        return Told()
    stretch: Any = (str(video.path), video.start, video.end)
    return Told(video.text, video.dna, number_of(repr(stretch)), number_of(video.text))
