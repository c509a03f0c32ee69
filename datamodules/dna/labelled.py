"""LabelledData: labelled sequences of any length for Lightning, with a leakage report and floors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.base import SequenceData
from seqlong.datamodules.dna.alphabet import DnaVocabulary
from seqlong.datamodules.dna.cache import atomic_write, default_cache_dir
from seqlong.datamodules.dna.label_floors import Part, label_floors
from seqlong.datamodules.dna.label_kinds import Kind, Labels, counts, learn_labels
from seqlong.datamodules.dna.label_rows import (
    EvaluationRows,
    Long,
    TrainingRows,
    check_lengths,
    check_tokens,
    parts_of,
)
from seqlong.datamodules.dna.label_split import ends_held_out, folds_of, hold_out
from seqlong.datamodules.dna.leakage import Leakage, find_leakage
from seqlong.datamodules.dna.proteins import ProteinSettings, ReverseTranslation
from seqlong.datamodules.dna.records import Bad, Records, read_records, unknown_letters
from seqlong.datamodules.dna.tokens import DnaTokenizer, TokenizerSettings, build_tokenizer
from seqlong.errors import ConfigError, DataError

Files = str | list[str] | None

#: Parts of cut records that the linear models are fitted to, at least, as far as overlap gives them.
_PARTS = 2_000


class LabelledData(SequenceData):
    """Labelled sequences: one label (or several, or values) each.

    Training is endless: give the Trainer ``max_steps``, ``val_check_interval`` in batches and
    ``use_distributed_sampler: false``. Which records make up batch number n depends on nothing but the settings here.

    Args:
        train: file or files to train on: CSV, TSV, Parquet, JSON lines, FASTA (label in the header) or GenBank.
        validation: the same for validation; null holds some of ``train`` out.
        test: the same for the test; null: none, unless ``folds`` or ``tail`` make one.
        sequence: name or number (from 0) of the column with the sequence; null finds it.
        label: name or number of the label's column, or a list of several; for FASTA the number of a word of the header,
            ``file``, or a regular expression with one group; null finds it.
        labels: what labels are: a ``class``, several of them (``multilabel``), or a ``value``.
        separator: between the labels of a cell, for ``multilabel``.
        bad: what to do with a record without label, without bases or with illegal letters: ``error``, or ``drop``.
        validation_share: share of training records that is held out where ``validation`` is null, from each class
            alike; records with the same bases on either strand stay together.
        folds: cut ``train`` into so many parts, of which number ``fold`` is the test (cross-validation).
        fold: number of the part that is the test, from 0.
        tail: hold out the last such share of every record as the test, and ``validation_share`` before it: for genomes
            that are cut into windows (``long=crop``).
        length: longest row, bases; null is the longest record.
        long: what to do with longer records: ``error``; or ``crop``: training reads a random part of ``length``,
            another each time, and evaluation every part of ``length``.
        rows: ``pad``: a record a row, those of like length together; ``pack``: several to a row of ``length``.
        batch_size: rows in a batch over all ranks.
        unseen: which records of evaluation are left out of the ``unseen`` scores: the ``exact`` ones, whose bases or
            whose other strand are in training; or the ``near`` ones too, half of whose 31-mers are.
        eval_batch_size: rows in an evaluation batch over all ranks; null is ``batch_size``.
        seed: number that names the order of training and the split.
        workers: loader processes of each rank.
        floors: whether to fit the linear models that scores are held against.
        cache_dir: folder where floors are kept; null is $SEQLONG_CACHE or ~/.cache/seqlong.
        tokenizer: what a position is: a base, a word of k bases, a codon, or a learnt piece (BPE); null is a base.
            Lengths stay in bases.
        protein: the sequences are proteins: how their residues become codons; null: they are bases.

    Raises:
        ConfigError: a setting is out of its range, or contradicts another.
    """

    vocabulary: DnaVocabulary | DnaTokenizer = DnaVocabulary()
    targets = "label"

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        sequence: str | int | None = None,
        label: str | int | list[str] | list[int] | None = None,
        labels: Kind = "class",
        separator: str = ";",
        bad: Bad = "error",
        validation_share: float = 0.1,
        folds: int | None = None,
        fold: int = 0,
        tail: float | None = None,
        length: int | None = None,
        long: Long = "error",
        rows: Literal["pad", "pack"] = "pad",
        batch_size: int = 32,
        unseen: Literal["exact", "near"] = "near",
        eval_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 0,
        floors: bool = True,
        cache_dir: str | None = None,
        tokenizer: TokenizerSettings | None = None,
        protein: ProteinSettings | None = None,
    ) -> None:
        super().__init__(length or 1, batch_size, None, None, eval_batch_size, seed, workers)
        given = [name for name, value in (("test", test), ("folds", folds), ("tail", tail)) if value is not None]
        if len(given) > 1:
            raise ConfigError(f"data.{given[0]} and data.{given[1]} both say what the test is; give one")
        if folds is not None and not 0 <= fold < folds:
            raise ConfigError(f"data.fold={fold} is not one of the {folds} folds, 0 to {folds - 1}")
        if validation is not None and (folds or tail):
            raise ConfigError(f"data.validation cannot be given with data.{given[0]}, which takes it out of data.train")
        if not 0 < validation_share <= 0.5:
            raise ConfigError(f"data.validation_share={validation_share} must be more than 0 and at most 0.5")
        if long == "crop" and length is None:
            raise ConfigError("data.long=crop needs data.length, the bases of a part")
        if rows == "pack" and length is None:
            raise ConfigError("data.rows=pack needs data.length, the bases of a row")
        self._files = {"train": train, "validation": validation, "test": test}
        self._columns = (sequence, label)
        self.kind, self.separator, self.bad = labels, separator, bad
        self.validation_share, self.folds, self.fold, self.tail = validation_share, folds, fold, tail
        self.wanted_length, self.long, self.rows = length, long, rows
        self.unseen, self._with_floors = unseen, floors
        self._cache = Path(cache_dir) if cache_dir else default_cache_dir()
        self._parts: dict[str, Records] | None = None
        self._labels: Labels | None = None
        self._encoded: dict[str, NDArray[np.int64] | NDArray[np.float32]] = {}
        self._leaks: dict[str, Leakage] = {}
        self._floors: list[dict[str, object]] | None = None
        self._printed = False
        self._protein = None if protein is None else ReverseTranslation(protein)
        self.tokenizer = None if tokenizer is None else build_tokenizer(tokenizer)
        if self.tokenizer is not None:
            self.vocabulary = self.tokenizer

    # --- what it holds -------------------------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, Records]:
        """The records of ``train``, ``validation`` and, if there is one, ``test``; read when first asked for."""
        if self._parts is None:
            self._parts = self._read()
            longest = max(int(part.lengths.max()) for part in self._parts.values())
            self.length = self.eval_length = self.wanted_length or longest
            for part in self._parts.values():
                check_lengths(part, self.length, self.long)
                if self.tokenizer is not None:
                    check_tokens(part, self.length, self.long, self.tokenizer)
        return self._parts

    def _read(self) -> dict[str, Records]:
        sequence, label = self._columns
        files = {part: paths for part, paths in self._files.items() if paths is not None}
        parts = {
            part: read_records(paths, sequence, label, self.bad, protein=self._protein) for part, paths in files.items()
        }
        if self.folds is not None:
            whole = parts["train"]
            fold = folds_of(whole, self.folds, self.seed)
            parts["test"] = whole.take(np.flatnonzero(fold == self.fold))
            parts["train"] = whole.take(np.flatnonzero(fold != self.fold))
        if self.tail is not None:
            parts["train"], parts["test"] = ends_held_out(parts["train"], self.tail)
            parts["train"], parts["validation"] = ends_held_out(parts["train"], self.validation_share)
        if "validation" not in parts:
            whole = parts["train"]
            held = hold_out(whole, self.validation_share, self.seed)
            parts["validation"] = whole.take(np.flatnonzero(held))
            parts["train"] = whole.take(np.flatnonzero(~held))
        for part, records in parts.items():
            if not len(records):
                raise DataError(
                    f"{self._files['train']}: no records are left for {part}; give it a file: data.{part}=FILE"
                )
        return parts

    @property
    def label_names(self) -> Labels:
        """What the labels of training are."""
        if self._labels is None:
            columns = self._columns[1] if isinstance(self._columns[1], list) else None
            names = [str(column) for column in columns] if columns else None
            self._labels = learn_labels(self.parts["train"], self.kind, self.separator, names)
        return self._labels

    @property
    def classes(self) -> int:
        """Classes, labels or values a record: what a model must put out."""
        return len(self.label_names.names)

    def encoded(self, part: str) -> NDArray[np.int64] | NDArray[np.float32]:
        """Labels of a split, ``(n y)``."""
        if part not in self._encoded:
            self._encoded[part] = self.label_names.encode(self.parts[part])
        return self._encoded[part]

    def leakage(self, part: str) -> Leakage:
        """What of a split is in training."""
        if part not in self._leaks:
            self._leaks[part] = find_leakage(self.parts["train"], self.parts[part])
        return self._leaks[part]

    def seen(self, part: str) -> NDArray[np.bool_]:
        """Which records of a split are left out of the unseen scores."""
        return self.leakage(part).seen(self.unseen == "near")

    def floors(self) -> list[dict[str, object]]:
        """Scores of linear models; see ``label_floors``. Kept on disk. Nothing where ``floors`` is false. Records that
        are cut into parts are cut for these too, those of training into parts that overlap where they would be few."""
        if not self._with_floors:
            return []
        if self._floors is None:
            parts = {}
            for name, records in self.parts.items():
                seen = None if name == "train" else self.seen(name)
                cut, which = records, np.arange(len(records))
                if self.long == "crop":
                    cut, which = parts_of(records, self.length, _PARTS if name == "train" else 0)
                parts[name] = Part(cut, self.encoded(name)[which], None if seen is None else seen[which])
            path = self._cache / f"label-floors-{self._digest()}.json"
            if path.is_file():
                self._floors = json.loads(path.read_text())
            else:
                self._floors = label_floors(self.label_names, parts["train"], parts["validation"], parts.get("test"))
                self._cache.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as file:
                    file.write(json.dumps(self._floors).encode())
        assert self._floors is not None
        return self._floors

    def _digest(self) -> str:
        cut = self.length if self.long == "crop" else None
        made = hashlib.sha256(repr((2, self.kind, self.unseen, self.label_names.names, cut)).encode())
        for name, part in self.parts.items():
            made.update(name.encode() + self.encoded(name).tobytes() + part.lengths.tobytes())
            for number in range(len(part)):
                made.update(part.sequence(number).tobytes())
        return made.hexdigest()[:24]

    def check_strands(self, pairs: Sequence[int]) -> None:
        """Raise ConfigError unless ``pairs`` are the complements of these tokens, and words fill every record."""
        if self.tokenizer is None:
            return
        self.tokenizer.check_strands(pairs)
        for part in self.parts.values():
            odd = np.flatnonzero(np.minimum(part.lengths, self.length) % self.tokenizer.stride)
            if odd.size:
                raise ConfigError(
                    f"{part.where(int(odd[0]))}: {int(part.lengths[odd[0]])} bases are no whole number of "
                    f"{self.tokenizer.name}, so that the other strand has other words ({odd.size:,} such records); set "
                    "task.rc=none, or data.tokenizer.overlap=true"
                )

    # --- what it says --------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, object]:
        """Everything about the data that a reader of the results needs, JSON-able."""
        parts = self.parts
        files = sorted({(str(path)) for part in parts.values() for path in part.paths})
        leaks = {name: self.leakage(name).describe() for name in parts if name != "train"}
        return {
            "title": f"{', '.join(Path(path).name for path in files[:4])}: {len(parts['train']):,} labelled records",
            "labels": self.label_names.describe(),
            "counts": {name: counts(self.label_names, self.encoded(name)) for name in parts},
            "parts": {
                name: {
                    "records": len(part),
                    "bases": int(part.lengths.sum()),
                    "shortest": int(part.lengths.min()),
                    "longest": int(part.lengths.max()),
                    "files": [_file(path) for path in part.paths],
                }
                for name, part in parts.items()
            },
            "leakage": leaks,
            "stages": [{"length": self.length, "batch_size": self.batch_size, "steps": None}],
            "evaluation": {"length": self.eval_length, "batch_size": self.eval_batch_size},
            "notes": self._notes(),
        }

    def _notes(self) -> list[str]:
        notes = []
        for name, part in self.parts.items():
            said = ", ".join(
                f"{label} {many:,}" for label, many in list(counts(self.label_names, self.encoded(name)).items())[:20]
            )
            notes.append(f"{name}: {len(part):,} records of {part.lengths.min():,} to {part.lengths.max():,} bases"
                         f"{'; ' + said if said else ''}.")  # fmt: skip
            if part.dropped:
                notes.append(f"{name}: {len(part.dropped):,} records were dropped; the first: {part.dropped[0]}.")
        for name in self.parts:
            if name == "train":
                continue
            leak = self.leakage(name).describe()
            if leak["exact"] or leak["reverse_complement"] or leak["near"]:
                notes.append(
                    f"Of {leak['records']:,} {name} records, {leak['exact']:,} are in training letter by letter, "
                    f"{leak['reverse_complement']:,} as the other strand, {leak['near']:,} nearly (half of their "
                    "31-mers). Scores called unseen leave "
                    f"{'all of these' if self.unseen == 'near' else 'the first two'} out."
                )
            else:
                notes.append(f"No {name} record is in training, on either strand or nearly.")
        if self._protein is not None:
            notes.append(f"Proteins are written as codons: {self._protein.settings}.")
        if self.tokenizer is not None:
            notes.append(
                f"Tokens are {self.tokenizer.name}: {self.tokenizer.size:,} ids. Bases after the last whole word of a "
                "record are left out."
            )
        for name, part in self.parts.items():
            notes += unknown_letters(name, part)
        if self.long == "crop":
            notes.append(
                f"Records are cut into parts of {self.length:,} bases: at random in training, side by side to evaluate."
            )
        return notes

    def table(self) -> Table:
        """Records, classes and leakage of each split."""
        made = Table("split", "records", "lengths", "labels", "in train", "reversed", "near")
        for name, part in self.parts.items():
            many = counts(self.label_names, self.encoded(name))
            shown = "\n".join(f"{label}: {number:,}" for label, number in list(many.items())[:15])
            shown += f"\nand {len(many) - 15} more" if len(many) > 15 else ""
            leak = ["", "", ""]
            if name != "train":
                found = self.leakage(name).describe()
                leak = [f"{found[key]:,}" for key in ("exact", "reverse_complement", "near")]
            made.add_row(name, f"{len(part):,}", _span(part), shown or "values", *leak)
        return made

    # --- Lightning -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read everything; prints records, labels and leakage once, on rank 0."""
        _ = self.label_names
        for name in self.parts:
            self.encoded(name)
        if stage == "predict" or self._printed or (self.trainer is not None and not self.trainer.is_global_zero):
            return
        self._printed = True
        console = Console()
        console.print(self.table())
        for name, part in self.parts.items():
            if part.dropped:
                console.print(f"{name}: {len(part.dropped):,} records dropped, such as {part.dropped[0]}", markup=False)
            for example in self.leakage(name).found[:3] if name != "train" else ():
                console.print(f"in training already: {example}", markup=False, highlight=False)

    def training_batches(self) -> Dataset[SequenceBatch]:
        part = self.parts["train"]
        return TrainingRows(
            part, self.encoded("train"), self.length, self.long, self.rows == "pack", self.seed, self.batch_size,
            self.tokenizer,
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader[SequenceBatch]:
        _ = self.parts  # which tells the length of rows
        self.stages = [type(self.stages[0])(self.length, self.batch_size)]
        return super().train_dataloader()

    def val_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every record of validation once."""
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every record of the test once.

        Raises:
            DataError: there is none.
        """
        if "test" not in self.parts:
            raise DataError(
                "there are no test records; give data.test=FILE, data.folds=10, or (genomes) data.tail=0.25"
            )
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every record of the test, or of validation where there is none."""
        return self._evaluation("test" if "test" in self.parts else "validation")

    def _evaluation(self, part: str) -> DataLoader[SequenceBatch]:
        rows = EvaluationRows(
            self.parts[part], self.encoded(part), self.seen(part), self.length, self.long, self.rows == "pack",
            self.tokenizer,
        )  # fmt: skip
        return self.evaluation_loader(rows, rows.size)


def _span(part: Records) -> str:
    low, high = int(part.lengths.min()), int(part.lengths.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _file(path: Path) -> dict[str, str]:
    made = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            made.update(data)
    return {"path": str(path), "digest": f"sha256:{made.hexdigest()}"}


__all__: Sequence[str] = ["LabelledData"]
