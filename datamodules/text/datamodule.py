"""TextData: rows of text for Lightning, bytes or tokens, resumable to the batch on any number of ranks and workers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.base import SequenceData
from seqlong.datamodules.mixture import Mixture, slots
from seqlong.datamodules.sampler import BatchRequest, Stage, permute
from seqlong.datamodules.text.assemble import Targets, assemble
from seqlong.datamodules.text.corpus import Corpus
from seqlong.datamodules.text.documents import Reading, Unreadable
from seqlong.datamodules.text.floors import floors
from seqlong.datamodules.text.rows import (
    LAYOUTS,
    Documents,
    EvaluationRows,
    Layout,
    Order,
    Rows,
    Spans,
    shuffled,
    streamed,
)
from seqlong.datamodules.text.splits import AutoSplit, FileSplit, Split, Splitter
from seqlong.datamodules.text.vocabulary import Vocabulary, load_vocabulary
from seqlong.errors import ConfigError, DataError

log = logging.getLogger("seqlong")

_ORDER, _MIXTURE = 11, 12  # streams of random numbers
_EVALUATION = 13


@dataclass(frozen=True)
class Source:
    """One part of a mixture.

    Attributes:
        path: file, folder or pattern, or several.
        weight: share of the training rows, relative to the other sources'; a list has one for each stage; null is in
            proportion to its training text.
        split: how it is split; null is as ``data.split`` says.
    """

    path: str | list[str]
    weight: float | list[float] | None = None
    split: Splitter | None = None


class TextData(SequenceData):
    """Rows of text: of files, folders and patterns of .txt, .md, .jsonl, .parquet and .tar.

    Training is endless: give the Trainer ``max_steps``, ``val_check_interval`` in batches and
    ``use_distributed_sampler: false``. Which rows make up batch number n depends on nothing but the settings here.

    Args:
        path: file, folder or pattern, or a list of them.
        sources: a mixture, in place of ``path``: name to {path, weight, split}.
        tokenizer: ``bytes`` (260 ids), or the path of a tokenizer.json, which seqlong tokenizer train makes.
        field: field of a row of JSON, or column of a Parquet file, that holds the text.
        length: positions in a row, without ``stages``.
        batch_size: rows in a batch over all ranks, without ``stages``.
        stages: a length warm-up: a list of {length, batch_size, steps}, steps being optimizer steps; the last lasts on.
            It takes the place of ``length`` and ``batch_size``.
        targets: what a position predicts: ``next`` for causal models, ``same`` for masked ones.
        documents: how documents fill rows. ``cut`` lays all one after the other and cuts every ``length`` positions, no
            padding; ``fit`` divides no document that fits into a row, and finds a place for each; ``single`` keeps one
            document to a row, padded. Documents in a row never see each other.
        order: ``shuffle`` permutes the rows of an epoch; ``stream`` lets each row of a batch walk through its documents
            from beginning to end, for models that carry their state from batch to batch.
        split: how train, validation and test are told apart; null is AutoSplit: whole documents where there are three
            or more, otherwise the ends of each, one twentieth each for the last two.
        unreadable: what to do with a document that is not UTF-8, or a row that is not what it should be: ``error``,
            ``skip`` it, or ``replace`` undecodable bytes; the last two are counted and reported.
        bos: token that begins a document; null finds the tokenizer's own; empty is none.
        eos: token that ends a document, likewise.
        eval_length: positions in a row of evaluation; null is that of the last stage.
        eval_batch_size: rows in an evaluation batch over all ranks; null is that of the last stage.
        seed: number that names the order of training rows and where they are cut.
        workers: loader processes of each rank. 0 is right where making a batch is short beside a step, as it mostly is.
        cache_dir: folder of token stores; null is $SEQLONG_CACHE or ~/.cache/seqlong.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(
        self,
        path: str | list[str] | None = None,
        sources: dict[str, Source] | None = None,
        tokenizer: str = "bytes",
        field: str = "text",
        length: int = 8192,
        batch_size: int = 8,
        stages: list[Stage] | None = None,
        targets: Targets = "next",
        documents: Documents = "cut",
        order: Order = "shuffle",
        split: Splitter | None = None,
        unreadable: Unreadable = "error",
        bos: str | None = None,
        eos: str | None = None,
        eval_length: int | None = None,
        eval_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(length, batch_size, stages, eval_length, eval_batch_size, seed, workers)
        if (path is None) == (not sources):
            raise ConfigError("text needs data.path, a file, folder or pattern, or data.sources, a mixture; not both")
        if order == "stream" and documents == "fit":
            raise ConfigError(
                "data.order=stream walks through documents, but data.documents=fit puts pieces of them where they fit; "
                "set data.documents to cut or single"
            )
        self.sources: dict[str, Source] = dict(sources) if sources else {"text": Source(path)}  # type: ignore[arg-type]
        self.tokenizer, self.targets, self.documents, self.order = tokenizer, targets, documents, order
        self._reading = Reading(field, unreadable)
        self._splitter = split if split is not None else AutoSplit()
        self._names = (bos, eos)
        self._cache_dir = cache_dir
        self._weights = [self._stage_weights(number) for number in range(len(self.stages))]
        self._vocabulary: Vocabulary | None = None
        self._parts: dict[str, tuple[Corpus, Split]] | None = None
        self._training: list[list[Layout]] | None = None
        self._floors: list[dict[str, object]] | None = None
        self._printed = False

    # What it holds

    @property
    def vocabulary(self) -> Vocabulary:
        """Bytes, or the tokenizer's."""
        if self._vocabulary is None:
            self._vocabulary = load_vocabulary(self.tokenizer, *self._names)
        return self._vocabulary

    @property
    def parts(self) -> Mapping[str, tuple[Corpus, Split]]:
        """The documents of each source and their split, opened (and tokenised, the first time ever) when asked for."""
        if self._parts is None:
            self._parts = {name: self._open(name, source) for name, source in self.sources.items()}
        return self._parts

    @property
    def corpora(self) -> list[Corpus]:
        """The documents of each source."""
        return [corpus for corpus, _ in self.parts.values()]

    @property
    def layouts(self) -> list[list[Layout]]:
        """For each training stage the windows of each source."""
        if self._training is None:
            kind = LAYOUTS[self.documents]
            self._training = [
                [
                    kind(split.spans["train"], stage.length, self.seed, _ORDER, number, place)
                    for place, (_, split) in enumerate(self.parts.values())
                ]
                for number, stage in enumerate(self.stages)
            ]
        return self._training

    def weights(self, stage: int) -> list[float]:
        """Share of the rows of a stage that each source gets."""
        given = self._weights[stage]
        if given is not None:
            return given
        return [float(layout.count) for layout in self.layouts[stage]]

    def split_size(self, name: str) -> dict[str, int]:
        """Documents, tokens, bytes and words of a split, over all sources."""
        sizes = [split.size(corpus, name) for corpus, split in self.parts.values()]
        return {key: sum(size[key] for size in sizes) for key in sizes[0]}

    def describe(self) -> dict[str, object]:
        """Everything about the data that a reader of the results needs, JSON-able."""
        sources = []
        for name, (corpus, _) in self.parts.items():
            paths = self.sources[name].path
            sources.append(
                {
                    "path": paths if isinstance(paths, str) else ", ".join(paths),
                    "documents": len(corpus),
                    "bytes": int(corpus.text_bytes.sum()),
                    "tokens": int(corpus.lengths.sum()) - len(corpus) * (corpus.prefix + corpus.suffix),
                    "words": int(corpus.words.sum()),
                    "digest": corpus.digests[0] if len(corpus.digests) == 1 else ", ".join(corpus.digests),
                }
            )
        stages = []
        for number, stage in enumerate(self.stages):
            count = slots(self.weights(number), 1000)
            stages.append(
                {
                    "length": stage.length,
                    "batch_size": stage.batch_size,
                    "steps": stage.steps if number < len(self.stages) - 1 else None,
                    "rows_per_epoch": sum(layout.count for layout in self.layouts[number]),
                }
                | ({f"share of {name}": f"{one / 10:g} %" for name, one in zip(self.parts, count, strict=True)}
                   if len(self.parts) > 1 else {})
            )  # fmt: skip
        size = sum(int(str(source["bytes"])) for source in sources)
        count_ = sum(len(corpus) for corpus in self.corpora)
        files = [file.name for corpus in self.corpora for file in corpus.files]
        shown = ", ".join(files[:4]) + (f" and {len(files) - 4:,} more files" if len(files) > 4 else "")
        splits = {name: split.describe(corpus) for name, (corpus, split) in self.parts.items()}
        return {
            "title": f"{shown}: {size:,} bytes in {count_:,} documents",
            "unit": self.vocabulary.unit,
            "vocabulary": {"tokenizer": self.tokenizer, "size": self.vocabulary.size, "digest": self.vocabulary.digest},
            "sources": sources,
            "split": splits["text"] if list(splits) == ["text"] else splits,
            "stages": stages,
            "evaluation": {"length": self.eval_length, "batch_size": self.eval_batch_size},
            "notes": self._notes(),
        }

    def _notes(self) -> list[str]:
        does = {
            "cut": "Documents lie one after the other and are cut every row; each epoch in another order.",
            "fit": "Documents that fit into a row are never divided; several share a row.",
            "single": "Each row holds one document alone, padded.",
        }
        notes = [does[self.documents] + " What shares a row never sees each other."]
        if self.vocabulary.eos is not None:
            notes.append("The end of a document is trained on and not measured: validation and test are of text alone.")
        if self.vocabulary.bos is None:
            notes.append("No token begins a document, so that its first token is not predicted.")
        return notes + [note for corpus in self.corpora for note in corpus.notes()]

    def floors(self) -> list[dict[str, object]]:
        """Bits, in the unit of val/bits, that need no neural network, on the validation split: see `floors`.

        With a tokenizer they are bits per byte times bytes per token; ``bits_per_byte`` has them as they are.
        """
        if self._floors is None:
            size = self.split_size("validation")
            scale = size["bytes"] / size["tokens"] if size["tokens"] else 1.0
            found: dict[str, float] = {}
            total = 0
            for corpus, split in self.parts.values():
                here = split.size(corpus, "validation")["bytes"]
                total += here
                for name, bits in floors(
                    corpus, split.spans["train"], split.spans["validation"], self._cache_dir
                ).items():
                    found[name] = found.get(name, 0.0) + bits * here
            self._floors = [
                {"name": name, "bits": bits / total * scale, "bits_per_byte": bits / total}
                for name, bits in found.items()
                if total
            ]
        return self._floors

    def _open(self, name: str, source: Source) -> tuple[Corpus, Split]:
        splitter = source.split if source.split is not None else self._splitter
        paths = [source.path] if isinstance(source.path, str) else list(source.path)
        corpus = Corpus(paths, self.vocabulary, self._reading, self._cache_dir)
        if isinstance(splitter, FileSplit) and (extra := splitter.extra(corpus.files)):
            corpus = Corpus([*paths, *extra], self.vocabulary, self._reading, self._cache_dir)
        return corpus, splitter.split(corpus)

    def _stage_weights(self, stage: int) -> list[float] | None:
        given = {name: source.weight for name, source in self.sources.items()}
        missing = [name for name, weight in given.items() if weight is None]
        if len(missing) == len(given):
            return None
        if missing:
            raise ConfigError(
                f"data.sources.{missing[0]} has no weight, but others have; give one to each source, or to none"
            )
        found = []
        for name, weight in given.items():
            if isinstance(weight, list):
                if len(weight) != len(self.stages):
                    raise ConfigError(
                        f"data.sources.{name}.weight has {len(weight)} values for {len(self.stages)} stages; give one "
                        "for each stage, or a single number"
                    )
                weight = weight[stage]
            assert weight is not None
            found.append(float(weight))
        slots(found, 1000)  # says at once what is wrong
        return found

    # Lightning's hooks

    def prepare_data(self) -> None:
        """Tokenise, in one process of each node."""
        _ = self.parts

    def setup(self, stage: str) -> None:
        """Open the documents and split them; prints the splits once, on rank 0."""
        _ = self.parts
        if stage == "predict":
            return
        if stage == "fit":
            for number, one in enumerate(self.stages):
                self._check_lanes(number, one)
        if (self.trainer is None or self.trainer.is_global_zero) and not self._printed:
            self._printed = True
            console = Console()
            for name, (corpus, split) in self.parts.items():
                console.print(split.table(corpus, name if len(self.parts) > 1 else ""))
                for note in corpus.notes():
                    console.print(note, markup=False, highlight=False)

    def _check_lanes(self, number: int, stage: Stage) -> None:
        if self.order == "stream":
            slots(self.weights(number), stage.batch_size)
        _ = self.layouts

    def state_dict(self) -> dict[str, Any]:
        """As the base's, with the vocabulary and the text that it holds for."""
        digests = [digest for corpus in self.corpora for digest in corpus.digests] if self._parts is not None else []
        return {**super().state_dict(), "vocabulary": self.vocabulary.digest, "text": ",".join(digests)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after that many batches.

        Raises:
            ConfigError: the checkpoint was trained with another vocabulary.
        """
        super().load_state_dict(state_dict)
        theirs = state_dict.get("vocabulary", self.vocabulary.digest)
        if theirs != self.vocabulary.digest:
            raise ConfigError(
                f"the checkpoint was trained with another vocabulary ({theirs}) than data.tokenizer={self.tokenizer} "
                f"({self.vocabulary.digest}, {self.vocabulary.size:,} ids): the same ids would mean other tokens. Give "
                "the tokenizer that it was trained with"
            )
        ours = ",".join(digest for corpus in self.corpora for digest in corpus.digests)
        training = self.trainer is None or self.trainer.training
        if training and state_dict.get("text", ours) != ours:
            log.warning("the text is not the one that the checkpoint was trained on; going on in another order")

    def training_batches(self) -> Dataset[SequenceBatch]:
        return _TrainingBatches(self)

    def val_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every token of the validation split once."""
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every token of the test split once.

        Raises:
            DataError: the test split is empty.
        """
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every token of all documents once."""
        spans = [
            Spans(np.arange(len(corpus)), np.zeros(len(corpus), dtype=np.int64), corpus.lengths)
            for corpus in self.corpora
        ]
        batches = _EvaluationBatches(self, spans, shuffle=False)
        return self.evaluation_loader(batches, batches.size)

    def _evaluation(self, name: Literal["validation", "test"]) -> DataLoader[SequenceBatch]:
        spans = [split.spans[name] for _, split in self.parts.values()]
        if not any(len(one) for one in spans):
            raise DataError(f"{name}: the split is empty; give data.split something for it")
        batches = _EvaluationBatches(self, spans, shuffle=True)
        return self.evaluation_loader(batches, batches.size)


class _TrainingBatches(Dataset[SequenceBatch]):
    def __init__(self, data: TextData) -> None:
        self._corpora, self._layouts, self._vocabulary = data.corpora, data.layouts, data.vocabulary
        self._weights = [data.weights(stage) for stage in range(len(data.stages))]
        self._mixtures = [
            Mixture(weights, data.seed, _MIXTURE, stage) if len(weights) > 1 else None
            for stage, weights in enumerate(self._weights)
        ]
        self._targets, self._seed, self._stream = data.targets, data.seed, data.order == "stream"

    def __getitem__(self, request: BatchRequest) -> SequenceBatch:
        numbers = request.samples - request.first
        rows = self._streams(request, numbers) if self._stream else self._shuffled(request, numbers)
        return assemble(self._corpora, rows, self._vocabulary, request.length, self._targets, False, request.samples)

    def _shuffled(self, request: BatchRequest, numbers: NDArray[np.int64]) -> list[Rows]:
        mixture = self._mixtures[request.stage]
        owner, within = (np.zeros_like(numbers), numbers) if mixture is None else mixture.assign(numbers)
        found = []
        for source, layout in enumerate(self._layouts[request.stage]):
            here = np.flatnonzero(owner == source)
            key = (self._seed, _ORDER, request.stage, source)
            found.append(Rows(shuffled(layout, within[here], here.tolist(), *key), len(numbers)))
        return found

    def _streams(self, request: BatchRequest, numbers: NDArray[np.int64]) -> list[Rows]:
        """Row r of every batch belongs to one source for the whole stage, and walks through its share of it."""
        counts = slots(self._weights[request.stage], request.rows)
        first = np.cumsum(counts) - counts
        found = []
        for source, layout in enumerate(self._layouts[request.stage]):
            pieces, continues = [], np.zeros(len(numbers), dtype=bool)
            for row, number in enumerate(numbers.tolist()):
                step, place = divmod(number, request.rows)
                lane = place - int(first[source])
                if 0 <= lane < counts[source]:
                    added, continues[row] = streamed(layout, step, lane, int(counts[source]), row)
                    pieces += added
            found.append(Rows(pieces, len(numbers), continues))
        return found


class _EvaluationBatches(Dataset[SequenceBatch]):
    def __init__(self, data: TextData, spans: list[Spans], shuffle: bool) -> None:
        self._corpora, self._vocabulary, self._targets = data.corpora, data.vocabulary, data.targets
        self._rows = [EvaluationRows(one, data.eval_length, data.documents == "single") for one in spans]
        self._first = np.cumsum([0, *(rows.size for rows in self._rows)])
        self.size = int(self._first[-1])
        self._length, self._shuffle = data.eval_length, shuffle

    def __getitem__(self, numbers: NDArray[np.int64]) -> SequenceBatch:
        wanted = np.maximum(numbers, 0)  # -1 repeats row 0, silenced by its number
        if self._shuffle:  # so that the first rows are a fair sample
            wanted = permute(wanted, self.size, _EVALUATION)
        owner = np.searchsorted(self._first, wanted, side="right") - 1
        rows = [
            Rows(
                one.pieces(wanted[owner == source] - self._first[source], np.flatnonzero(owner == source)), len(numbers)
            )
            for source, one in enumerate(self._rows)
        ]
        return assemble(self._corpora, rows, self._vocabulary, self._length, self._targets, True, numbers)
