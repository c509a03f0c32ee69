"""Recall: which answers of a recall task are right, by how long ago they were told, and with how large a state."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from seqlong import runs
from seqlong.callbacks.recall_picture import picture
from seqlong.callbacks.recall_tally import DEPTHS, Tally, wilson
from seqlong.cost import mixer_cost

log = logging.getLogger("seqlong")

FILE, SUMMARY, PICTURE = "recall.csv", "recall.json", "recall.png"
HEADER = ("step", "part", "length", "items", "depth", "distance", "answers", "right")


class Recall(Callback):
    """Judge whole answers in evaluation on a recall task (``seqlong.datamodules.synthetic``).

    An answer is right if every token of it is the most likely one, given those before it; then greedy decoding says it
    too. Logs ``val/answers`` (the share that is right), appends ``step,part,length,items,depth,distance,answers,right``
    to recall.csv, and writes recall.json (accuracy by length and items with Wilson's intervals, chance, the bytes of
    the state) and recall.png (heat maps by depth and by distance). Other data is left alone.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, int, int, int], list[int]] = {}

    # --- batches -------------------------------------------------------------------------------------------------

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._add(outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._add(outputs, batch)

    def _add(self, outputs: Any, batch: Any) -> None:
        answer = getattr(batch, "answer", None)
        if not isinstance(outputs, dict) or answer is None:
            return
        told = batch.told.cpu().numpy()
        right = outputs["right"].cpu().numpy()
        for depth, distance, is_right in judge(answer.cpu().numpy(), told, right):
            one = self._found.setdefault((answer.shape[1], int(batch.items), depth, distance), [0, 0])
            one[0] += 1
            one[1] += is_right

    # --- the end -------------------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, "test")

    def _end(self, trainer: Trainer, module: LightningModule, part: str) -> None:
        tallies = self._gathered()
        if trainer.sanity_checking or not tallies:
            return
        module.log(f"{part}/answers", sum(t.right for t in tallies) / sum(t.answers for t in tallies))
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        with (folder / FILE).open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not file.tell():
                writer.writerow(HEADER)
            writer.writerows([trainer.global_step, part, *asdict(t).values()] for t in tallies)
        summary = self._summary(trainer, module, part, tallies)
        runs.write_json(folder / SUMMARY, summary)
        picture(tallies, summary, folder / PICTURE)
        for line in summary["accuracy"]:
            log.info("%s", said(line, summary))

    def _gathered(self) -> list[Tally]:
        """The answers of all ranks; this one's are forgotten."""
        found, self._found = self._found, {}
        every: list[Any] = [found]
        if dist.is_available() and dist.is_initialized():
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, found)
        total: dict[tuple[int, int, int, int], np.ndarray] = {}
        for one in every:
            for key, counts in one.items():
                total[key] = total.get(key, np.zeros(2, dtype=np.int64)) + np.array(counts)
        return [Tally(*key, *map(int, counts)) for key, counts in sorted(total.items())]

    def _summary(self, trainer: Trainer, module: LightningModule, part: str, tallies: list[Tally]) -> dict[str, Any]:
        describe = getattr(getattr(trainer, "datamodule", None), "describe", None)
        generator = dict(describe().get("generator", {})) if callable(describe) else {}
        cells: dict[tuple[int, int], list[int]] = {}
        for tally in tallies:
            cell = cells.setdefault((tally.length, tally.items), [0, 0])
            cell[0], cell[1] = cell[0] + tally.answers, cell[1] + tally.right
        dtype = torch.float32 if str(trainer.precision).startswith("32") else torch.bfloat16
        states = {length: state_bytes(module, length, dtype) for length in {length for length, _ in cells}}
        accuracy = []
        for (length, items), (answers, right) in cells.items():
            low, high = wilson(right, answers)
            accuracy.append({"length": length, "items": items, "answers": answers, "right": right,
                             "accuracy": right / answers, "low": low, "high": high,
                             "state_bytes": None if states[length] is None else sum(states[length] or [])})  # fmt: skip
        seen = next((c.tokens for c in trainer.callbacks if hasattr(c, "tokens")), None)  # type: ignore[attr-defined]
        optimizer = getattr(module, "optimizer_settings", None)
        return {
            "part": part, "step": trainer.global_step, "task": generator.get("task"), "generator": generator,
            "chance": generator.get("chance"), "accuracy": accuracy,
            "state_bytes_by_block": {str(length): blocks for length, blocks in sorted(states.items())},
            "parameters": sum(p.numel() for p in module.parameters()), "tokens_seen": seen or None,
            "lr": getattr(optimizer, "lr", None), "seed": getattr(trainer.datamodule, "seed", None),  # type: ignore[attr-defined]
        }  # fmt: skip


def judge(answer: np.ndarray, told: np.ndarray, right: np.ndarray) -> Iterable[tuple[int, int, int]]:
    """``(depth, distance, right)`` of every answer; see ``Tally``.

    Args:
        answer: ``(b t)``, the number of the answer that each position is part of, -1 elsewhere.
        told: ``(b t)``, where its token was told, -1 for no one place.
        right: ``(b t)``, whether the model says it.
    """
    rows, places = np.nonzero(answer >= 0)
    if not len(rows):
        return []
    number = rows * (answer.max() + 1) + answer[rows, places]
    _, first, which = np.unique(number, return_index=True, return_inverse=True)
    wrong = np.bincount(which, weights=~right[rows, places])
    asked, said = places[first], told[rows[first], places[first]]
    known = said >= 0
    depth = np.where(known, np.minimum(DEPTHS * said // np.maximum(asked, 1), DEPTHS - 1), -1)
    distance = np.where(known, 1 << np.log2(np.maximum(asked - said, 1)).astype(np.int64), -1)
    return zip(depth.tolist(), distance.tolist(), (wrong == 0).astype(int).tolist(), strict=True)


def state_bytes(module: LightningModule, length: int, dtype: torch.dtype) -> list[int] | None:
    """Bytes that each block carries after a row; None if one needs the whole row, or there is no backbone."""
    backbone: Any = getattr(module, "backbone", None)
    if backbone is None:
        return None
    states = [mixer_cost(block.mixer, length, dtype).state for block in backbone.blocks]
    return None if any(state is None for state in states) else [int(state or 0) for state in states]


def said(line: dict[str, Any], summary: dict[str, Any]) -> str:
    """A line of the summary for people."""
    counted = (summary["generator"] or {}).get("counted", "items")
    chance, state = summary["chance"], line["state_bytes"]
    counted = counted.removesuffix("s") if line["items"] == 1 else counted
    text = f"length {line['length']:,}, {line['items']:,} {counted}: {100 * line['accuracy']:.1f} % right"
    text += f" ({100 * line['low']:.1f} to {100 * line['high']:.1f}, {line['answers']:,} answers)"
    text += f", chance {100 * chance:.2g} %" if isinstance(chance, float) else ""
    return text + (f", state {state:,} bytes" if state is not None else "")
