"""Where the loss is: by position, on what repeats, by context; each against a count by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset

from seqlong.backbone import BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.callbacks import EffectiveContext, LossByPosition, Repeats
from seqlong.callbacks.loss_split import Bins, octaves, places
from seqlong.callbacks.repeats import previous
from seqlong.errors import ConfigError
from seqlong.mixers import Attention
from seqlong.report.losses import losses_section, read_losses
from seqlong.report.record import RunRecord
from seqlong.tasks import CausalLM


def _batch(rows: int, length: int, seed: int = 0, symbols: int = 6, packed: bool = False) -> SequenceBatch:
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, symbols, (rows, length), generator=random)
    targets = torch.cat([tokens[:, 1:], torch.full((rows, 1), -1)], dim=1)
    weight = (torch.rand(rows, length, generator=random) < 0.8).float()
    segments = None
    if packed:
        segments = torch.zeros(rows, length, dtype=torch.int32)
        for row in range(rows):
            cuts = sorted(torch.randperm(length - 2, generator=random)[:3].tolist())
            for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, length - 1], strict=True), 1):
                segments[row, start:stop] = number
            targets[row, :-1][segments[row, 1:] != segments[row, :-1]] = -1
        targets[segments == 0] = -1
    return SequenceBatch(tokens, targets, weight, segment_ids=segments)


class _Rows(Dataset[SequenceBatch]):
    def __init__(self, batches: list[SequenceBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> SequenceBatch:
        return self.batches[number]


def _evaluate(folder: Path, callbacks: list[Callback], batches: list[SequenceBatch]) -> tuple[CausalLM, Trainer]:
    torch.manual_seed(0)
    mixers = {"a": lambda width: Attention(width, heads=2)}
    task = CausalLM(BackboneConfig(8, 16, "a", mixers, layers=1))
    trainer = Trainer(default_root_dir=folder, callbacks=callbacks, logger=False, accelerator="cpu",
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.validate(task, DataLoader(_Rows(batches), batch_size=None), verbose=False)
    return task, trainer


def _nll(task: CausalLM, batch: SequenceBatch) -> torch.Tensor:
    with torch.no_grad():
        logits = task.eval()(batch)
    found = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=-1, reduction="none")
    return found / math.log(2)


def _lines(folder: Path, measure: str) -> dict[int, tuple[int, float]]:
    with (folder / "losses.csv").open() as file:
        return {int(row["low"]): (int(row["count"]), float(row["bits"])) for row in csv.DictReader(file)
                if row["measure"] == measure}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_bits_by_position_are_those_counted_by_hand(packed: bool, tmp_path: Path) -> None:
    batches = [_batch(3, 70, 1, packed=packed), _batch(2, 40, 2, packed=packed)]
    task, trainer = _evaluate(tmp_path, [LossByPosition(2)], batches)
    lower = octaves(2)
    assert lower[:8] == [1, 2, 3, 4, 6, 8, 11, 16] and lower[-1] == 1 << 23
    found: dict[int, list[float]] = {}
    for batch in batches:
        bits = _nll(task, batch)
        for row in range(batch.shape[0]):
            place = 0
            for at in range(batch.shape[1]):
                fresh = packed and at and batch.segment_ids[row, at] != batch.segment_ids[row, at - 1]  # type: ignore[index]
                place = 0 if fresh else place
                if batch.targets[row, at] >= 0 and batch.loss_weight[row, at] > 0:  # type: ignore[index]
                    found.setdefault(max(low for low in lower if low <= place + 1), []).append(float(bits[row, at]))
                place += 1
    lines = _lines(tmp_path, "position")
    assert {low: count for low, (count, _) in lines.items()} == {low: len(values) for low, values in found.items()}
    for low, values in found.items():
        assert lines[low][1] == pytest.approx(sum(values) / len(values), abs=1e-4)
    total = sum(count * bits for count, bits in lines.values()) / sum(count for count, _ in lines.values())
    assert total == pytest.approx(float(trainer.callback_metrics["val/bits"]), abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_repeats_are_found_where_they_were_last(n: int, packed: bool) -> None:
    batch = _batch(4, 90, 3, symbols=3, packed=packed)
    known, last = previous(batch.tokens, batch.targets, n, batch.segment_ids)  # type: ignore[arg-type]
    for row in range(4):
        seen: dict[tuple[int, ...], int] = {}
        segment, start = None, 0
        for at in range(90):
            if batch.segment_ids is not None and int(batch.segment_ids[row, at]) != segment:
                segment, start, seen = int(batch.segment_ids[row, at]), at, {}
            usable = int(batch.targets[row, at]) >= 0 and at - start >= n - 2  # type: ignore[index]
            assert bool(known[row, at]) == usable
            if not usable:
                assert last[row, at] == -1
                continue
            gram = (*batch.tokens[row, at - n + 2 : at + 1].tolist(), int(batch.targets[row, at]))  # type: ignore[index]
            assert int(last[row, at]) == seen.get(gram, -1), (row, at)
            seen[gram] = at


def test_bits_of_repeats_and_of_the_rest_make_up_all(tmp_path: Path) -> None:
    batches = [_batch(3, 64, 5), _batch(3, 64, 6)]
    task, trainer = _evaluate(tmp_path, [Repeats(2)], batches)
    lines, far = _lines(tmp_path, "repeated"), _lines(tmp_path, "distance")
    found: dict[bool, list[float]] = {False: [], True: []}
    for batch in batches:
        _, last = previous(batch.tokens, batch.targets, 2)  # type: ignore[arg-type]
        counted = (batch.targets >= 0) & (batch.loss_weight > 0)  # type: ignore[operator]
        bits = _nll(task, batch)
        for repeated in (False, True):
            found[repeated] += bits[counted & ((last >= 0) == repeated)].tolist()
    for repeated, values in found.items():
        assert lines[int(repeated)][0] == len(values)
        assert lines[int(repeated)][1] == pytest.approx(sum(values) / len(values), abs=1e-4)
    assert sum(count for count, _ in far.values()) == lines[1][0]
    assert float(trainer.callback_metrics["val/bits_repeated"]) == pytest.approx(lines[1][1], abs=1e-4)
    with pytest.raises(ConfigError, match="n must be 2 or more, found 1"):
        Repeats(1)


class _Data(LightningDataModule):
    """Rows of 64 to test a model that was trained on rows of 16."""

    def __init__(self, batches: list[SequenceBatch], size: int = 260, length: int = 16) -> None:
        super().__init__()
        self.batches, self.length, self.targets = batches, length, "next"
        self.vocabulary = type("Vocabulary", (), {"size": size})

    def test_dataloader(self) -> DataLoader:
        return DataLoader(_Rows(self.batches), batch_size=None)


@pytest.mark.parametrize("length", [16, 64])
def test_rows_longer_than_those_of_training_are_told_apart_and_drawn(length: int, tmp_path: Path) -> None:
    batches = [_batch(3, 64, 5), _batch(3, 64, 6)]
    torch.manual_seed(0)
    task = CausalLM(BackboneConfig(512, 16, "a", {"a": lambda width: Attention(width, heads=2)}, layers=1))
    repeats = Repeats()
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[LossByPosition(), repeats], logger=False, accelerator="cpu",
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.test(task, datamodule=_Data(batches, length=length), verbose=False)
    assert repeats.n == 6  # bytes
    if length == 64:
        assert not (tmp_path / "position.png").exists() and "test/bits_beyond" not in trainer.callback_metrics
        return
    bits = torch.cat([_nll(task, batch) for batch in batches])
    counted = torch.cat([(batch.targets >= 0) & (batch.loss_weight > 0) for batch in batches])
    for name, here in (("trained", slice(0, 15)), ("beyond", slice(15, None))):  # bins: 1 to 15 tokens seen, 16 on
        wanted = bits[:, here][counted[:, here]].mean().item()
        assert float(trainer.callback_metrics[f"test/bits_{name}"]) == pytest.approx(wanted, abs=1e-4)
    assert (tmp_path / "position.png").read_bytes().startswith(b"\x89PNG")


def test_context_is_cut_off_and_nothing_else(tmp_path: Path) -> None:
    batch = _batch(4, 100, 7)
    batch.loss_weight = torch.ones(4, 100)
    batch.loss_weight[3, -3] = 0  # a row that cannot be scored whole
    batch.targets = torch.cat([batch.targets[:, :-1], torch.tensor([[1], [2], [3], [4]])], dim=1)  # type: ignore[index]
    task, trainer = _evaluate(tmp_path, [EffectiveContext(rows=9, scored=10, shortest=8, tolerance=1e-9)], [batch])
    lines = _lines(tmp_path, "context")
    assert sorted(lines) == [8, 16, 32, 64, 128] and {count for count, _ in lines.values()} == {30}
    for context, (_, bits) in lines.items():
        cut = SequenceBatch(batch.tokens[:3, -min(context, 90) - 10 :], batch.targets[:3, -min(context, 90) - 10 :])  # type: ignore[index]
        assert bits == pytest.approx(float(_nll(task, cut)[:, -10:].mean()), abs=1e-4)
    best = min(context for context, (_, bits) in lines.items() if bits <= lines[128][1] + 1e-9)
    assert float(trainer.callback_metrics["val/effective_context"]) == best


def test_bins_places_and_the_report(tmp_path: Path) -> None:
    bins = Bins([1, 4, 16])
    bins.add(torch.tensor([1, 3, 4, 15, 16, 10**6]), torch.arange(6.0))
    assert [(low, high, count) for low, high, count, _ in bins.rows()] == [(1, 3, 2), (4, 15, 2), (16, None, 2)]
    assert [bits for *_, bits in bins.rows()] == pytest.approx([x / math.log(2) for x in (0.5, 2.5, 4.5)])
    given = SequenceBatch(torch.zeros(1, 4, dtype=torch.int64), positions=torch.tensor([[7, 8, 9, 10]]))
    assert places(given).tolist() == [[7, 8, 9, 10]], "a window that goes on says where it is"

    path = tmp_path / "losses.csv"
    assert losses_section(RunRecord(tmp_path)) is None
    old = "10,val,position,1,1,5,9.0\n10,val,position,2,3,5,9.0\n"
    new = "20,val,position,1,1,5,2.0\n20,val,position,2,,5,1.5\n20,val,repeated,0,0,5,2.0\n20,val,distance,1,1,5,1.0\n"
    path.write_text("step,part,measure,low,high,count,bits\n" + old + new + "20,val,dist")
    read = read_losses(RunRecord(tmp_path))
    assert [one.bits for one in read["val", "position"]] == [2.0, 1.5], "of the last evaluation"
    page = losses_section(RunRecord(tmp_path))
    assert page is not None and page.count("<svg") == 2 and "Bits by position" in page and "Bits by context" not in page
