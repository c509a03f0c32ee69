"""SequenceData: what every data module shares: stages, shares of ranks, endless batches that resume exactly."""

from __future__ import annotations

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from seqlong.batch import SequenceBatch
from seqlong.datamodules.sampler import BatchSampler, EvaluationSampler, Stage, check_stages
from seqlong.errors import ConfigError


class SequenceData(LightningDataModule):
    """Endless training batches, each a pure function of its number; evaluation rows in a fixed order.

    Give the Trainer ``max_steps``, ``val_check_interval`` in batches and ``use_distributed_sampler: false``. A subclass
    gives ``training_batches()``, a dataset of ``BatchRequest``, and makes its loaders of ``evaluation_loader``.

    Args:
        length: positions in a row, without ``stages``.
        batch_size: rows in a batch over all ranks, without ``stages``.
        stages: a length warm-up, in place of ``length`` and ``batch_size``.
        eval_length: positions in a row of evaluation; null is that of the last stage.
        eval_batch_size: rows in an evaluation batch over all ranks; null is that of the last stage.
        seed: number that names everything random about the training data.
        workers: loader processes of each rank.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        stages: list[Stage] | None = None,
        eval_length: int | None = None,
        eval_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.stages = list(stages) if stages is not None else [Stage(length, batch_size)]
        check_stages(self.stages)
        if workers < 0:
            raise ConfigError(f"workers {workers} must be 0 or more")
        self.length, self.batch_size = self.stages[-1].length, self.stages[-1].batch_size
        self.eval_length = self.length if eval_length is None else eval_length
        self.eval_batch_size = self.batch_size if eval_batch_size is None else eval_batch_size
        if self.eval_length < 1 or self.eval_batch_size < 1:
            raise ConfigError(
                f"eval_length {self.eval_length} and eval_batch_size {self.eval_batch_size} must be 1 or more"
            )
        self.seed, self.workers = seed, workers
        self._start = 0

    def training_batches(self) -> Dataset[SequenceBatch]:
        """What turns a ``BatchRequest`` into this rank's share of the batch."""
        raise NotImplementedError(f"{type(self).__name__} must define training_batches()")

    def train_dataloader(self) -> DataLoader[SequenceBatch]:
        """Endless batches from where training stands."""
        rank, world = self._place()
        accumulate = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        sampler = BatchSampler(self.stages, rank, world, self._start, accumulate)
        return self._loader(self.training_batches(), sampler, _ResumableLoader)

    def evaluation_loader(self, batches: Dataset[SequenceBatch], rows: int) -> DataLoader[SequenceBatch]:
        """Rows 0 to ``rows``, once each; ``batches`` is asked for arrays of row numbers, -1 where rows ran out."""
        return self._loader(batches, EvaluationSampler(rows, self.eval_batch_size, *self._place()))

    def state_dict(self) -> dict[str, int]:
        """``{"consumed_batches": int}``: batches trained on, not fetched, since training began."""
        if self.trainer is None:
            return {"consumed_batches": self._start}
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return {"consumed_batches": progress.processed}  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after that many batches."""
        self._start = int(state_dict["consumed_batches"])

    def _place(self) -> tuple[int, int]:
        """Data-parallel rank and ranks, which under sequence parallelism are not the process's."""
        if self.trainer is None:
            return 0, 1
        # Lightning would put a shuffling sampler of its own in place of ours, without a word.
        if self.trainer.world_size > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigError(
                f"trainer.use_distributed_sampler is true; {type(self).__name__} shares batches out itself: set it "
                "false"
            )
        kwargs = self.trainer.distributed_sampler_kwargs or {}
        return int(kwargs.get("rank", 0)), int(kwargs.get("num_replicas", 1))

    def _loader(
        self,
        dataset: Dataset[SequenceBatch],
        sampler: Sampler[NDArray[np.int64]] | BatchSampler,
        kind: type[DataLoader] = DataLoader,  # type: ignore[type-arg]
    ) -> DataLoader[SequenceBatch]:
        return kind(
            dataset,
            sampler=sampler,
            batch_size=None,  # the sampler asks for whole batches
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if self.workers else None,
        )


class _ResumableLoader(DataLoader[SequenceBatch]):
    """A loader that Lightning takes for resumable, which it is: the data module tells the sampler where to start."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        pass
