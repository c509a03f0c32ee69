"""Small tasks and data modules that keep the contracts of the real ones, for tests of what goes on around them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from seqlong.errors import ConfigError

ENDLESS = 10**9


class ToyMixer(nn.Module):
    """A layer that a backbone is made of."""


class LinearMixer(ToyMixer):
    """Mixes nothing.

    Args:
        d_model: width.
        d_state: size of nothing in particular.
        poison: make this layer's gradient infinite from the given call on.
    """

    def __init__(self, d_model: int, d_state: int = 4, poison: int | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(d_model, d_model)
        self.d_state, self.poison, self.calls = d_state, poison, 0

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.inner(hidden)
        if self.training:
            self.calls += 1
            if self.poison is not None and self.calls > self.poison:
                out.register_hook(lambda gradient: gradient * float("inf"))
        return hidden + torch.tanh(out)


@dataclasses.dataclass
class ToyConfig:
    """A toy backbone.

    Args:
        d_model: width.
        mixers: by letter.
        pattern: one letter a layer.
        dropout: share of values that are dropped.
    """

    d_model: int
    mixers: dict[str, Callable[[int], ToyMixer]]
    pattern: str = "mm"
    dropout: float = 0.1


class ToyTask(LightningModule):
    """Predicts the next token of random walks.

    Args:
        backbone: the layers.
        lr: step size.
        pause: seconds of sleep a step.
        crash: raise an error at this batch.
    """

    def __init__(self, backbone: ToyConfig, lr: float = 0.01, pause: float = 0.0, crash: int | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        if unknown := set(backbone.pattern) - set(backbone.mixers):
            raise ConfigError(f"the pattern has no mixer {unknown.pop()!r}")
        self.embedding = nn.Embedding(8, backbone.d_model)
        self.blocks = nn.ModuleList(backbone.mixers[letter](backbone.d_model) for letter in backbone.pattern)
        self.dropout = nn.Dropout(backbone.dropout)
        self.lr, self.pause, self.crash = lr, pause, crash

    def describe(self) -> dict[str, Any]:
        return {"name": "toy", "parameters": sum(p.numel() for p in self.parameters())}

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = self.dropout(block(hidden))
        return hidden @ self.embedding.weight.T

    def _loss(self, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.pause:
            time.sleep(self.pause)
        if self.crash is not None and batch_idx >= self.crash:
            raise RuntimeError("the toy crashed")
        loss = self._loss(batch)
        self.log("train/loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.pause:
            time.sleep(self.pause)
        self.log("val/bits", self._loss(batch) / 0.6931, sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/bits", self._loss(batch) / 0.6931, sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch[:, :-1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Rows(Dataset[Tensor]):
    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def __getitem__(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return (torch.randint(-1, 2, (self.length,), generator=generator).cumsum(0) + 4).clamp(0, 7)


class _Batches(Sampler[list[int]]):
    def __init__(self, data: ToyData, first: int) -> None:
        self.data, self.first = data, first

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[list[int]]:
        number = self.first
        while True:
            rows = range(number * self.data.batch_size, (number + 1) * self.data.batch_size)
            yield list(rows)[self.data.rank :: self.data.world]
            number += 1


class ToyData(LightningDataModule):
    """Random walks; keeps the data contract: one endless epoch that starts at ``consumed_batches``.

    Args:
        path: where nothing is read from.
        length: positions a row.
        batch_size: rows a batch over all ranks.
        batches_of_validation: batches.
        workers: processes that load.
    """

    def __init__(
        self,
        path: str = "toy",
        length: int = 16,
        batch_size: int = 4,
        batches_of_validation: int = 2,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.path, self.length, self.batch_size = path, length, batch_size
        self.batches_of_validation, self.workers, self.consumed = batches_of_validation, workers, 0

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def describe(self) -> dict[str, Any]:
        return {"title": "random walks", "sources": [{"path": self.path}]}

    def floors(self) -> list[dict[str, Any]]:
        return [{"name": "uniform", "bits": 3.0}, {"name": "walk", "bits": 1.58}]

    def state_dict(self) -> dict[str, Any]:
        return {"consumed_batches": self.trainer.fit_loop.epoch_loop.batch_progress.total.processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.consumed = int(state_dict["consumed_batches"])

    def train_dataloader(self) -> DataLoader:
        rows = _Rows(self.length, seed=1)
        return DataLoader(rows, batch_sampler=_Batches(self, self.consumed), num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        rows = self.batches_of_validation * self.batch_size
        dataset = torch.utils.data.Subset(_Rows(self.length, seed=2), range(self.rank, rows, self.world))
        return DataLoader(dataset, batch_size=self.batch_size // self.world)

    test_dataloader = predict_dataloader = val_dataloader
