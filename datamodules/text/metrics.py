"""TextMetrics: bits per byte and word perplexity, which tokenizers cannot flatter."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from seqlong.datamodules.text.datamodule import TextData
from seqlong.errors import ConfigError


class TextMetrics(Callback):
    """Log ``val/bits_per_byte`` and ``val/word_perplexity`` (or ``test/...``) beside the bits per token.

    Bits per byte = bits per token · tokens / bytes, over the positions that were measured. With a tokenizer that
    normalises text the bytes are those of its tokens. Word perplexity = 2^(bits per byte · bytes / words), words being
    what stands between white space, and bytes and words those of the whole split: the convention of PG-19 (arXiv
    1911.05507). For causal models alone.
    """

    def __init__(self) -> None:
        self._lengths: Tensor | None = None
        self._sums: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, TextData):
            raise ConfigError(
                f"TextMetrics measures text, but the data is {type(data).__name__}; take it out of trainer.callbacks"
            )
        self._lengths = torch.from_numpy(data.vocabulary.byte_lengths()) if data.targets == "next" else None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._add(batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._add(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "val", "validation")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "test", "test")

    def _begin(self, module: LightningModule) -> None:
        self._sums = torch.zeros(2, dtype=torch.int64, device=module.device)
        if self._lengths is not None:
            self._lengths = self._lengths.to(module.device)

    def _add(self, batch: Any) -> None:
        if self._lengths is None or self._sums is None or batch.targets is None or batch.loss_weight is None:
            return
        counted = batch.targets[batch.loss_weight > 0]
        self._sums += torch.stack([torch.tensor(len(counted), device=counted.device), self._lengths[counted].sum()])

    def _log(self, trainer: Trainer, module: LightningModule, part: str, split: str) -> None:
        if self._lengths is None or self._sums is None:
            return
        tokens, size = trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()  # type: ignore[union-attr]
        if not size:
            return
        bits = float(module.get_submodule(f"{part}_bits").compute()) * tokens / size  # type: ignore[operator]
        module.log(f"{part}/bits_per_byte", bits, batch_size=1)
        data = trainer.datamodule  # type: ignore[attr-defined]
        whole = data.split_size(split)
        if whole["words"]:
            perplexity = 2.0 ** min(bits * whole["bytes"] / whole["words"], 1000.0)
            module.log(f"{part}/word_perplexity", perplexity, batch_size=1)
