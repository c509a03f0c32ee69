"""VideoCodes: videos that were made into whole numbers before, one a patch, as rows of tokens."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.base import SequenceData
from seqlong.datamodules.sampler import BatchRequest, permute
from seqlong.datamodules.video.listing import PARTS, Part, Video, divide, read_videos
from seqlong.datamodules.video.tars import span
from seqlong.errors import ConfigError, DataError

#: What a folder of codes says of itself: the number of codes, how they were made.
ABOUT = "codes.json"
_DTYPES = ("uint8", "uint16", "uint32")
_OPEN = 64  # mapped files that a process keeps
_KEPT = 8  # epochs whose order is remembered
_ORDER, _WINDOWS = 31, 32  # streams of random numbers

Positions = Literal["grid", "line"]


class CodesVocabulary:
    """Codes as tokens: token n is code n."""

    def __init__(self, size: int) -> None:
        self.size = size


class VideoCodes(SequenceData):
    """Rows of codes of videos: ``.npy`` files of uint8, uint16 or uint32, ``(time, height, width)`` or ``(n)``,
    memory-mapped. Each position predicts the next code of its video; picture by picture, line by line.

    Videos lie one after the other, in another order each epoch, and are cut every ``length`` positions: no padding, and
    every code but the last few of an epoch in one row, once. Videos in a row never see each other.

    Args:
        path: folder of .npy files (or of train, val and test folders that have them), or a .csv or .jsonl list: path,
            and split and group as far as they are known.
        codes: how many there are; null: what the folder's codes.json says, which seqlong video codes writes.
        length: positions in a row.
        batch_size: rows in a batch over all ranks.
        order: ``shuffle`` permutes the rows of an epoch; ``stream`` lets each row of a batch walk through video after
            video, for models that carry their state from batch to batch.
        positions: ``grid``: time, height and width of each code, for rope_axes; ``line``: counted along the row.
        validation: share of the videos to validate on, where the list does not say.
        test: share of the videos to test on, where the list does not say.
        group_pattern: regular expression; what its bracket finds in a file's name is the video's group, never parted.
        eval_length: positions in a row of evaluation; null is ``length``.
        eval_batch_size: rows in an evaluation batch over all ranks; null is ``batch_size``.
        seed: number that names the order of training.
        workers: loader processes of each rank.

    Raises:
        ConfigError: a setting is out of its range.
    """

    targets = "next"

    def __init__(
        self,
        path: str,
        codes: int | None = None,
        length: int = 8192,
        batch_size: int = 8,
        order: Literal["shuffle", "stream"] = "shuffle",
        positions: Positions = "grid",
        validation: float = 0.1,
        test: float = 0.1,
        group_pattern: str | None = None,
        eval_length: int | None = None,
        eval_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(length, batch_size, None, eval_length, eval_batch_size, seed, workers)
        if min(validation, test) < 0 or validation + test >= 1:
            raise ConfigError(f"validation {validation} and test {test} must be shares of less than 1 in all")
        if codes is not None and codes < 2:
            raise ConfigError(f"data.codes={codes} must be 2 or more, or null")
        self.path, self.order, self.positions, self._codes = path, order, positions, codes
        self.shares, self.group_pattern = (validation, test), group_pattern
        self._parts: dict[Part, list[Video]] | None = None

    @property
    def videos(self) -> dict[Part, list[Video]]:
        """The files of train, validation and test."""
        if self._parts is None:
            found = read_videos(self.path, self.group_pattern, (".npy",))
            self._parts = divide(found, *self.shares, self.seed)
            if not self._parts["train"]:
                raise DataError(f"{self.path}: none of its {len(found)} videos is for training")
        return self._parts

    @property
    def vocabulary(self) -> CodesVocabulary:
        """As many tokens as there are codes."""
        if self._codes is None:
            path = Path(self.path).expanduser()
            about = (path if path.is_dir() else path.parent) / ABOUT
            try:
                self._codes = int(json.loads(about.read_text())["codes"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{self.path}: how many codes there are is not known: {about} is not there, or does not say; set "
                    "data.codes"
                ) from error
        return CodesVocabulary(self._codes)

    def setup(self, stage: str) -> None:
        """See that every file can be read."""
        for part in PARTS:
            for video in self.videos[part]:
                open_codes(video.path)

    def describe(self) -> dict[str, object]:
        """Everything about the data that a reader of the results needs, JSON-able."""
        parts = self.videos
        counts = {part: sum(open_codes(video.path).size for video in parts[part]) for part in PARTS}
        return {
            "title": f"{self.path}: codes of {sum(map(len, parts.values())):,} videos",
            "codes": self.vocabulary.size,
            "stages": [{"length": self.length, "batch_size": self.batch_size, "steps": None}],
            "evaluation": {"length": self.eval_length, "rows": -(-counts["validation"] // self.eval_length)},
            "notes": [
                f"{len(parts[part])} videos of {counts[part]:,} codes to {verb}."
                for part, verb in zip(PARTS, ("train on", "validate", "test"), strict=True)
            ],
        }

    def floors(self) -> list[dict[str, object]]:
        """Bits of a code that is guessed, and by how often each comes up in training, on the validation videos."""
        size = self.vocabulary.size
        counts = np.ones(size)
        for video in self.videos["train"]:
            counts += np.bincount(_checked(video.path, open_codes(video.path).ravel(), size), minlength=size)
        nats, seen = 0.0, 0
        for video in self.videos["validation"]:
            asked = _checked(video.path, open_codes(video.path).ravel(), size)[1:]
            nats -= float(np.log(counts[asked] / counts.sum()).sum())
            seen += len(asked)
        found = [{"name": "chance", "bits": math.log2(size)}]
        return [*found, {"name": "frequency", "bits": nats / seen / math.log(2)}] if seen else found

    # --- loaders ---------------------------------------------------------------------------------------------------

    def training_batches(self) -> Dataset[SequenceBatch]:
        return _Training(self, self.videos["train"], self.length)

    def val_dataloader(self) -> DataLoader[SequenceBatch]:
        """The validation videos, one after the other."""
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader[SequenceBatch]:
        """The test videos, one after the other."""
        return self._evaluation("test")

    def _evaluation(self, part: Part) -> DataLoader[SequenceBatch]:
        if not self.videos[part]:
            raise DataError(f"{self.path}: no video is for {part}; raise data.{part}, or say so in the list")
        rows = _Evaluation(self, self.videos[part], self.eval_length)
        return self.evaluation_loader(rows, -(-rows.total // self.eval_length))


def open_codes(path: Path) -> NDArray[Any]:
    """The codes of a file, memory-mapped: ``(time, height, width)`` or ``(n)``.

    Raises:
        DataError: the file is no such array.
    """
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False) if path.is_file() else _in_tar(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no .npy file that can be read ({error})") from error
    if found.dtype.name not in _DTYPES or found.ndim not in (1, 3) or not found.size:
        raise DataError(
            f"{path}: holds {found.dtype} of shape {found.shape}; expected codes of {', '.join(_DTYPES)}, "
            "(time, height, width) or (n)"
        )
    return found


def _in_tar(path: Path) -> NDArray[Any]:
    """The array of a member of a tar, mapped where it lies."""
    tar, offset, _ = span(path)
    with tar.open("rb") as file:
        file.seek(offset)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, turned, kind = read(file)
        if kind.hasobject or turned:
            raise ValueError(f"{kind} in {'Fortran' if turned else 'C'} order")
        return np.memmap(tar, kind, "r", file.tell(), shape)


def _checked(path: Path, codes: NDArray[Any], size: int) -> NDArray[np.int64]:
    found = codes.astype(np.int64)
    if found.size and int(found.max()) >= size:
        raise DataError(f"{path}: has code {int(found.max())}, but data.codes={size} are 0 to {size - 1}")
    return found


class _Rows(Dataset[SequenceBatch]):
    """Windows of videos that lie one after the other."""

    def __init__(self, data: VideoCodes, videos: list[Video], length: int) -> None:
        self.paths, self.length, self.size = [video.path for video in videos], length, data.vocabulary.size
        self.grid, self.seed = data.positions == "grid", data.seed
        self.counts = np.array([open_codes(path).size for path in self.paths], dtype=np.int64)
        self.total = int(self.counts.sum())
        self._maps: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._orders: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict(), "_orders": OrderedDict()}

    def _map(self, video: int) -> NDArray[Any]:
        if video not in self._maps:
            self._maps[video] = open_codes(self.paths[video])
            while len(self._maps) > _OPEN:
                self._maps.popitem(last=False)
        return self._maps[video]

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Videos in the order of an epoch, and where each begins; as they are for -1."""
        if epoch not in self._orders:
            order = np.arange(len(self.counts))
            if epoch >= 0:
                order = permute(order, len(order), self.seed, _ORDER, epoch)
            self._orders[epoch] = order, np.concatenate([[0], np.cumsum(self.counts[order])])
            while len(self._orders) > _KEPT:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def fill(self, rows: list[tuple[int, int] | None], numbers: NDArray[np.int64]) -> SequenceBatch:
        """Rows of (epoch, window); None is a row that counts for nothing."""
        shape = len(rows), self.length
        tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1, dtype=torch.int64)
        ids, places = torch.zeros(shape, dtype=torch.int32), torch.zeros(*shape, 3, dtype=torch.int64)
        source, goes_on = [], []
        for row, asked in enumerate(rows):
            if asked is None:
                source.append("")
                goes_on.append(False)
                continue
            order, begins = self._order(asked[0])
            start = asked[1] * self.length
            stop, at = min(start + self.length, self.total), start
            first = int(np.searchsorted(begins, start, side="right")) - 1
            goes_on.append(start > int(begins[first]))
            for segment, turn in enumerate(range(first, len(order)), 1):
                if at >= stop:
                    break
                video, a = int(order[turn]), at - int(begins[turn])
                b = min(stop - int(begins[turn]), int(self.counts[video]))
                codes = self._map(video)
                flat = codes.reshape(-1)
                # One more than the row has: what the last position predicts.
                part = torch.from_numpy(_checked(self.paths[video], flat[a : b + 1], self.size))
                here = slice(at - start, at - start + b - a)
                tokens[row, here], ids[row, here] = part[: b - a], segment
                targets[row, here.start : here.start + len(part) - 1] = part[1:]
                steps = torch.arange(a, b)
                if codes.ndim == 3:
                    places[row, here, 0] = steps // (codes.shape[1] * codes.shape[2])
                    places[row, here, 1] = steps // codes.shape[2] % codes.shape[1]
                    places[row, here, 2] = steps % codes.shape[2]
                else:
                    places[row, here, 0] = steps
                if segment == 1:
                    source.append(f"{self.paths[video]}:{a}-{b}")
                at += b - a
        return SequenceBatch(
            tokens=tokens,
            targets=targets,
            segment_ids=None if bool((ids == 1).all()) else ids,
            positions=places if self.grid else None,
            continues=torch.tensor(goes_on),
            index=torch.from_numpy(numbers.copy()),
            source=source,
        )


