"""GenomeData: windows of a genome for Lightning, resumable to the batch on any number of ranks and workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.base import SequenceData
from seqlong.datamodules.dna.alphabet import DnaVocabulary
from seqlong.datamodules.dna.assemble import Targets, assemble
from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.markov import markov_floor
from seqlong.datamodules.dna.proteins import ProteinSettings, ReverseTranslation
from seqlong.datamodules.dna.splits import BlockSplit, Region, Split, Splitter
from seqlong.datamodules.dna.token_rows import assemble_tokens, in_frame, token_notes
from seqlong.datamodules.dna.tokens import DnaTokenizer, TokenizerSettings, build_tokenizer
from seqlong.datamodules.dna.windows import EvaluationWindows, Order, ShortRecords, TrainingWindows
from seqlong.datamodules.sampler import BatchRequest, Stage
from seqlong.errors import ConfigError

#: Bases that tell how many of them a learnt token has.
_SAMPLE = 1 << 16


class GenomeData(SequenceData):
    """Windows of one or several genomes.

    Training is endless: give the Trainer ``max_steps``, ``val_check_interval`` in batches and
    ``use_distributed_sampler: false``. Which windows make up batch number n depends on nothing but the settings here.

    Args:
        path: sequence file or files: FASTA, FASTQ, GenBank or EMBL, plain, gzip or bgzip. ``ecoli`` is the embedded
            E. coli K-12.
        length: positions in a row, without ``stages``.
        batch_size: rows in a batch over all ranks, without ``stages``.
        stages: a length warm-up: a list of {length, batch_size, steps}, steps being optimizer steps; the last lasts on.
            It takes the place of ``length`` and ``batch_size``.
        targets: what a position predicts: ``next`` for causal models, ``same`` for masked ones.
        split: how train, validation and test are told apart; null is BlockSplit, one tenth each for the last two.
        order: ``shuffle`` permutes the windows of an epoch; ``stream`` lets each row walk along the genome, for
            models that carry their state from batch to batch.
        reverse_complement: probability that a training window is read from the other strand, 0 to 1.
        soft_mask_weight: weight of a lower-case (repeat) base in the training loss, 0 or more; evaluation weighs all
            known bases alike.
        short_records: what to do with regions shorter than a window: ``pack`` several to a row, ``pad`` one to a row,
            ``skip`` them (reported), or ``error``.
        circular: names of circular contigs, or ``all``, beside those that GenBank or the embedded genome say are.
        eval_length: positions in a row of evaluation; null is that of the last stage.
        eval_batch_size: rows in an evaluation batch over all ranks; null is that of the last stage.
        seed: number that names the order, the strands and the shifts of training windows.
        workers: loader processes of each rank. 0 is right where making a batch is short beside a step, as it mostly is.
        cache_dir: folder of genome stores; null is $SEQLONG_CACHE or ~/.cache/seqlong.
        tokenizer: what a position is: a base, a word of k bases, a codon, or a learnt piece (BPE); null is a base.
        protein: the files hold proteins (FASTA): how their residues become codons; null: they hold bases.

    Raises:
        ConfigError: a setting is out of its range.
    """

    vocabulary: DnaVocabulary | DnaTokenizer = DnaVocabulary()

    def __init__(
        self,
        path: str | list[str] = "ecoli",
        length: int = 8192,
        batch_size: int = 8,
        stages: list[Stage] | None = None,
        targets: Targets = "next",
        split: Splitter | None = None,
        order: Order = "shuffle",
        reverse_complement: float = 0.5,
        soft_mask_weight: float = 0.1,
        short_records: ShortRecords = "pack",
        circular: list[str] | Literal["all"] | None = None,
        eval_length: int | None = None,
        eval_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 0,
        cache_dir: str | None = None,
        tokenizer: TokenizerSettings | None = None,
        protein: ProteinSettings | None = None,
    ) -> None:
        super().__init__(length, batch_size, stages, eval_length, eval_batch_size, seed, workers)
        if not 0 <= reverse_complement <= 1:
            raise ConfigError(f"reverse_complement is {reverse_complement}; expected a probability from 0 to 1")
        if soft_mask_weight < 0:
            raise ConfigError(f"soft_mask_weight {soft_mask_weight} must be 0 or more")
        self.path = path
        self.targets, self.order, self.short_records = targets, order, short_records
        self.reverse_complement, self.soft_mask_weight = reverse_complement, soft_mask_weight
        self._splitter = split if split is not None else BlockSplit()
        self._circular: Sequence[str] | Literal["all"] = circular if circular is not None else ()
        self._cache_dir = cache_dir
        self._genome: Genome | None = None
        self._split: Split | None = None
        self._training: list[TrainingWindows] | None = None
        self._floors: list[dict[str, object]] | None = None
        self._ratio: float | None = None
        self._printed = False
        self._protein = None if protein is None else ReverseTranslation(protein)
        self.tokenizer = None if tokenizer is None else build_tokenizer(tokenizer)
        if self.tokenizer is not None:
            self.vocabulary = self.tokenizer
            if self.tokenizer.span is None and order == "stream":
                raise ConfigError(
                    f"data.order=stream goes on where the row before ended, but rows of {self.tokenizer.name} end in "
                    "padding; set data.order=shuffle, or data.tokenizer.kind=kmer"
                )

    # What it holds

    @property
    def genome(self) -> Genome:
        """All contigs, opened (and indexed, the first time ever) when first asked for."""
        if self._genome is None:
            self._genome = Genome.open(self.path, self._cache_dir, self._circular, self._protein)
        return self._genome

    @property
    def split(self) -> Split:
        """The regions of train, validation and test."""
        if self._split is None:
            self._split = self._splitter.split(self.genome)
        return self._split

    @property
    def training_windows(self) -> list[TrainingWindows]:
        """The windows of each training stage."""
        if self._training is None:
            self._training = [
                TrainingWindows(
                    self.genome,
                    self.regions("train"),
                    self.window(stage.length),
                    self.short_records,
                    self.order,
                    self.reverse_complement,
                    self.seed,
                    number,
                    self.tokenizer.frame if self.tokenizer else 1,
                )
                for number, stage in enumerate(self.stages)
            ]
        return self._training

    def regions(self, part: Literal["train", "validation", "test"]) -> list[Region]:
        """The regions of a split, from where tokens of their contig may begin."""
        return in_frame(list(self.split.regions[part]), self.tokenizer.frame if self.tokenizer else 1)

    def window(self, positions: int) -> int:
        """Bases in a row of so many positions; where tokens differ in bases, on average."""
        return max(1, int(positions * self.bases_per_token))

    @property
    def bases_per_token(self) -> float:
        """Bases from one position to the next; where they differ, the mean over the first of the training regions."""
        if self.tokenizer is None or self.tokenizer.span is not None:
            return 1.0 if self.tokenizer is None else float(self.tokenizer.stride)
        if self._ratio is None:
            bases = tokens = 0
            for contig, start, stop in self.split.regions["train"]:
                part = self.genome.read(contig, start, min(stop, start + _SAMPLE - bases))
                bases, tokens = bases + part.size, tokens + self.tokenizer.tokens(part).size
                if bases >= _SAMPLE:
                    break
            self._ratio = bases / max(tokens, 1)
        return self._ratio

    def check_strands(self, pairs: Sequence[int]) -> None:
        """Raise ConfigError unless ``pairs`` are the complements of these tokens, as a model that turns them needs."""
        if self.tokenizer is not None:
            self.tokenizer.check_strands(pairs)

    def evaluation_windows(self, split: Literal["validation", "test"]) -> EvaluationWindows:
        """The rows that evaluate ``split``."""
        length = self.window(self.eval_length)
        return EvaluationWindows(self.genome, self.regions(split), length, self.short_records, split)

    def describe(self) -> dict[str, object]:
        """Everything about the data that a reader of the results needs, JSON-able."""
        genome = self.genome
        sources = [
            {
                "path": str(store.path),
                "digest": store.digest,
                "contigs": len(store.contigs),
                "bases": store.bases,
                "unknown": sum(contig.unknown for contig in store.contigs),
                "soft_masked": sum(contig.soft_masked for contig in store.contigs),
                "records": [
                    {"name": contig.name, "length": contig.length, "digest": contig.digest, "circular": contig.circular}
                    for contig in store.contigs
                ],
            }
            for store in genome.stores
        ]
        stages = [
            {
                "length": stage.length,
                "batch_size": stage.batch_size,
                "steps": stage.steps if number < len(self.stages) - 1 else None,
                "windows_per_epoch": windows.size,
            }
            for number, (stage, windows) in enumerate(zip(self.stages, self.training_windows, strict=True))
        ]
        names = ", ".join(store.path.name for store in genome.stores)
        return {
            "title": f"{names}: {genome.bases:,} bases in {len(genome.contigs):,} contigs",
            "sources": sources,
            "split": self.split.describe(genome),
            "stages": stages,
            "evaluation": {"length": self.eval_length, "batch_size": self.eval_batch_size},
            "notes": self._notes(),
            **self._tokens(),
        }

    def _tokens(self) -> dict[str, object]:
        if self.tokenizer is None:
            return {}
        said = {"name": self.tokenizer.name, "size": self.tokenizer.size, "bases": round(self.bases_per_token, 4)}
        return {"unit": self.tokenizer.unit, "tokenizer": said}

    def _notes(self) -> list[str]:
        notes = [
            "Unknown bases (N and other IUPAC codes) are read as N and never predicted: loss weight 0.",
            f"Soft-masked (lower-case) bases weigh {self.soft_mask_weight} in the training loss. Evaluation counts "
            "every known base once, with weight 1.",
            f"Training windows are reverse-complemented with probability {self.reverse_complement}. Evaluation reads "
            "the forward strand.",
        ]
        if self._protein is not None:
            notes.append(f"Proteins are written as codons: {self._protein.settings}.")
        if self.tokenizer is not None:
            notes += token_notes(self.tokenizer, self.genome, self.split.regions, self.targets)
        if self.targets == "next":
            notes.append("The first base of a region has nothing before it and is not predicted.")
        rings = [contig.name for contig in self.genome.contigs if contig.circular]
        if rings:
            shown = ", ".join(rings[:10]) + (f" and {len(rings) - 10:,} more" if len(rings) > 10 else "")
            notes.append(f"Circular, so that windows wrap round: {shown}.")
        return notes + self._short_notes(10)

    def _short_notes(self, shown: int) -> list[str]:
        """What became of regions shorter than a window, each split in a sentence."""
        found = [("train", windows.length, windows.short) for windows in self.training_windows]
        for name in ("validation", "test"):
            if self.split.regions[name]:  # type: ignore[index]
                found.append((name, self.window(self.eval_length), self.evaluation_windows(name).short))  # type: ignore[arg-type]
        return [short.note(name, length, shown) for name, length, short in found if short.regions]

    def floors(self) -> list[dict[str, object]]:
        """Bits per position that need no neural network, on the validation split: see `markov_floor`. A token that
        brings n new bases costs n times the bits of a base."""
        if self._floors is None:
            bases = self.bases_per_token
            self._floors = [{"name": "uniform", "bits": 2.0 * bases}]
            if self.split.regions["validation"]:
                floor = markov_floor(self.genome, self.split.regions["train"], self.split.regions["validation"])
                self._floors.append(
                    {
                        "name": f"markov-{floor.order}",
                        "bits": floor.bits * bases,
                        "order": floor.order,
                        "bases": floor.bases,
                        "by_order": [bits * bases for bits in floor.by_order],
                    }
                )
        return self._floors

    # Lightning's hooks

    def prepare_data(self) -> None:
        """Index the genome, in one process of each node."""
        _ = self.genome

    def setup(self, stage: str) -> None:
        """Open the genome and split it; prints the split once, on rank 0."""
        _ = self.genome
        if stage == "predict":
            return
        first = self.trainer is None or self.trainer.is_global_zero
        if stage == "fit":
            _ = self.training_windows  # bad settings should say so before the model is built
        if first and not self._printed:
            self._printed = True
            console = Console()
            console.print(self.split.table(self.genome))
            for note in self._short_notes(3):
                console.print(note, markup=False, highlight=False)

    def training_batches(self) -> Dataset[SequenceBatch]:
        return _TrainingBatches(self)

    def val_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every base of the validation split once."""
        return self._evaluation_loader(self.evaluation_windows("validation"))

    def test_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every base of the test split once.

        Raises:
            DataError: the test split has no regions.
        """
        return self._evaluation_loader(self.evaluation_windows("test"))

    def predict_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every base of the genome once, in genome order but for the ends of contigs, which come last."""
        regions = [Region(number, 0, contig.length) for number, contig in enumerate(self.genome.contigs)]
        windows = EvaluationWindows(
            self.genome, regions, self.window(self.eval_length), self.short_records, "predict", shuffle=False
        )
        return self._evaluation_loader(windows)

    def _evaluation_loader(self, windows: EvaluationWindows) -> DataLoader[SequenceBatch]:
        return self.evaluation_loader(_EvaluationBatches(self, windows), windows.size)


