"""SyntheticData: rows of a recall task for Lightning, resumable to the batch, and a grid of them to measure with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.base import SequenceData
from seqlong.datamodules.sampler import BatchRequest, Stage, below, permute
from seqlong.datamodules.synthetic.draw import Draw
from seqlong.datamodules.synthetic.generator import RecallTask
from seqlong.datamodules.synthetic.grid import Cell, GridSampler, Part, check_cells, choose
from seqlong.datamodules.synthetic.mqar import MQAR
from seqlong.errors import ConfigError

#: What tells the rows of training, validation and test apart.
TRAIN, VALIDATION, TEST = 0, 1, 2


@dataclass(frozen=True)
class SyntheticVocabulary:
    """How many tokens there are."""

    size: int


@dataclass
class RecallBatch(SequenceBatch):
    """A batch of a recall task: what else is known of its answers, for evaluation.

    Attributes:
        told: ``(b t)`` int64, where the token asked for was told last; -1 where that is no one place.
        answer: ``(b t)`` int64, the number of the answer that a position is part of; -1 where nothing is asked.
        items: pairs, needles, ... that each row holds.
    """

    told: Int[Tensor, "b t"] | None = None
    answer: Int[Tensor, "b t"] | None = None
    items: int = 0

    def _map(self, function) -> RecallBatch:  # type: ignore[no-untyped-def]
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return RecallBatch(
            **{name: function(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        )


class SyntheticData(SequenceData):
    """Rows that a recall task makes up: endless ones to train on, and others, always the same, to measure with.

    Args:
        generator: what is asked; MQAR if not given.
        length: positions in a row, without ``stages``.
        batch_size: rows in a batch over all ranks, without ``stages``.
        stages: a length warm-up, in place of ``length`` and ``batch_size``.
        mixture: training batches of several lengths and numbers of items, each batch of one of them, in proportion to
            their ``rows``, of which there are so many different ones; ``length`` is then that of evaluation only. Not
            together with ``stages`` or ``train_rows``.
        targets: what a position predicts: the answer that would stand after it.
        rest: weight, in training, of the tokens that are no answers; above 0 the row is learnt as a text too.
        train_rows: different rows to train on, again and again in another order; null never shows a row twice.
        eval_rows: rows of validation, and of test, of each length and number of items.
        eval_length: positions in a row of evaluation; null is that of the last stage.
        eval_lengths: several lengths to measure at; null is ``eval_length`` alone.
        eval_items: several numbers of items (pairs, needles, ...) to measure with, at every length; null is the
            generator's own.
        evaluation: lengths, items and rows one by one, in place of the four above.
        eval_batch_size: rows in an evaluation batch over all ranks; null is that of the last stage. Longer rows come in
            smaller batches.
        seed: number that names the rows of training.
        workers: loader processes of each rank.

    Raises:
        ConfigError: a setting is out of its range, or rows are too short for what is asked.
    """

    def __init__(
        self,
        generator: RecallTask | None = None,
        length: int = 256,
        batch_size: int = 64,
        stages: list[Stage] | None = None,
        mixture: list[Cell] | None = None,
        targets: Literal["next"] = "next",
        rest: float = 0.0,
        train_rows: int | None = None,
        eval_rows: int = 1024,
        eval_length: int | None = None,
        eval_lengths: list[int] | None = None,
        eval_items: list[int] | None = None,
        evaluation: list[Cell] | None = None,
        eval_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(length, batch_size, stages, eval_length, eval_batch_size, seed, workers)
        if eval_rows < 1:
            raise ConfigError(f"eval_rows must be 1 or more, found {eval_rows}")
        if rest < 0:
            raise ConfigError(f"rest must be 0 or more, found {rest}")
        if train_rows is not None and train_rows < 1:
            raise ConfigError(f"train_rows must be 1 or more, or null, found {train_rows}")
        if mixture is not None and (stages is not None or train_rows is not None):
            other = "stages" if stages is not None else "train_rows"
            raise ConfigError(f"data.mixture and data.{other} exclude one another: set one of them null")
        self.generator: RecallTask = MQAR() if generator is None else generator
        self.mixture, self.targets, self.rest, self.train_rows = mixture, targets, rest, train_rows
        if evaluation is None:
            lengths = eval_lengths if eval_lengths is not None else [self.eval_length]
            items: Sequence[int | None] = eval_items if eval_items is not None else [None]
            evaluation = [Cell(size, number, eval_rows) for size in lengths for number in items]
        self.evaluation = evaluation
        check_cells(evaluation, "evaluation")
        if mixture is not None:
            check_cells(mixture, "mixture")
        self.vocabulary = SyntheticVocabulary(self.generator.vocab_size)
        training = mixture if mixture is not None else [Cell(stage.length) for stage in self.stages]
        for cell in {*training, *evaluation}:
            cell.task(self.generator).rows(Draw(np.zeros(1, dtype=np.int64)), cell.length)  # says what does not fit

    def training_batches(self) -> Dataset[SequenceBatch]:
        return _Training(self.generator, self.seed, self.mixture, self.rest, self.train_rows)

    def val_dataloader(self) -> DataLoader[SequenceBatch]:
        """Rows of validation."""
        return self._grid(VALIDATION)

    def test_dataloader(self) -> DataLoader[SequenceBatch]:
        """Rows of test."""
        return self._grid(TEST)

    def _grid(self, part: int) -> DataLoader[SequenceBatch]:
        positions = self.eval_batch_size * self.eval_length
        return self._loader(_Evaluation(self, part), GridSampler(self.evaluation, positions, *self._place()))  # type: ignore[arg-type]

    def describe(self) -> dict[str, object]:
        """What is asked, for reports."""
        stages = [
            {"length": stage.length, "batch_size": stage.batch_size, "steps": stage.steps} for stage in self.stages
        ]
        said = self.generator.describe()
        mixture = {} if self.mixture is None else {"mixture": [cell.__dict__ for cell in self.mixture]}
        return {"title": str(said["task"]), "generator": {**said, "name": type(self.generator).__name__},
                "stages": stages, **mixture, "train_rows": self.train_rows,
                "evaluation": [cell.__dict__ for cell in self.evaluation]}  # fmt: skip

    def floors(self) -> list[dict[str, object]]:
        """Bits of a token of an answer that is guessed among all that could be."""
        cell = self.evaluation[0]
        made = cell.task(self.generator).rows(Draw(np.zeros(1, dtype=np.int64)), cell.length)
        tokens = (made.answer >= 0).sum() / (made.answer.max() + 1)
        return [{"name": "chance", "bits": float(-math.log2(self.generator.chance()) / tokens)}]


def make(
    generator: RecallTask, numbers: NDArray[np.int64], length: int, *name: int, rest: float = 0.0, part: int = TRAIN
) -> RecallBatch:
    """Rows by number; a negative one is a row that counts for nothing."""
    made = generator.rows(Draw(numbers, *name, part=part), length)
    tokens, told, answer = (torch.from_numpy(part) for part in (made.tokens, made.told, made.answer))
    targets = torch.from_numpy(made.targets)
    weight = (targets >= 0).float()
    if rest > 0:
        following = torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 1), -1)], dim=1)
        weight = torch.where((targets < 0) & (following >= 0), rest, weight)
        targets = torch.where(targets >= 0, targets, following)
    spare = torch.from_numpy(numbers < 0)
    targets[spare], weight[spare], answer[spare] = -1, 0.0, -1
    return RecallBatch(
        tokens, targets, weight, index=torch.from_numpy(numbers.copy()), told=told, answer=answer, items=made.items
    )


class _Training(Dataset[SequenceBatch]):
    def __init__(
        self, generator: RecallTask, seed: int, mixture: list[Cell] | None, rest: float, rows: int | None
    ) -> None:
        self.generator, self.seed, self.mixture, self.rest, self.rows = generator, seed, mixture, rest, rows

    def __getitem__(self, request: BatchRequest) -> SequenceBatch:
        numbers = request.samples
        if self.mixture is not None:
            cell = choose(self.mixture, request.batch, self.seed)
            numbers = below(cell.rows, self.seed, TRAIN, numbers)
            name = (self.seed, TRAIN, cell.length, cell.items or 0)
            return make(cell.task(self.generator), numbers, cell.length, *name, rest=self.rest)
        if self.rows is not None:
            passes, places = np.divmod(numbers, self.rows)
            numbers = np.concatenate(
                [permute(place, self.rows, self.seed, int(turn)) for turn, place in zip(passes, places, strict=True)]
            )
        return make(self.generator, numbers, request.length, self.seed, TRAIN, rest=self.rest)


class _Evaluation(Dataset[SequenceBatch]):
    def __init__(self, data: SyntheticData, part: int) -> None:
        self.cells, self.part = data.evaluation, part
        self.tasks = [cell.task(data.generator) for cell in data.evaluation]
        self.first = np.concatenate([[0], np.cumsum([cell.rows for cell in data.evaluation])])

    def __getitem__(self, wanted: Part) -> SequenceBatch:
        cell = self.cells[wanted.cell]
        name = (self.part, cell.length, cell.items or 0)
        batch = make(self.tasks[wanted.cell], wanted.numbers, cell.length, *name, part=self.part)
        assert batch.index is not None
        batch.index[batch.index >= 0] += int(self.first[wanted.cell])
        return batch