class _Training(_Rows):
    def __init__(self, data: VideoCodes, videos: list[Video], length: int) -> None:
        super().__init__(data, videos, length)
        self.windows, self.stream = self.total // length, data.order == "stream"
        least = data.batch_size if self.stream else 1
        if self.windows < least:
            raise ConfigError(
                f"{data.path}: its {self.total:,} codes for training make {self.windows} rows of {length:,}, and "
                f"{least} or more are needed; set data.length lower"
            )

    def __getitem__(self, request: BatchRequest) -> SequenceBatch:
        batch = self.fill([self._place(int(sample), request.rows) for sample in request.samples], request.samples)
        if self.stream:
            share = self.windows // request.rows
            inside = torch.tensor([int(sample) // request.rows % share > 0 for sample in request.samples])
            batch.continues = batch.continues & inside  # type: ignore[operator]
        else:
            batch.continues = None
        return batch

    def _place(self, sample: int, rows: int) -> tuple[int, int]:
        """Epoch and window."""
        if not self.stream:
            epoch, window = divmod(sample, self.windows)
            return epoch, int(permute(window, self.windows, self.seed, _WINDOWS, epoch)[0])
        batch, row = divmod(sample, rows)
        share = self.windows // rows
        epoch, step = divmod(batch, share)
        return epoch, row * share + step


class _Evaluation(_Rows):
    def __getitem__(self, numbers: NDArray[np.int64]) -> SequenceBatch:
        batch = self.fill([(-1, int(number)) if number >= 0 else None for number in numbers], numbers)
        batch.continues = None
        return batch