class _TrainingBatches(Dataset[SequenceBatch]):
    def __init__(self, data: GenomeData) -> None:
        self._genome, self._windows = data.genome, data.training_windows
        self._targets, self._soft_mask_weight = data.targets, data.soft_mask_weight
        self._tokenizer = data.tokenizer

    def __getitem__(self, request: BatchRequest) -> SequenceBatch:
        rows = self._windows[request.stage].rows(request)
        if self._tokenizer is not None:
            return assemble_tokens(
                self._genome, rows, request.length, self._tokenizer, self._targets, self._soft_mask_weight,
                request.samples,
            )  # fmt: skip
        return assemble(self._genome, rows, request.length, self._targets, self._soft_mask_weight, request.samples)


class _EvaluationBatches(Dataset[SequenceBatch]):
    def __init__(self, data: GenomeData, windows: EvaluationWindows) -> None:
        self._genome, self._windows, self._targets = data.genome, windows, data.targets
        self._tokenizer, self._length = data.tokenizer, data.eval_length

    def __getitem__(self, numbers: NDArray[np.int64]) -> SequenceBatch:
        if self._tokenizer is not None:
            rows = self._windows.rows(numbers)
            return assemble_tokens(self._genome, rows, self._length, self._tokenizer, self._targets, 1.0, numbers)
        return assemble(self._genome, self._windows.rows(numbers), self._windows.length, self._targets, 1.0, numbers)
