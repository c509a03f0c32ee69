"""AnnotationData: windows of a genome with a label for every base, from GFF3 or GTF."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.dna.annotation_files import BadLines
from seqlong.datamodules.dna.annotation_floor import base_label_floors
from seqlong.datamodules.dna.annotation_labels import BaseLabels
from seqlong.datamodules.dna.assemble import assemble
from seqlong.datamodules.dna.datamodule import GenomeData
from seqlong.datamodules.dna.splits import Split, Splitter
from seqlong.datamodules.dna.windows import EvaluationWindows, Rows
from seqlong.datamodules.sampler import BatchRequest, Stage
from seqlong.errors import DataError

Part = Literal["train", "validation", "test"]


class AnnotationData(GenomeData):
    """Windows of a genome and what each base is: coding, intron, splice site.

    Args:
        path: the genome: FASTA or GenBank, plain, gzip or bgzip; one file or several.
        annotation: GFF3 or GTF, plain, gzip or bgzip.
        labels: what to tell apart; where several fit a base, the first of the list wins. ``donor``, ``acceptor`` (two
            bases of an intron), ``CDS``, ``UTR``, ``exon`` and ``intron``, or any type of feature that the file has.
        stranded: whether each label is two, one for each strand; they are swapped where the other strand is read.
        rename: contigs of the annotation -> those of the genome, where they are not found by themselves.
        bad_lines: lines that cannot be read: ``error``, or ``skip``, which counts and names them.
        length: bases in a row, without ``stages``.
        batch_size: rows in a batch over all ranks, without ``stages``.
        stages: a length warm-up; see GenomeData.
        split: how train, validation and test are told apart; null is BlockSplit, one tenth each for the last two.
        reverse_complement: probability that a training window is read from the other strand, 0 to 1.
        circular: names of circular contigs, or ``all``.
        eval_length: bases in a row of evaluation; null is that of the last stage.
        eval_batch_size: rows in an evaluation batch over all ranks; null is that of the last stage.
        floors: whether to fit a regression on the letters around a base, to hold the scores against.
        seed: number that names the order, the strands and the shifts of training windows.
        workers: loader processes of each rank.
        cache_dir: folder of genome stores; null is $SEQLONG_CACHE or ~/.cache/seqlong.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(
        self,
        path: str | list[str],
        annotation: str,
        labels: list[str],
        stranded: bool = True,
        rename: dict[str, str] | None = None,
        bad_lines: BadLines = "error",
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
        self.targets = "label"  # type: ignore[assignment]
        self._with_floors = floors
        self._settings: dict[str, Any] = {
            "path": annotation, "labels": labels, "stranded": stranded, "renamed": rename, "bad_lines": bad_lines,
        }  # fmt: skip
        self._labels: BaseLabels | None = None
        self._counts: dict[str, NDArray[np.int64]] = {}

    @property
    def labels(self) -> BaseLabels:
        """Of all bases; read when first asked for."""
        if self._labels is None:
            self._labels = BaseLabels(self.genome, **self._settings)
        return self._labels

    @property
    def names(self) -> list[str]:
        """Of the labels, ``other`` first."""
        return self.labels.names

    @property
    def split(self) -> Split:
        """The regions of train, validation and test, on contigs that the annotation knows."""
        if self._split is None:
            found = self._splitter.split(self.genome)
            known = set(self.labels.contigs)
            regions = {name: [part for part in parts if part.contig in known] for name, parts in found.regions.items()}
            if not regions["train"]:
                raise DataError("no contig with features is left to train on; see data.split")
            self._split = Split(regions, found.how)
        return self._split

    def counts(self, part: Part) -> NDArray[np.int64]:
        """``(k)`` bases of each label in a split."""
        if part not in self._counts:
            self._counts[part] = self.labels.counts(self.split.regions[part])
            if part == "train" and (self._counts[part] > 0).sum() < 2:
                only = self.names[int(self._counts[part].argmax())]
                raise DataError(
                    f"{self.labels.path}: every base to train on is '{only}'; see data.labels and data.split"
                )
        return self._counts[part]

    @property
    def prior(self) -> list[float]:
        """The share of each label in training."""
        counts = self.counts("train")
        return [float(share) for share in counts / counts.sum()]

    def describe(self) -> dict[str, object]:
        """Everything about the data that a reader of the results needs, JSON-able."""
        parts: tuple[Part, ...] = ("train", "validation", "test")
        rows = [
            {"name": name, **{part: int(self.counts(part)[number]) for part in parts}}
            for number, name in enumerate(self.names)
        ]
        return super().describe() | {"tracks": rows, "annotation": str(self.labels.path), "bin": 1}

    def _notes(self) -> list[str]:
        return [
            "Where several labels fit a base, the first of data.labels wins: " + ", ".join(self.labels.labels) + ".",
            f"Training windows are reverse-complemented with probability {self.reverse_complement}, labels with them.",
            *self.labels.notes,
            *self._short_notes(10),
        ]

    def floors(self) -> list[dict[str, object]]:
        """Bits of a base's label without a neural network: see `base_label_floors`."""
        if self._floors is None:
            parts = {name: self.split.regions[name] for name in ("train", "validation", "test")}
            ready = self._with_floors and parts["validation"]
            self._floors = base_label_floors(self.labels, parts, np.array(self.prior)) if ready else []
        return self._floors

    def setup(self, stage: str) -> None:
        """Open all and split it; prints the split and the labels once, on rank 0."""
        printed = self._printed
        super().setup(stage)
        if stage == "predict" or printed:
            return
        prior = self.prior
        if self.trainer is None or self.trainer.is_global_zero:
            table = Table("label", "train", "", "validation", "test", title="Bases of each label")
            for number, name in enumerate(self.names):
                counts = [f"{self.counts(part)[number]:,}" for part in ("train", "validation", "test")]  # type: ignore[arg-type]
                table.add_row(name, counts[0], f"{100 * prior[number]:.2f} %", *counts[1:])
            console = Console()
            console.print(table)
            for note in self.labels.notes:
                console.print(note, markup=False, highlight=False)

    def training_batches(self) -> Dataset[SequenceBatch]:
        return _TrainingBatches(self)

    def predict_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every base of the test split once, or of validation where there is none. (`seqlong track` does contigs.)"""
        return self._evaluation_loader(self.evaluation_windows("test" if self.split.regions["test"] else "validation"))

    def _evaluation_loader(self, windows: EvaluationWindows) -> DataLoader[SequenceBatch]:
        return self.evaluation_loader(_EvaluationBatches(self, windows), windows.size)


class _TrainingBatches(Dataset[SequenceBatch]):
    def __init__(self, data: AnnotationData) -> None:
        self._labels, self._windows = data.labels, data.training_windows

    def __getitem__(self, request: BatchRequest) -> SequenceBatch:
        rows = self._windows[request.stage].rows(request)
        return _assembled(self._labels, rows, request.length, request.samples)


class _EvaluationBatches(Dataset[SequenceBatch]):
    def __init__(self, data: AnnotationData, windows: EvaluationWindows) -> None:
        self._labels, self._windows = data.labels, windows

    def __getitem__(self, numbers: NDArray[np.int64]) -> SequenceBatch:
        return _assembled(self._labels, self._windows.rows(numbers), self._windows.length, numbers)


def _assembled(labels: BaseLabels, rows: Rows, length: int, index: NDArray[np.int64]) -> SequenceBatch:
    """Bases, and their labels as targets; a row of number -1 has none."""
    targets = np.full((rows.count, length), -1, dtype=np.int64)
    for piece in rows.pieces:
        if index[piece.row] >= 0:
            found = labels.read(piece.contig, piece.start, piece.start + piece.length, piece.reverse)
            targets[piece.row, piece.offset : piece.offset + piece.length] = found
    batch = assemble(labels.genome, rows, length, "same", 1.0, index)
    return dataclasses.replace(batch, targets=torch.from_numpy(targets), loss_weight=None)


__all__ = ["AnnotationData"]
