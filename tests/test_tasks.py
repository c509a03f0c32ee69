"""Tasks: the loss is that of the whole batch on any number of ranks; runs go on exactly; checkpoints are plain."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from seqlong.backbone import BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.metrics import Accuracy, BitsPerToken, RunningSums
from seqlong.mixers import Attention, Bidirectional, Mamba2
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks import CausalLM, MaskedLM, SequenceTask

MAMBA = partial(Mamba2, d_state=4, head_dim=4)
ROWS, LENGTH = 4, 24


def config(pattern: str = "ma", **settings: Any) -> BackboneConfig:
    mixers = {
        "m": MAMBA,
        "a": partial(Attention, heads=2, window=5),
        "f": partial(Attention, heads=2),
        "b": partial(Bidirectional, mixer=MAMBA),
    }
    used = {letter: mixers[letter] for letter in pattern}
    return BackboneConfig(vocab_size=16, d_model=8, pattern=pattern, mixers=used, **settings)  # type: ignore[arg-type]


def make(kind: str, **settings: Any) -> SequenceTask:
    torch.manual_seed(0)
    if kind == "causal":
        return CausalLM(config(), **settings)
    return MaskedLM(config("ba"), **{"rate": 0.4, "span": 2.0, **settings})


def rows(targets: str, first: int = 0, continues: bool | None = None) -> SequenceBatch:
    """A batch whose rows weigh very unequally, and whose last row begins with unknown tokens."""
    generator = torch.Generator().manual_seed(first + 1)
    tokens = torch.randint(4, 8, (ROWS, LENGTH + 1), generator=generator)
    weight = torch.tensor([1.0, 0.1, 0.5, 0.02])[:, None].repeat(1, LENGTH)
    weight[3, :7] = 0
    after = tokens[:, 1:] if targets == "next" else tokens[:, :-1]
    return SequenceBatch(
        tokens=tokens[:, :-1],
        targets=after.masked_fill(weight == 0, -1),
        loss_weight=weight,
        continues=None if continues is None else torch.full((ROWS,), continues),
        index=torch.arange(first, first + ROWS),
        source=[f"chr1:{number}" for number in range(ROWS)],
    )


def of_rank(batch: SequenceBatch, rank: int, ranks: int) -> SequenceBatch:
    cut = {name: value[rank::ranks] for name, value in vars(batch).items() if value is not None}
    return dataclasses.replace(batch, **cut)


def gradients(task: SequenceTask) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


# --- one rank against two ------------------------------------------------------------------------------------------


def measure(rank: int, ranks: int) -> dict[str, Any]:
    """Loss, gradients as DDP averages them, metrics, and the carried state, of this rank's rows."""
    found: dict[str, Any] = {}

    def over_ranks(value: Tensor) -> Tensor:
        if ranks > 1:
            torch.distributed.all_reduce(value)
        return value / ranks

    for kind, targets in (("causal", "next"), ("masked", "same")):
        task = make(kind)
        batch = of_rank(rows(targets), rank, ranks)
        loss, figures = task.objective(batch)
        loss.backward()
        sums = RunningSums()
        sums.add(loss=loss, **figures)
        found[kind] = {
            "loss": over_ranks(loss.detach()),
            "gradients": {name: over_ranks(value) for name, value in gradients(task).items()},
            "sums": {name: value for name, value in sums.read().items() if name != "loss"},
        }
        prepared = task.prepare(batch)
        assert prepared.targets is not None and prepared.loss_weight is not None
        with torch.no_grad():
            hidden = task.backbone(prepared).hidden
            nll, best = task.head.loss(hidden, prepared.targets), task.head.most_likely(hidden)
        counted = prepared.targets >= 0
        bits, accuracy = BitsPerToken(), Accuracy()
        bits.update(nll, counted)
        accuracy.update(best, prepared.targets, counted)
        found[kind] |= {"bits": bits.compute(), "accuracy": accuracy.compute()}
    task = make("causal", carry_state=True)
    assert task.carried is not None
    with torch.no_grad():
        for number in range(2):
            task.objective(of_rank(rows("next", number * ROWS, continues=True), rank, ranks))
    found["carried"] = task.carried.saved()
    return found


