"""TrackData: windows of a genome with the signals measured along it, binned."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.dna.assemble import assemble
from seqlong.datamodules.dna.datamodule import GenomeData
from seqlong.datamodules.dna.splits import Split, Splitter
from seqlong.datamodules.dna.tracks_floor import track_floors
from seqlong.datamodules.dna.tracks_values import Missing, Squash, Summary, Survey, Tracks, survey
from seqlong.datamodules.dna.windows import EvaluationWindows, Rows
from seqlong.datamodules.sampler import BatchRequest, Stage
from seqlong.errors import ConfigError, DataError
from seqlong.tracks import TrackBatch


class TrackData(GenomeData):
    """Windows of a genome and what was measured along them: coverage, accessibility, insertions, methylation.

    Args:
        path: the genome: FASTA or GenBank, plain, gzip or bgzip; one file or several.
        tracks: bigWig, bedGraph, wig, or tables of positions (contig, position from 1, values); a list, or names with
            files. All but bigWig also gzip.
        bin: bases of a bin; 1 predicts every base. ``length`` is a multiple of it.
        summary: of the values of a bin's bases: ``mean``, ``sum`` or ``max``.
        missing: bases without a value: ``mask`` leaves them out, ``zero`` takes them for 0 (coverage files that do not
            write zeros).
        power: values of bins are raised to this, above 0 and up to 1; Borzoi has 0.75.
        clip: above this (after ``power``) only the square root counts; null for no clip, Borzoi has 384.
        pairs: pairs of tracks that are one signal on the two strands, as [[plus, minus]]; they are swapped where a
            window is read from the other strand. Other tracks are only turned.
        rename: contigs of the track files -> those of the genome, where they are not found by themselves.
        length: bases in a row, without ``stages``.
        batch_size: rows in a batch over all ranks, without ``stages``.
        stages: a length warm-up; see GenomeData.
        split: how train, validation and test are told apart; null is BlockSplit, one tenth each for the last two.
        reverse_complement: probability that a training window is read from the other strand, 0 to 1.
        circular: names of circular contigs, or ``all``.
        eval_length: bases in a row of evaluation; null is that of the last stage.
        eval_batch_size: rows in an evaluation batch over all ranks; null is that of the last stage.
        floors: whether to fit a regression on local composition, to hold the scores against.
        seed: number that names the order, the strands and the shifts of training windows.
        workers: loader processes of each rank.
        cache_dir: folder of genome stores; null is $SEQLONG_CACHE or ~/.cache/seqlong.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(
        self,
        path: str | list[str],
        tracks: str | list[str] | dict[str, str],
        bin: int = 1,
        summary: Summary = "mean",
        missing: Missing = "mask",
        power: float = 1.0,
        clip: float | None = None,
        pairs: list[list[str]] | None = None,
        rename: dict[str, str] | None = None,
        length: int = 8192,
        batch_size: int = 8,
        stages: list[Stage] | None = None,
        split: Splitter | None = None,
        reverse_complement: float = 0.5,
        circular: list[str] | Literal["all"] | None = None,
        eval_length: int | None = None,
        eval_batch_size: int | None = None,
        floors: bool = True,
        seed: int = 0,
        workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            path, length, batch_size, stages, "same", split, "shuffle", reverse_complement, 1.0, "pack", circular,
            eval_length, eval_batch_size, seed, workers, cache_dir,
        )  # fmt: skip
        self.targets = "track"  # type: ignore[assignment]
        if bin < 1:
            raise ConfigError(f"data.bin is {bin}; expected 1 base or more")
        for size in (*(stage.length for stage in self.stages), self.eval_length):
            if size % bin:
                raise ConfigError(
                    f"rows of {size:,} bases are no whole number of bins of {bin:,}; try data.length="
                    f"{max(1, size // bin) * bin}"
                )
        self.bin, self._with_floors = bin, floors
        self._settings: dict[str, Any] = {
            "files": [tracks] if isinstance(tracks, str) else tracks,
            "size": bin,
            "summary": summary,
            "missing": missing,
            "squash": Squash(power, clip),
            "pairs": pairs or [],
            "renamed": rename or {},
        }
        self._tracks: Tracks | None = None
        self._surveys: dict[str, Survey] = {}

    # What it holds

    @property
    def tracks(self) -> Tracks:
        """The signals, checked against the genome when first asked for."""
        if self._tracks is None:
            self._tracks = Tracks(self.genome, **self._settings)
        return self._tracks

    @property
    def names(self) -> list[str]:
        """Of the tracks."""
        return self.tracks.names

    @property
    def swap(self) -> list[int]:
        """For each track the one that it is on the other strand."""
        return [int(number) for number in self.tracks.swap]

    @property
    def lowest(self) -> tuple[float, str]:
        """The smallest value of all, and where it stands."""
        found = self.tracks.lowest.lowest
        return found.value, found.where

    @property
    def split(self) -> Split:
        """The regions of train, validation and test, from bin to bin, on contigs that have values."""
        if self._split is None:
            found = self._splitter.split(self.genome)
            regions = {name: self.tracks.aligned(parts) for name, parts in found.regions.items()}
            if not regions["train"]:
                raise DataError("no contig with values is left to train on; see data.split")
            self._split = Split(regions, {**found.how, "bin": self.bin})
        return self._split

    def survey(self, part: Literal["train", "validation", "test"]) -> Survey:
        """What the tracks hold in a split.

        Raises:
            DataError: a track has no values, or nothing but zeros, in training.
        """
        if part not in self._surveys:
            found = self._surveys[part] = survey(self.tracks, self.split.regions[part])
            if part == "train":
                for number, name in enumerate(self.names):
                    path = self.tracks.signals[number].path
                    if not found.known[number]:
                        raise DataError(f"{path}: track '{name}' has no value in the training regions; see data.split")
                    if found.largest[number] <= 0 and found.mean[number] == 0:
                        raise DataError(
                            f"{path}: track '{name}' is 0 throughout the training regions: nothing to learn"
                        )
        return self._surveys[part]

    @property
    def scale(self) -> list[float]:
        """The mean of each track in training."""
        return [float(abs(value)) or 1.0 for value in self.survey("train").mean]

    def describe(self) -> dict[str, object]:
        """Everything about the data that a reader of the results needs, JSON-able."""
        said = super().describe()
        rows = []
        for number, name in enumerate(self.names):
            row: dict[str, object] = {"name": name, "path": str(self.tracks.signals[number].path)}
            for part in ("train", "validation", "test"):
                found = self.survey(part)  # type: ignore[arg-type]
                row[part] = {"bins": int(found.known[number]), "mean": float(found.mean[number]),
                             "zero": float(found.zero[number])}  # fmt: skip
            rows.append(row)
        return said | {"tracks": rows, "bin": self.bin, "swap": self.swap}

    def _notes(self) -> list[str]:
        squash, settings = self.tracks.squash, self._settings
        shape = f"raised to {squash.power}" if squash.power != 1 else "as they are"
        if squash.clip is not None:
            shape += f", above {squash.clip} only their square root"
        return [
            f"Values are the {settings['summary']} of {self.bin:,} bases, {shape}; bases without a value "
            + ("are left out." if settings["missing"] == "mask" else "count as 0."),
            f"Training windows are reverse-complemented with probability {self.reverse_complement}, tracks turned with "
            "them.",
            *self.tracks.notes,
            *self._short_notes(10),
        ]

    def floors(self) -> list[dict[str, object]]:
        """Half the deviance of each bin, in bits, without a neural network: see `track_floors`."""
        if self._floors is None:
            parts = {name: self.split.regions[name] for name in ("train", "validation", "test")}  # type: ignore[index]
            ready = self._with_floors and parts["validation"] and self.lowest[0] >= 0
            self._floors = track_floors(self.tracks, parts, self.scale) if ready else []
        return self._floors

    # Lightning's hooks

    def prepare_data(self) -> None:
        """Index the genome, in one process of each node."""
        _ = self.genome

    def setup(self, stage: str) -> None:
        """Open all and split it; prints the split and the tracks once, on rank 0."""
        printed = self._printed
        super().setup(stage)
        if stage == "predict" or printed:
            return
        found = self.survey("train")
        if self.trainer is None or self.trainer.is_global_zero:
            table = Table(title=f"Tracks, bins of {self.bin:,}")
            for column in ("track", "bins to train on", "mean", "largest", "zero"):
                table.add_column(column, justify="left" if column == "track" else "right")
            for number, name in enumerate(self.names):
                zero = f"{100 * found.zero[number]:.1f} %"
                mean, largest = f"{found.mean[number]:.4g}", f"{found.largest[number]:.4g}"
                table.add_row(name, f"{found.known[number]:,}", mean, largest, zero)
            console = Console()
            console.print(table)
            for note in self.tracks.notes:
                console.print(note, markup=False, highlight=False)

    def training_batches(self) -> Dataset[SequenceBatch]:
        return _TrainingBatches(self)

    def predict_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every base of the test split once, or of validation where there is none. (`seqlong track` does contigs.)"""
        part: Literal["validation", "test"] = "test" if self.split.regions["test"] else "validation"
        return self._evaluation_loader(self.evaluation_windows(part))

    def _evaluation_loader(self, windows: EvaluationWindows) -> DataLoader[SequenceBatch]:
        return self.evaluation_loader(_EvaluationBatches(self, windows), windows.size)


class _TrainingBatches(Dataset[SequenceBatch]):
    def __init__(self, data: TrackData) -> None:
        self._tracks, self._windows = data.tracks, data.training_windows

    def __getitem__(self, request: BatchRequest) -> SequenceBatch:
        rows = self._windows[request.stage].rows(request)
        return _assembled(self._tracks, rows, request.length, request.samples)


class _EvaluationBatches(Dataset[SequenceBatch]):
    def __init__(self, data: TrackData, windows: EvaluationWindows) -> None:
        self._tracks, self._windows = data.tracks, windows

    def __getitem__(self, numbers: NDArray[np.int64]) -> SequenceBatch:
        return _assembled(self._tracks, self._windows.rows(numbers), self._windows.length, numbers)


def _assembled(tracks: Tracks, rows: Rows, length: int, index: NDArray[np.int64]) -> TrackBatch:
    """Bases and bins of rows; a row of number -1 has no values."""
    batch = assemble(tracks.genome, rows, length, "same", 1.0, index)
    values = np.full((rows.count, length // tracks.size, len(tracks.names)), np.nan, dtype=np.float32)
    for piece in rows.pieces:
        if index[piece.row] < 0:
            continue
        found = tracks.bins(piece.contig, piece.start, piece.start + piece.length, piece.reverse)
        first = piece.offset // tracks.size
        values[piece.row, first : first + len(found)] = found
    return TrackBatch(
        tokens=batch.tokens,
        segment_ids=batch.segment_ids,
        index=batch.index,
        source=batch.source,
        tracks=torch.from_numpy(values),
    )


__all__ = ["TrackData"]
