"""SyntheticData: rows of a generator for Lightning, resumable to the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.base import SequenceData
from seqlong.datamodules.sampler import BatchRequest, Stage, mix
from seqlong.datamodules.synthetic.recall import MQAR, Generator
from seqlong.errors import ConfigError

#: What tells the rows of training, validation and test apart.
TRAIN, VALIDATION, TEST = 0, 1, 2


@dataclass(frozen=True)
class SyntheticVocabulary:
    """How many tokens there are."""

    size: int


class SyntheticData(SequenceData):
    """Rows that a generator makes up: endless ones to train on, and others, always the same, to measure with.

    Args:
        generator: what is asked; MQAR if not given.
        length: positions in a row, without ``stages``.
        batch_size: rows in a batch over all ranks, without ``stages``.
        stages: a length warm-up, in place of ``length`` and ``batch_size``.
        targets: what a position predicts: the answer that would stand after it.
        eval_rows: rows of validation, and of test.
        eval_length: positions in a row of evaluation; null is that of the last stage.
        eval_batch_size: rows in an evaluation batch over all ranks; null is that of the last stage.
        seed: number that names the rows.
        workers: loader processes of each rank.

    Raises:
        ConfigError: a setting is out of its range, or rows are too short for what is asked.
    """

    def __init__(
        self,
        generator: Generator | None = None,
        length: int = 256,
        batch_size: int = 64,
        stages: list[Stage] | None = None,
        targets: Literal["next"] = "next",
        eval_rows: int = 1024,
        eval_length: int | None = None,
        eval_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(length, batch_size, stages, eval_length, eval_batch_size, seed, workers)
        if eval_rows < 1:
            raise ConfigError(f"eval_rows must be 1 or more, found {eval_rows}")
        self.generator: Generator = MQAR() if generator is None else generator
        self.eval_rows, self.targets = eval_rows, targets
        self.vocabulary = SyntheticVocabulary(self.generator.vocab_size)
        for size in {*(stage.length for stage in self.stages), self.eval_length}:
            self.generator.row(np.random.default_rng(0), size)  # says at once what does not fit

    def training_batches(self) -> Dataset[SequenceBatch]:
        return _Training(self.generator, self.seed)

    def val_dataloader(self) -> DataLoader[SequenceBatch]:
        """Rows of validation."""
        return self.evaluation_loader(_Evaluation(self, VALIDATION), self.eval_rows)

    def test_dataloader(self) -> DataLoader[SequenceBatch]:
        """Rows of test."""
        return self.evaluation_loader(_Evaluation(self, TEST), self.eval_rows)

    def describe(self) -> dict[str, object]:
        """What is asked, for reports."""
        stages = [
            {"length": stage.length, "batch_size": stage.batch_size, "steps": stage.steps} for stage in self.stages
        ]
        said = self.generator.describe()
        return {"title": str(said.get("task", "synthetic")), "generator": said,
                "stages": stages, "evaluation": {"length": self.eval_length, "rows": self.eval_rows}}  # fmt: skip

    def floors(self) -> list[dict[str, object]]:
        """Bits of an answer that is guessed among all that could be."""
        chance = self.generator.describe().get("chance")
        return [{"name": "chance", "bits": -math.log2(chance)}] if isinstance(chance, float) else []


def make(generator: Generator, numbers: NDArray[np.int64], length: int, *name: int) -> SequenceBatch:
    """Rows by number; a negative one is a row that counts for nothing."""
    rows = []
    for number in numbers:
        keys = [int(mix(*name, int(number), part)[0]) for part in range(2)]
        rows.append(generator.row(np.random.Generator(np.random.Philox(key=keys)), length))
    targets = torch.from_numpy(np.stack([row.targets for row in rows]))
    targets[torch.from_numpy(numbers < 0)] = -1
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    return SequenceBatch(tokens, targets, (targets >= 0).float(), index=torch.from_numpy(numbers.copy()))


class _Training(Dataset[SequenceBatch]):
    def __init__(self, generator: Generator, seed: int) -> None:
        self.generator, self.seed = generator, seed

    def __getitem__(self, request: BatchRequest) -> SequenceBatch:
        return make(self.generator, request.samples, request.length, self.seed, TRAIN)


class _Evaluation(Dataset[SequenceBatch]):
    def __init__(self, data: SyntheticData, part: int) -> None:
        self.generator, self.length, self.part = data.generator, data.eval_length, part

    def __getitem__(self, numbers: NDArray[np.int64]) -> SequenceBatch:
        return make(self.generator, numbers, self.length, self.part)