RANK = """
import sys, torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}/meet", rank=rank, world_size=2)
from test_tasks import measure
torch.save(measure(rank, 2), f"{sys.argv[3]}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    here = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([sys.executable, "-c", RANK, here, str(rank), str(folder)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_two_ranks_have_the_loss_the_gradients_and_the_figures_of_one(kind: str, two_ranks: list[dict]) -> None:
    whole = measure(0, 1)[kind]
    assert whole["sums"]["count"] > 20
    for found in two_ranks:
        assert found[kind].keys() == whole.keys()
        torch.testing.assert_close(found[kind], whole, rtol=1e-6, atol=1e-6)


def test_carried_state_is_saved_in_the_order_of_the_whole_batch(two_ranks: list[dict]) -> None:
    whole = measure(0, 1)["carried"]
    assert whole["length"] == LENGTH and len(whole["tensors"]) == 2 + 3 + 1  # Mamba2, attention, position
    for found in two_ranks:
        torch.testing.assert_close(found["carried"], whole, rtol=1e-6, atol=1e-6)


# --- what the loss is ------------------------------------------------------------------------------------------------


def test_loss_is_the_weighted_mean_and_bits_count_positions_once() -> None:
    task, batch = make("causal"), rows("next")
    assert batch.targets is not None and batch.loss_weight is not None
    nll = F.cross_entropy(task(batch).flatten(0, 1), batch.targets.flatten(), ignore_index=-1, reduction="none")
    weight = batch.loss_weight.flatten()
    loss, figures = task.objective(batch)
    assert loss.item() == pytest.approx(((nll * weight).sum() / weight.sum()).item(), rel=1e-5)
    known = batch.targets.flatten() >= 0
    assert figures["nats"].item() == pytest.approx(nll[known].sum().item(), rel=1e-5)
    assert figures["count"].item() == ROWS * LENGTH - 7
    unweighted = dataclasses.replace(batch, loss_weight=None)
    assert task.objective(unweighted)[0].item() == pytest.approx(nll[known].mean().item(), rel=1e-5)
    heavy = dataclasses.replace(batch, loss_weight=torch.ones_like(batch.loss_weight))  # also where there is no target
    assert task.objective(heavy)[0].item() == pytest.approx(nll[known].mean().item(), rel=1e-5)
    nothing = dataclasses.replace(batch, loss_weight=torch.zeros_like(batch.loss_weight))
    assert task.objective(nothing)[0].item() == 0


def test_auxiliary_losses_are_added_and_all_figures_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    task, batch = make("causal"), rows("next")
    plain = task.objective(batch)[0]
    inner = task.backbone.forward

    def with_figures(*arguments: Any) -> Any:
        aux = {"balance_loss": task.backbone.norm.weight.sum(), "load": torch.tensor(7.0)}
        return dataclasses.replace(inner(*arguments), aux=aux)

    monkeypatch.setattr(task.backbone, "forward", with_figures)
    loss, figures = task.objective(batch)
    assert loss.item() == pytest.approx(plain.item() + 8.0)  # eight norm weights of one
    assert {name: value.item() for name, value in figures.items() if "aux" in name} == {
        "aux_balance_loss": 8.0,
        "aux_load": 7.0,
    }


def test_z_loss_is_for_training_only() -> None:
    batch = rows("next")
    plain, held = make("causal"), make("causal", z_loss=0.1)
    squares = plain(batch).logsumexp(dim=-1).square()
    assert batch.loss_weight is not None
    mean = (squares * batch.loss_weight).sum() / batch.loss_weight.sum()
    assert (held.objective(batch)[0] - plain.objective(batch)[0]).item() == pytest.approx(0.1 * mean.item(), rel=1e-4)
    torch.testing.assert_close(held.predict_step(batch, 0)["nll"], plain.predict_step(batch, 0)["nll"])


def test_masked_targets_stay_at_hidden_positions_only() -> None:
    task, batch = make("masked"), rows("same")
    seen = task.prepare(batch)
    assert batch.tokens is not None and batch.targets is not None and batch.loss_weight is not None
    assert seen.tokens is not None and seen.targets is not None
    hidden = seen.targets >= 0
    assert torch.equal(seen.targets[hidden], batch.targets[hidden]) and 10 < hidden.sum() < 60
    assert torch.equal(seen.tokens[~hidden], batch.tokens[~hidden])
    assert bool((seen.tokens == 1).any()) and not bool(hidden[batch.loss_weight == 0].any())
    again = task.prepare(batch)
    assert torch.equal(again.tokens, seen.tokens) and torch.equal(again.targets, seen.targets)
    assert not torch.equal(make("masked", seed=1).prepare(batch).tokens, seen.tokens)
    first = torch.arange(LENGTH).expand(ROWS, -1) < 12
    for spared in (
        dataclasses.replace(batch, loss_weight=torch.where(first, 0.0, 1.0), targets=batch.tokens),
        dataclasses.replace(batch, loss_weight=None, targets=batch.tokens.masked_fill(first, -1)),
    ):
        seen = task.prepare(spared)
        assert seen.tokens is not None and seen.targets is not None
        assert torch.equal(seen.tokens[first], batch.tokens[first]) and not bool((seen.targets[first] >= 0).any())
        assert bool((seen.targets >= 0).any())


def test_prediction_gives_each_position_and_drops_rows_that_fill_up() -> None:
    task, batch = make("causal"), rows("next")
    assert batch.index is not None
    batch.index[1] = -1
    found = task.predict_step(batch, 0)
    assert found["index"].tolist() == [0, 2, 3] and found["source"] == ["chr1:0", "chr1:2", "chr1:3"]
    assert found["nll"].shape == found["targets"].shape == found["loss_weight"].shape == (3, LENGTH)
    logs = task(batch)[2, 5].log_softmax(dim=-1)
    assert found["nll"][1, 5].item() == pytest.approx(-logs[found["targets"][1, 5]].item(), rel=1e-5)


# --- heads -----------------------------------------------------------------------------------------------------------


def test_a_tied_head_has_no_weight_of_its_own() -> None:
    tied, own = make("causal"), make("causal", tie_embeddings=False)
    assert tied.head.matrix is tied.backbone.embedding.weight
    assert not [name for name in tied.state_dict() if name.startswith("head")]
    assert own.state_dict()["head.weight"].shape == (16, 8)
    assert own.head.matrix is own.head.weight is not own.backbone.embedding.weight


# --- carried state ---------------------------------------------------------------------------------------------------


def test_carried_state_makes_two_windows_one_row_and_stops_gradients() -> None:
    batch = rows("next")
    halves = [
        SequenceBatch(
            tokens=batch.tokens[:, cut],  # type: ignore[index]
            targets=batch.targets[:, cut],  # type: ignore[index]
            continues=torch.full((ROWS,), follows),
        )
        for cut, follows in ((slice(0, 12), False), (slice(12, 24), True))
    ]
    task = make("causal", carry_state=True)
    whole = make("causal").backbone(batch).hidden
    assert task.carried is not None
    parts = [task.carried.run(task.backbone, half).hidden for half in halves]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    parts[0].sum().backward()
    parts[1].sum().backward()  # does not reach into the graph of the first window, which is gone
    fresh = task.carried.run(task.backbone, halves[0]).hidden  # continues is False
    torch.testing.assert_close(fresh, whole[:, :12], rtol=1e-5, atol=1e-5)
    shorter = dataclasses.replace(
        halves[1],
        tokens=halves[1].tokens[:, :7],  # type: ignore[index]
        targets=halves[1].targets[:, :7],  # type: ignore[index]
    )
    after_change = task.carried.run(task.backbone, shorter).hidden
    alone = make("causal").backbone(dataclasses.replace(shorter, continues=None)).hidden
    torch.testing.assert_close(after_change, alone, rtol=1e-5, atol=1e-5)


def test_carried_state_refuses_what_cannot_carry_it() -> None:
    with pytest.raises(ConfigError, match=r"block 2 is Attention, which keeps every token"):
        CausalLM(config("mf"), carry_state=True)
    with pytest.raises(ConfigError, match=r"set data\.order=stream"):
        make("causal", carry_state=True).objective(rows("next"))


# --- with a trainer --------------------------------------------------------------------------------------------------


class Numbers(Sampler[int]):
    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Any:
        return iter(range(self.first, 10**9))

    def __len__(self) -> int:
        return 10**9


class Batches(Dataset[SequenceBatch]):
    def __init__(self, targets: str) -> None:
        self.targets_kind = targets

    def __getitem__(self, number: int) -> SequenceBatch:
        return rows(self.targets_kind, number * ROWS, continues=number % 3 > 0)

    def __len__(self) -> int:
        return 2


class Data(LightningDataModule):
    def __init__(self, targets: str, **facts: Any) -> None:
        super().__init__()
        self.targets, self.first = targets, 0
        self.__dict__.update(facts)

    def state_dict(self) -> dict[str, int]:
        assert self.trainer is not None
        return {"first": self.trainer.fit_loop.epoch_loop.batch_progress.total.processed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.first = state_dict["first"]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Batches(self.targets), batch_size=None, sampler=Numbers(self.first))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Batches(self.targets), batch_size=None)


class Recorder:
    """A logger that keeps rows in memory."""

    def __new__(cls) -> Any:
        from lightning.pytorch.loggers.logger import DummyLogger

        class Kept(DummyLogger):
            def __init__(self) -> None:
                super().__init__()
                self.rows: list[dict[str, float]] = []
                self.step: Any = None

            def log_metrics(self, metrics: Any, step: int | None = None) -> None:
                self.rows.append({"step": self.step(), **{k: v for k, v in metrics.items() if k != "epoch"}})

        return Kept()


def trainer(folder: Path, steps: int, **settings: Any) -> Trainer:
    recorder = Recorder()
    made = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=recorder, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        gradient_clip_val=1.0, default_root_dir=str(folder), check_val_every_n_epoch=None,
        **{"log_every_n_steps": 3, "val_check_interval": 4, **settings},
    )  # fmt: skip
    recorder.step = lambda: made.global_step
    return made


FITS = {"causal": {}, "masked": {}, "carrying": {"carry_state": True}}


def fit(kind: str, folder: Path, steps: int, resume: Path | None = None, **settings: Any) -> tuple[Trainer, Any]:
    task = make("masked" if kind == "masked" else "causal", optimizer=Optimizer(lr=0.02), **FITS[kind])
    made = trainer(folder, steps, **settings)
    made.fit(task, datamodule=Data(task.targets), ckpt_path=resume, weights_only=True)
    return made, task


@pytest.mark.parametrize("kind", list(FITS))
def test_a_run_goes_on_exactly_in_the_middle_of_its_schedule_and_of_its_log(kind: str, tmp_path: Path) -> None:
    """Saved after step 5: between two rows of the log, in the fall of the cosine, within a stretch of rows."""
    whole, expected = fit(kind, tmp_path, 9)

    class SaveAndStop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "five.ckpt")
                trainer.should_stop = True

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            # Lightning's count is wrong after a resume at a validation; here more so.
            checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] = 0

    fit(kind, tmp_path, 9, callbacks=[SaveAndStop()])
    plain = torch.load(tmp_path / "five.ckpt", weights_only=True)  # tensors and primitives only
    assert "hyper_parameters" not in plain and plain["seqlong_sums"]["batches"] == 2
    after, found = fit(kind, tmp_path, 9, resume=tmp_path / "five.ckpt")
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=1e-7)
    rows_of = {row["step"]: row for row in whole.logger.rows if "train/loss" in row}  # type: ignore[union-attr]
    rest = {row["step"]: row for row in after.logger.rows if "train/loss" in row}  # type: ignore[union-attr]
    assert list(rows_of) == [3, 6, 9] and list(rest) == [6, 9]
    for step, row in rest.items():
        assert row == pytest.approx(rows_of[step], abs=1e-6)
    assert rows_of[6]["lr"] == pytest.approx(0.02 * Schedule().factor(5, 9))
    assert rows_of[6].keys() == {"step", "train/loss", "train/bits", "train/length", "lr"}


def test_a_row_of_the_log_is_the_mean_since_the_row_before(tmp_path: Path) -> None:
    every, _ = fit("causal", tmp_path, 6, log_every_n_steps=1)
    thirds, _ = fit("causal", tmp_path, 6)
    single = [row["train/loss"] for row in every.logger.rows if "train/loss" in row]  # type: ignore[union-attr]
    means = [row["train/loss"] for row in thirds.logger.rows if "train/loss" in row]  # type: ignore[union-attr]
    assert len(single) == 6
    assert means == pytest.approx([sum(single[:3]) / 3, sum(single[3:]) / 3], rel=1e-5)


def test_accumulated_batches_are_averaged_and_logged_once_a_step(tmp_path: Path) -> None:
    """Each batch is divided by its own weight."""
    made, _ = fit("causal", tmp_path, 1, accumulate_grad_batches=2, log_every_n_steps=1)
    row = next(row for row in made.logger.rows if "train/loss" in row)  # type: ignore[union-attr]
    fresh = make("causal")
    found = [fresh.objective(rows("next", number * ROWS)) for number in range(2)]
    assert row["train/loss"] == pytest.approx(sum(loss.item() for loss, _ in found) / 2, rel=1e-5)
    nats, count = (sum(figures[name].item() for _, figures in found) for name in ("nats", "count"))
    assert row["train/bits"] == pytest.approx(nats / count / math.log(2), rel=1e-5) and row["step"] == 1


def test_training_learns_and_evaluation_reports(tmp_path: Path) -> None:
    made, task = fit("causal", tmp_path, 40, val_check_interval=20)
    values = [row["val/bits"] for row in made.logger.rows if "val/bits" in row]  # type: ignore[union-attr]
    assert len(values) == 2 and values[-1] < 2.3  # from 4 for 16 tokens, to 2 for the four that occur
    last = made.callback_metrics
    nll = [task.predict_step(rows("next", number * ROWS), 0) for number in range(2)]
    nats = sum(found["nll"].sum().item() for found in nll)
    count = sum((found["targets"] >= 0).sum().item() for found in nll)
    assert last["val/bits"].item() == pytest.approx(nats / count / math.log(2), rel=1e-5)
    assert 0 < last["val/accuracy"].item() < 1


def test_compiling_is_once_a_block_and_changes_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr("seqlong.block.Block.compile", lambda block: compiled.append(block))
    task = make("causal", compile=True)
    names = set(task.state_dict())
    task.configure_model()
    task.configure_model()
    assert compiled == list(task.backbone.blocks) and set(task.state_dict()) == names
    make("causal").configure_model()
    assert len(compiled) == 2


class Vocabulary:
    size, mask, replacements = 16, 1, (4, 5, 6, 7)


def altered(**facts: Any) -> Any:
    return type("Other", (Vocabulary,), facts)()


@pytest.mark.parametrize(
    ("kind", "data", "complaint"),
    [
        ("causal", {"targets": "same"}, r"but data\.targets is 'same'; set data\.targets=next"),
        ("masked", {"targets": "next"}, r"set data\.targets=same"),
        (
            "causal",
            {"vocabulary": altered(size=300)},
            r"300 symbols.*vocabulary 16; set model\.backbone\.vocab_size=300",
        ),
        ("masked", {"vocabulary": altered(mask=3)}, r"whose mask is 3.*set task\.mask_token=3"),
        ("masked", {"vocabulary": altered(replacements=(9,))}, r"task\.replacements=\[9\]"),
    ],
)
def test_data_made_for_something_else(kind: str, data: dict, complaint: str, tmp_path: Path) -> None:
    task = make(kind)
    facts = {"targets": task.targets, "vocabulary": Vocabulary(), **data}
    with pytest.raises(ConfigError, match=complaint):
        trainer(tmp_path, 1).fit(task, datamodule=Data(**facts))


def test_wrong_mixers_for_the_task(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"block 1 \(Bidirectional\) sees it; make every mixer causal"):
        CausalLM(config("bm"))
    with caplog.at_level("WARNING", logger="seqlong"):
        MaskedLM(config("ba"))
        assert not caplog.records
        MaskedLM(config("ma"))
    assert "guessed from the left side alone" in caplog.text
    with pytest.raises(ConfigError, match=r"set data\.targets=next"):
        make("causal").objective(dataclasses.replace(rows("next"), targets=None))
    with pytest.raises(ConfigError, match="index"):
        make("masked").objective(dataclasses.replace(rows("same"), index=None))
