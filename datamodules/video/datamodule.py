"""VideoData: clips of video files for Lightning, resumable to the batch on any number of ranks and workers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.base import SequenceData
from seqlong.datamodules.sampler import BatchRequest, mix, permute
from seqlong.datamodules.video.clips import Clip, join
from seqlong.datamodules.video.decode import Backend
from seqlong.datamodules.video.faults import Faults, Policy
from seqlong.datamodules.video.index import DecodeError, read_index
from seqlong.datamodules.video.listing import PARTS, Part, Video, classes_of, divide, read_videos
from seqlong.datamodules.video.reading import Reader, check_size
from seqlong.datamodules.video.sampling import Sampling
from seqlong.datamodules.video.tubelets import Tubelets
from seqlong.datamodules.video.values import ValueNames, Values, with_values
from seqlong.errors import ConfigError, DataError

_PLACE, _DOWN, _ACROSS, _FLIP, _AUGMENT = range(5)  # what is drawn of a clip


class VideoData(SequenceData):
    """Clips of video files, as rows of patches.

    Args:
        path: folder with a folder for each class (or train, val and test folders that have them); a webdataset .tar or
            a folder of them (``0001.mp4`` with ``0001.json``); or a .csv or .jsonl list: path, and label, start, end,
            split, group as far as they are known.
        sampling: which frames make a clip.
        size: pixels of a clip, or [height, width].
        tubelets: how clips are cut into patches.
        batch_size: clips in a batch over all ranks.
        resize: pixels of the shorter side before cropping; null is the shorter side of ``size``.
        flip: probability that a training clip is mirrored.
        transforms: of training clips, drawn once a clip: torchvision.transforms.v2, or any module on (n 3 h w) uint8.
        labels: whether labels are wanted. False for tasks on pixels alone: then videos need none.
        values: numbers in place of classes. ``label``: labels are numbers; else a folder with a .npy vector for each
            video (``cat/a.mp4.npy`` for ``cat/a.mp4``), such as another model's features, to be learnt from it.
        validation: share of the videos (by class, by whole groups) to validate on, where the list does not say.
        test: share of the videos to test on, where the list does not say.
        group_pattern: regular expression; what its bracket finds in a file's name is the video's group, which is never
            parted: ``_(g\\d+)_`` for UCF101. Else the list's column group, else the file.
        order: ``shuffle`` draws clips; ``stream`` lets each row of a batch walk through video after video without gaps,
            for models that carry their state from batch to batch.
        eval_clips: clips of a video in evaluation, whose predictions are averaged.
        eval_crops: crops of each, along the longer side: 1 or 3.
        eval_batch_size: clips in an evaluation batch over all ranks; null is ``batch_size``.
        broken: what becomes of a video that does not decode. ``raise`` stops; ``skip`` counts it for nothing;
            ``partial`` takes the frames before the fault. Both are counted and named at the end of every epoch.
        backend: pyav, torchcodec, or auto, which is pyav.
        threads: of a decoder; 1 is best with workers.
        seed: number that names everything random about the clips.
        workers: loader processes of each rank. Decoding is work: as many as there are cores to spare.

    Raises:
        ConfigError: a setting is out of its range.
    """

    targets = "label"

    def __init__(
        self,
        path: str,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        size: int | list[int] = 112,
        tubelets: Tubelets = Tubelets(2, 16, 16),  # noqa: B008 (frozen)
        batch_size: int = 8,
        resize: int | None = None,
        flip: float = 0.5,
        transforms: list[nn.Module] | None = None,
        labels: bool = True,
        values: str | None = None,
        validation: float = 0.1,
        test: float = 0.1,
        group_pattern: str | None = None,
        order: Literal["shuffle", "stream"] = "shuffle",
        eval_clips: int = 1,
        eval_crops: Literal[1, 3] = 1,
        eval_batch_size: int | None = None,
        broken: Policy = "raise",
        backend: Backend = "auto",
        threads: int = 1,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        height, width = check_size(size)
        super().__init__(tubelets.count(sampling.frames, height, width), batch_size, None, None, eval_batch_size, seed,
                         workers)  # fmt: skip
        if not 0 <= flip <= 1 or min(validation, test) < 0 or validation + test >= 1:
            raise ConfigError(
                f"flip {flip} must be a probability, and validation {validation} and test {test} shares of less than 1 "
                "in all"
            )
        if eval_clips < 1 or threads < 1 or (resize is not None and resize < 1):
            raise ConfigError(f"eval_clips {eval_clips}, threads {threads} and resize {resize} must be 1 or more")
        if order == "stream" and tubelets.order != "space":
            raise ConfigError("order stream needs tubelets.order=space: time must go on from row to row")
        if order == "stream" and sampling.frames % tubelets.time:
            raise ConfigError(f"order stream: {sampling.frames} frames do not divide into patches of {tubelets.time}")
        self.path, self.sampling, self.tubelets = path, sampling, tubelets
        self.flip, self.transforms, self.labels = flip, list(transforms or []), labels
        self.shares, self.group_pattern, self.order = (validation, test), group_pattern, order
        root = Path(path).expanduser()
        self.values = None if values is None else Values(values, root if root.is_dir() else root.parent)
        self._value_names: ValueNames | None = None
        self.eval_clips, self.eval_crops = eval_clips, eval_crops
        self.views = eval_clips * eval_crops
        self.size = (height, width)
        self.reader = Reader(self.size, min(height, width) if resize is None else resize, broken, backend, threads)
        self._parts: dict[Part, list[Video]] | None = None
        self._names: list[str] = []
        self._faults: dict[str, Faults] = {}
        self._streams: _Streams | None = None
        self._printed = False

    # --- what it holds ---------------------------------------------------------------------------------------------

    @property
    def videos(self) -> dict[Part, list[Video]]:
        """The videos of train, validation and test."""
        if self._parts is None:
            found = read_videos(self.path, self.group_pattern)
            self._names = classes_of(found, self.path) if self.labels and self.values is None else []
            self._parts = divide(found, *self.shares, self.seed)
            if not self._parts["train"]:
                raise DataError(f"{self.path}: none of its {len(found)} videos is for training")
            lacking = set(self._names) - {video.label for video in self._parts["train"]}
            if lacking:
                raise DataError(f"{self.path}: no video of {', '.join(sorted(lacking)[:5])} is for training")
        return self._parts

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; a label is a place in this list."""
        _ = self.videos
        return self._names

    @property
    def classes(self) -> int:
        """How many classes, or values, there are."""
        return len(self.class_names) if self.values is None else len(self.label_names.names)

    @property
    def kind(self) -> Literal["class", "value"]:
        """What labels are."""
        return "class" if self.values is None else "value"

    @property
    def label_names(self) -> ValueNames:
        """What values are called, and how they are spread in training."""
        assert self.values is not None
        if self._value_names is None:
            self._value_names = self.values.names(self.videos["train"])
        return self._value_names

    def setup(self, stage: str) -> None:
        """List the videos, and see where their streams are cut; prints what was found once, on rank 0."""
        parts = self.videos
        first = self.trainer is None or self.trainer.is_global_zero
        if stage == "fit" and self.order == "stream" and self._streams is None:
            self._streams = _Streams.measure(parts["train"], self.sampling, self.reader, self.seed, quiet=not first)
        if first and not self._printed:
            self._printed = True
            table = Table("videos", *PARTS, title=f"{self.path}")
            counts = {part: Counter(video.label for video in videos) for part, videos in parts.items()}
            for name in self._names[:10]:
                table.add_row(name, *(str(counts[part][name]) for part in PARTS))
            if len(self._names) > 10:
                table.add_row(f"and {len(self._names) - 10} more classes", *("" for _ in PARTS))
            table.add_row("all", *(str(len(parts[part])) for part in PARTS))
            Console().print(table)

    def describe(self) -> dict[str, object]:
        """Everything about the data that a reader of the results needs, JSON-able."""
        parts = self.videos
        kind = self.sampling
        rate = "the file's own rate" if kind.fps is None else f"{kind.fps:g} frames a second"
        return {
            "title": f"{self.path}: {sum(map(len, parts.values())):,} videos"
            + (f" of {self.classes} classes" if self._names else ""),
            "classes": self._names,
            "stages": [{"length": self.length, "batch_size": self.batch_size, "steps": None}],
            "evaluation": {"length": self.eval_length, "rows": len(parts["validation"]) * self.views},
            "notes": [
                f"{len(parts['train'])} videos to train on, {len(parts['validation'])} to validate, "
                f"{len(parts['test'])} to test; videos of one group are in one part.",
                f"Clips of {kind.frames} frames ({kind.kind}"
                + ("" if kind.kind == "spread" else f", {rate}")
                + f"), {self.size[0]} x {self.size[1]} pixels; patches of {self.tubelets.time} x "
                f"{self.tubelets.height} x {self.tubelets.width}. Evaluation: {self.eval_clips} clips "
                f"x {self.eval_crops} crops of each video.",
                f"A video that does not decode: {self.reader.policy}.",
            ],
        }

    def floors(self) -> list[dict[str, object]]:
        """Bits of a label that is guessed by how often each class is trained on, on the validation videos."""
        if not self._names:  # values, or no labels
            return []
        trained = Counter(video.label for video in self.videos["train"])
        asked = [video.label for video in self.videos["validation"]]
        if not asked:
            return []
        bits = -sum(math.log2(trained[label] / trained.total()) for label in asked) / len(asked)
        return [{"name": "class frequency", "bits": bits}]

    # --- loaders ---------------------------------------------------------------------------------------------------

    def training_batches(self) -> Dataset[SequenceBatch]:
        if self.order == "stream" and self._streams is None:
            self.setup("fit")
        return TrainingClips(self)

    def val_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every clip and crop of the validation videos."""
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every clip and crop of the test videos."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every clip and crop of all videos, in the order of the list."""
        return self._evaluation("predict")

    def _evaluation(self, part: Literal["validation", "test", "predict"]) -> DataLoader[SequenceBatch]:
        videos = read_videos(self.path) if part == "predict" else self.videos[part]
        if not videos:
            raise DataError(f"{self.path}: no video is for {part}; raise data.{part}, or say so in the list")
        self._faults[part] = Faults(part, -(-len(videos) * self.views // self._place()[1]))
        return self.evaluation_loader(self.evaluation_batches(videos), len(videos) * self.views)

    def evaluation_batches(self, videos: list[Video]) -> Dataset[SequenceBatch]:
        """What turns numbers of views of some videos into batches."""
        return EvaluationClips(self, videos)

    def on_before_batch_transfer(self, batch: SequenceBatch, dataloader_idx: int) -> SequenceBatch:
        """Count what could not be read."""
        trainer = self.trainer
        part = "train" if trainer is None or trainer.training else "test" if trainer.testing else "validation"
        part = "predict" if trainer is not None and trainer.predicting else part
        if part not in self._faults:
            self._faults[part] = Faults(part, -(-len(self.videos["train"]) // self._place()[1]))
        self._faults[part].see(batch)
        return batch

    def teardown(self, stage: str) -> None:
        """Tell what could not be read since the last full epoch."""
        for faults in self._faults.values():
            faults.tell()


class _Rows:
    """What a loader's process needs of a VideoData."""

    def __init__(self, data: VideoData) -> None:
        self.sampling, self.tubelets, self.reader = data.sampling, data.tubelets, data.reader
        self.length, self.seed = data.length, data.seed
        self.labels = {name: number for number, name in enumerate(data.class_names)}
        self.values = data.values
        self.outputs = data.classes

    def label(self, video: Video) -> int:
        return self.labels.get(video.label, -1) if self.labels else -1

    def join(
        self, clips: Sequence[Clip], videos: Sequence[Video | None], numbers: NDArray[np.int64], carried: bool = False
    ) -> SequenceBatch:
        batch = join(clips, torch.from_numpy(numbers.copy()), self.tubelets, self.length, carried)
        if self.values is None:
            return batch
        nothing = np.full(self.outputs, math.nan, dtype=np.float32)
        known = [nothing if video is None else self.values(video) for video in videos]
        return with_values(batch, torch.from_numpy(np.stack(known)))


class TrainingClips(_Rows, Dataset[SequenceBatch]):
    """Batches to train on, by what a sampler asks for."""

    def __init__(self, data: VideoData) -> None:
        super().__init__(data)
        self.videos, self.streams = data.videos["train"], data._streams
        self.flip, self.transforms = data.flip, data.transforms

    def __getitem__(self, request: BatchRequest) -> SequenceBatch:
        made = [self._clip(int(sample), request) for sample in request.samples]
        clips, videos = [clip for clip, _ in made], [video for _, video in made]
        return self.join(clips, videos, request.samples, carried=self.streams is not None)

    def _clip(self, sample: int, request: BatchRequest) -> tuple[Clip, Video]:
        draws = (mix(self.seed, sample, np.arange(5)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        if self.streams is not None:
            return self._streamed(sample, request)
        epoch, place = divmod(sample, len(self.videos))
        video = self.videos[int(permute(place, len(self.videos), self.seed, epoch)[0])]

        def numbers(index: Any) -> NDArray[np.int64]:
            return self.sampling.frame_numbers(index, video.start, video.end, draws[_PLACE], draws[_PLACE])

        clip = self.reader.clip(
            video, self.label(video), numbers, (draws[_DOWN], draws[_ACROSS]), bool(draws[_FLIP] < self.flip),
            self.transforms, int(draws[_AUGMENT] * 2**31),
        )  # fmt: skip
        return clip, video

    def _streamed(self, sample: int, request: BatchRequest) -> tuple[Clip, Video]:
        assert self.streams is not None
        which, number, follows, seen = self.streams.place(sample, request.rows)
        video = self.videos[which]
        clip = self.reader.clip(
            video,
            self.label(video),
            lambda index: self.sampling.following(index, number, video.start, video.end),
            (0.5, 0.5),
            bool(mix(self.seed, seen, which)[0] & np.uint64(1)) and self.flip > 0,
        )
        clip.first, clip.continues = number * self.sampling.frames, follows
        return clip, video


class EvaluationClips(_Rows, Dataset[SequenceBatch]):
    """Batches to measure with, by numbers of views; a negative one is a row that counts for nothing."""

    def __init__(self, data: VideoData, videos: list[Video]) -> None:
        super().__init__(data)
        self.videos, self.clips, self.crops = videos, data.eval_clips, data.eval_crops

    def __getitem__(self, numbers: NDArray[np.int64]) -> SequenceBatch:
        of = [self.videos[int(number) // (self.clips * self.crops)] if number >= 0 else None for number in numbers]
        return self.join([self._clip(int(number)) for number in numbers], of, numbers)

    def _clip(self, number: int) -> Clip:
        if number < 0:
            return Clip(None)
        which, view = divmod(number, self.clips * self.crops)
        clip, crop = divmod(view, self.crops)
        video = self.videos[which]
        place = 0.5 if self.clips == 1 else clip / (self.clips - 1)
        jitter = (clip + 0.5) / self.clips
        across = 0.5 if self.crops == 1 else crop / 2

        def numbers(index: Any) -> NDArray[np.int64]:
            return self.sampling.frame_numbers(index, video.start, video.end, place, jitter)

        # The room of a crop is along the longer side; along the other there is none.
        return self.reader.clip(video, self.label(video), numbers, (across, across), False)


class _Streams:
    """Rows that walk through video after video: clip j of an epoch's row r is clip ``r * rows' share + j`` of all."""

    def __init__(self, counts: NDArray[np.int64], seed: int) -> None:
        self.counts, self.seed = counts, seed
        self._epoch: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    @staticmethod
    def measure(videos: list[Video], sampling: Sampling, reader: Reader, seed: int, quiet: bool) -> _Streams:
        """Count the clips of every video, from its packets."""
        console = Console(stderr=True)
        counts = []
        for video in track(
            videos, "measuring", console=console, disable=quiet or not console.is_terminal, transient=True
        ):
            try:
                counts.append(sampling.clips_in(read_index(video.path), video.start, video.end))
            except DecodeError:
                if reader.policy == "raise":
                    raise
                counts.append(1)  # it is named when its turn comes
        return _Streams(np.array(counts, dtype=np.int64), seed)

    def place(self, sample: int, rows: int) -> tuple[int, int, bool, int]:
        """Video, clip of it, whether it goes on from the batch before, and the epoch, of a sample.

        Raises:
            ConfigError: fewer clips than rows.
        """
        share = int(self.counts.sum()) // rows
        if not share:
            raise ConfigError(
                f"order stream needs a clip for each of {rows} rows, but all videos have {self.counts.sum()}"
            )
        batch, row = divmod(sample, rows)
        epoch, step = divmod(batch, share)
        if self._epoch is None or self._epoch[0] != epoch:
            order = permute(np.arange(len(self.counts)), len(self.counts), self.seed, epoch)
            self._epoch = epoch, order, np.concatenate([[0], np.cumsum(self.counts[order])])
        _, order, ends = self._epoch
        clip = row * share + step
        at = int(np.searchsorted(ends, clip, side="right")) - 1
        number = clip - int(ends[at])
        return int(order[at]), number, number > 0 and step > 0, epoch
