"""TaggedGenomes: genomes of several species or domains in given shares, each row headed by a token that says which."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.dna.alphabet import BOS, DnaVocabulary, N
from seqlong.datamodules.dna.assemble import Targets, assemble
from seqlong.datamodules.dna.datamodule import GenomeData
from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.splits import NAMES, BlockSplit, Region, Split, Splitter
from seqlong.datamodules.dna.windows import EvaluationWindows, Piece, Rows, ShortRecords, TrainingWindows
from seqlong.datamodules.mixture import Mixture
from seqlong.datamodules.sampler import BatchRequest, Stage, coin
from seqlong.errors import ConfigError, DataError

_FIRST = N + 1  # the id of the first tag
_DROPPED = 83  # stream of random numbers


@dataclass(frozen=True)
class TaggedSource:
    """The genomes of a tag.

    Attributes:
        path: sequence file or files.
        weight: share of the training rows, of any sum; None goes by bases.
    """

    path: str | list[str]
    weight: float | None = None


class TaggedVocabulary(DnaVocabulary):
    """The tokens of DNA, and one for each tag: ids 9, 10, ...

    Args:
        tags: in order. More than 7 make the vocabulary larger than 16.
    """

    def __init__(self, tags: Sequence[str]) -> None:
        letters = [*DnaVocabulary.letters[:_FIRST], *(f"<{tag}>" for tag in tags)]
        letters += [f"<reserved-{number}>" for number in range(len(letters), DnaVocabulary.size)]
        self.letters, self.size = tuple(letters), len(letters)


class TaggedGenomes(GenomeData):
    """Windows of several genomes, each headed by the token of its tag (or ``<bos>``, where tags are left out).

    A causal row of t positions is the tag and ``t - 1`` bases, and predicts t bases, the first from the tag alone. In a
    masked row the tag stands in place of the first base. Records packed into one row have a tag each.

    Args:
        genomes: tag -> path and weight: {ecoli: {path: e.fa.gz, weight: 1}, human: {path: [x.fa, y.fa], weight: 3}}.
        tag_dropout: share of training rows that are headed by ``<bos>`` instead, so that the model can do without.
        length: positions in a row, without ``stages``.
        batch_size: rows in a batch over all ranks, without ``stages``.
        stages: a length warm-up; see GenomeData.
        targets: ``next`` for causal models, ``same`` for masked ones.
        split: how train, validation and test are told apart; null is BlockSplit of each tag by itself, one tenth each
            for the last two.
        reverse_complement: probability that a training window is read from the other strand, 0 to 1.
        soft_mask_weight: weight of a lower-case base in the training loss.
        short_records: regions shorter than a window: ``pack``, ``pad``, ``skip`` or ``error``.
        circular: names of circular contigs, or ``all``.
        eval_length: positions in a row of evaluation; null is that of the last stage.
        eval_batch_size: rows in an evaluation batch over all ranks; null is that of the last stage.
        seed: number that names the order, the strands and the shifts of training windows.
        workers: loader processes of each rank.
        cache_dir: folder of genome stores; null is $SEQLONG_CACHE or ~/.cache/seqlong.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(
        self,
        genomes: dict[str, TaggedSource],
        tag_dropout: float = 0.1,
        length: int = 8192,
        batch_size: int = 8,
        stages: list[Stage] | None = None,
        targets: Targets = "next",
        split: Splitter | None = None,
        reverse_complement: float = 0.5,
        soft_mask_weight: float = 0.1,
        short_records: ShortRecords = "pack",
        circular: list[str] | Literal["all"] | None = None,
        eval_length: int | None = None,
        eval_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        if not genomes:
            raise ConfigError("data.genomes is empty; expected tags with files: {ecoli: {path: e.fa.gz}}")
        if not 0 <= tag_dropout <= 1:
            raise ConfigError(f"data.tag_dropout is {tag_dropout}; expected a share from 0 to 1")
        files = {tag: [source.path] if isinstance(source.path, str) else source.path for tag, source in genomes.items()}
        super().__init__(
            [path for paths in files.values() for path in paths], length, batch_size, stages, targets, split, "shuffle",
            reverse_complement, soft_mask_weight, short_records, circular, eval_length, eval_batch_size, seed, workers,
            cache_dir,
        )  # fmt: skip
        self._apart = split is None
        weights = [source.weight for source in genomes.values()]
        if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
            raise ConfigError("data.genomes: some tags have a weight and some have none; give all of them one, or none")
        self.tags, self.tag_dropout = list(genomes), tag_dropout
        self._weights = weights
        self._files = [len(paths) for paths in files.values()]
        self.vocabulary = TaggedVocabulary(self.tags)
        self._mixed: list[MixedWindows] | None = None

    @property
    def owner(self) -> NDArray[np.int64]:
        """The tag of each contig, by number."""
        stores = np.repeat(np.arange(len(self.tags)), self._files)
        return np.repeat(stores, [len(store.contigs) for store in self.genome.stores])

    @property
    def split(self) -> Split:
        """The regions of train, validation and test; without a setting, each tag has its own, however small it is."""
        if self._split is None and self._apart:
            regions: dict[str, list[Region]] = {name: [] for name in NAMES}
            store = first = 0
            for count in self._files:
                own = Genome(self.genome.stores[store : store + count])
                for name, found in BlockSplit().split(own).regions.items():
                    regions[name] += [region._replace(contig=region.contig + first) for region in found]
                store, first = store + count, first + len(own.contigs)
            self._split = Split(regions, {"kind": "by blocks, each tag by itself", "validation": 0.1, "test": 0.1})
        return super().split

    @property
    def tag_ids(self) -> dict[str, int]:
        """Tag -> its token."""
        return {tag: _FIRST + number for number, tag in enumerate(self.tags)}

    @property
    def mixed_windows(self) -> list[MixedWindows]:
        """The training windows of each stage, in the shares of the tags."""
        if self._mixed is None:
            by_tag: list[list[TrainingWindows]] = []
            owner, regions = self.owner, self.split.regions["train"]
            for number, tag in enumerate(self.tags):
                own = [region for region in regions if owner[region.contig] == number]
                if not own:
                    raise DataError(f"tag '{tag}' has no training regions; see data.split")
                by_tag.append(
                    [
                        TrainingWindows(
                            self.genome, own, stage.length, self.short_records, "shuffle", self.reverse_complement,
                            self.seed, place,
                        )
                        for place, stage in enumerate(self.stages)
                    ]
                )  # fmt: skip
            self._mixed = []
            for place in range(len(self.stages)):
                several = [windows[place] for windows in by_tag]
                sizes = [float(windows.size) for windows in several]
                weights = [own or 0.0 for own in self._weights] if self._weights[0] is not None else sizes
                self._mixed.append(MixedWindows(several, Mixture(weights, self.seed, place)))
        return self._mixed

    def describe(self) -> dict[str, object]:
        """Everything about the data that a reader of the results needs, JSON-able."""
        return super().describe() | {"tags": self.tag_ids}

    def _notes(self) -> list[str]:
        shares = self.mixed_windows[-1].mixture.counts / self.mixed_windows[-1].mixture.counts.sum()
        listed = ", ".join(f"{tag} {100 * share:.1f} %" for tag, share in zip(self.tags, shares, strict=True))
        return [
            f"Rows are headed by the token of their tag, {100 * self.tag_dropout:.0f} % of training rows by <bos>.",
            f"Shares of training rows: {listed}.",
            *super()._notes(),
        ]

    def setup(self, stage: str) -> None:
        """Open the genomes and split them."""
        super().setup(stage)
        if stage == "fit":
            _ = self.mixed_windows

    def training_batches(self) -> Dataset[SequenceBatch]:
        return _TrainingBatches(self)

    def _evaluation_loader(self, windows: EvaluationWindows) -> DataLoader[SequenceBatch]:
        return self.evaluation_loader(_EvaluationBatches(self, windows), windows.size)


class MixedWindows:
    """Windows of several sources in given shares: a pure function of the request, as each of them is.

    Args:
        sources: windows of each.
        mixture: which rows are whose.
    """

    def __init__(self, sources: Sequence[TrainingWindows], mixture: Mixture) -> None:
        self.sources, self.mixture = sources, mixture

    def rows(self, request: BatchRequest) -> Rows:
        """The pieces that fill the rows of ``request``."""
        source, number = self.mixture.assign(request.samples - request.first)
        pieces: list[Piece] = []
        for one, windows in enumerate(self.sources):
            here = np.flatnonzero(source == one)
            if len(here):
                own = dataclasses.replace(request, samples=number[here] + request.first)
                pieces += [piece._replace(row=int(here[piece.row])) for piece in windows.rows(own).pieces]
        pieces.sort(key=lambda piece: (piece.row, piece.offset))
        return Rows(pieces, len(request.samples))


class _TrainingBatches(Dataset[SequenceBatch]):
    def __init__(self, data: TaggedGenomes) -> None:
        self._genome, self._windows, self._owner = data.genome, data.mixed_windows, data.owner
        self._targets, self._weight = data.targets, data.soft_mask_weight
        self._dropout, self._seed = data.tag_dropout, data.seed

    def __getitem__(self, request: BatchRequest) -> SequenceBatch:
        rows = self._windows[request.stage].rows(request)
        dropped = coin(self._dropout, self._seed, _DROPPED, request.samples)
        return tagged(
            self._genome, rows, request.length, self._targets, self._weight, request.samples, self._owner, dropped
        )


class _EvaluationBatches(Dataset[SequenceBatch]):
    def __init__(self, data: TaggedGenomes, windows: EvaluationWindows) -> None:
        self._genome, self._windows, self._owner, self._targets = data.genome, windows, data.owner, data.targets

    def __getitem__(self, numbers: NDArray[np.int64]) -> SequenceBatch:
        rows = self._windows.rows(numbers)
        nowhere = np.zeros(len(numbers), dtype=bool)
        return tagged(self._genome, rows, self._windows.length, self._targets, 1.0, numbers, self._owner, nowhere)


def tagged(
    genome: Genome,
    rows: Rows,
    length: int,
    targets: Targets,
    soft_mask_weight: float,
    index: NDArray[np.int64],
    owner: NDArray[np.int64],
    dropped: NDArray[np.bool_],
) -> SequenceBatch:
    """The batch of ``rows``, each of its segments headed by a tag; see ``TaggedGenomes`` and ``assemble``."""
    batch = assemble(genome, rows, length, "same", soft_mask_weight, index)
    assert batch.tokens is not None and batch.targets is not None and batch.loss_weight is not None
    tokens = batch.tokens
    if targets == "next":  # targets are the bases; each is read one place later
        tokens = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
        if batch.segment_ids is not None:
            tokens[batch.segment_ids == 0] = 0
    for piece in rows.pieces:
        tokens[piece.row, piece.offset] = BOS if dropped[piece.row] else _FIRST + int(owner[piece.contig])
        if targets == "same":
            batch.targets[piece.row, piece.offset] = -1
            batch.loss_weight[piece.row, piece.offset] = 0
    batch.tokens = tokens
    return batch
