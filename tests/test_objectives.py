"""Objectives: what rows are made into, taken apart again by their signs; shares that follow rewards; exact resume."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from test_tasks import Data, trainer
from torch import Tensor

from seqlong.backbone import BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.mixers import Mamba2, PrefixAttention, PrefixMixer
from seqlong.optim import Optimizer
from seqlong.tasks import CausalLM, MixedObjectives, bandit
from seqlong.tasks.bandit import Bandit, Reward
from seqlong.tasks.objectives import Causal, Copy, FillMiddle, Infill, Objective, Prefix, ReadTwice, Retrieve

LENGTH, SIZES = 300, [[300], [1, 100, 40, 120, 39], [150, 110]]
FIRST = 1000  # signs; tokens of text are below
ALL = {"causal": Causal, "prefix": Prefix, "twice": ReadTwice, "copy": Copy, "middle": FillMiddle, "infill": Infill,
       "retrieve": Retrieve}  # fmt: skip


def packed(first: int = 0) -> tuple[SequenceBatch, list[tuple[int, int, int]]]:
    """Rows whose tokens are all different; one unknown, never to be predicted; padding in the last row."""
    rows = len(SIZES)
    tokens = torch.stack(
        [torch.randperm(900, generator=torch.Generator().manual_seed(row + first)) for row in range(rows)]
    )
    tokens = tokens[:, : LENGTH + 1] + 1
    ids = torch.zeros(rows, LENGTH, dtype=torch.int32)
    spans = []
    targets = torch.full((rows, LENGTH), -1)
    for row, sizes in enumerate(SIZES):
        at = 0
        for number, size in enumerate(sizes):
            ids[row, at : at + size] = number + 1
            goes_on = at + size == LENGTH  # predicts from beyond the row
            targets[row, at : at + size - 1 + goes_on] = tokens[row, at + 1 : at + size + goes_on]
            spans.append((row, at, at + size))
            at += size
    targets[:, 33] = -1
    weight = (targets >= 0).float() * 0.5
    index = torch.arange(first, first + rows)
    inputs = torch.where(ids == 0, 0, tokens[:, :-1])
    return SequenceBatch(tokens=inputs, targets=targets, loss_weight=weight, segment_ids=ids, index=index), spans


def config(pattern: str = "pa", size: int = FIRST + 8) -> BackboneConfig:
    mixers = {
        "a": partial(PrefixAttention, heads=2),
        "p": partial(PrefixMixer, mixer=partial(Mamba2, d_state=4, head_dim=8)),
    }
    return BackboneConfig(vocab_size=size, d_model=8, pattern=pattern, mixers=mixers)


def task(objectives: dict[str, Objective], **settings: Any) -> MixedObjectives:
    torch.manual_seed(0)
    return MixedObjectives(config(), objectives, first_sign=FIRST, **settings)


def cut(values: Tensor, sign: int) -> list[list[int]]:
    """The parts between a sign."""
    parts: list[list[int]] = [[]]
    for value in values.tolist():
        parts.append([]) if value == sign else parts[-1].append(value)
    return parts


@pytest.mark.parametrize("name", list(ALL))
def test_rows_taken_apart_are_the_text(name: str) -> None:
    """For 40 draws: every part comes from its document, asked is what the objective says, and with its weight."""
    module = task({name: ALL[name]()})
    seen = set()
    for first in range(0, 120, 3):
        batch, spans = packed(first)
        made = module.prepare(batch)
        assert made.tokens is not None and made.targets is not None and made.loss_weight is not None
        assert torch.equal(made.targets >= 0, made.loss_weight > 0)
        assert not made.loss_weight[batch.segment_ids == 0].any()
        for row, start, stop in spans:
            old, new = batch.tokens[row, start:stop], made.tokens[row, start:stop]
            asked = made.loss_weight[row, start:stop] > 0
            targets, prefix = made.targets[row, start:stop], made.prefix[row, start:stop]
            known = batch.targets[row, start:stop] >= 0
            assert torch.equal(targets[:-1][asked[:-1]], new[1:][asked[:-1]])  # predicts what stands behind it
            place = {token: at for at, token in enumerate(old.tolist())}
            told = [place.get(token, -1) for token in new.tolist()]  # places in the text, -1 for signs
            if stop - start < module.objectives[name].shortest or name == "causal":
                assert torch.equal(old, new) and torch.equal(asked, known) and not prefix.any()
                continue
            weights = made.loss_weight[row, start:stop]
            right = [1.0 if at < 0 else 0.5 * bool(known[at - 1]) * (at > 0) for at in told[1:]]
            assert all(w in (0, r) for w, r in zip(weights.tolist(), right, strict=False))
            can = torch.tensor([w > 0 for w in right])  # what could be asked of positions but the last
            check = CHECKS[name]
            check(module.objectives[name], told, asked, prefix, can, known)
            seen.add(tuple(told))
    assert name == "causal" or len(seen) > (1 if name == "prefix" else 100)


def _prefix(objective: Any, told: list[int], asked: Tensor, prefix: Tensor, can: Tensor, known: Tensor) -> None:
    size, length = int(prefix.sum()), len(told)
    assert told == list(range(length)) and prefix[:size].all()
    assert 0.1 * length - 1 <= size <= 0.9 * length
    wanted = known.clone()
    wanted[: size - 1] = False
    assert torch.equal(asked, wanted)


def _again(objective: Any, told: list[int], asked: Tensor, prefix: Tensor, can: Tensor, known: Tensor) -> None:
    size = told.index(-1)
    assert told == [*range(size), -1, *range(len(told) - size - 1)] and not prefix.any()
    assert 0.1 * len(told) - 1 <= size <= (len(told) - 1) // 2
    wanted = torch.zeros(len(told), dtype=torch.bool)
    begin = size if isinstance(objective, Copy) else 2 * size
    wanted[begin:-1] = can[begin:]
    assert torch.equal(asked, wanted)


def _middle(objective: Any, told: list[int], asked: Tensor, prefix: Tensor, can: Tensor, known: Tensor) -> None:
    assert told[0] == told[-1] == -1 and told.count(-1) == 4 and not prefix.any()
    assert torch.equal(asked[:-1], can) and not asked[-1]
    parts = cut(torch.tensor(told[1:-1]), -1)
    if parts[0] or told[1] != -1 or len(parts[2]) == 0:  # prefix first (or both forms the same)
        before, after, mid = parts
        assert [*before, *mid, *after] == list(range(len(told) - 4))
    else:  # suffix first: before and mid stand together
        _, after, both = parts
        assert [*both, *after] == list(range(len(told) - 4))


def _infill(objective: Any, told: list[int], asked: Tensor, prefix: Tensor, can: Tensor, known: Tensor) -> None:
    context = int(prefix.sum())
    assert prefix[:context].all() and told[context - 1] == -1
    shown, answers = cut(torch.tensor(told[: context - 1]), -1), cut(torch.tensor(told[context:]), -1)
    assert answers[-1] == [] and len(answers) == len(shown)
    filled = list(shown[0])
    for answer, rest in zip(answers, shown[1:], strict=False):
        filled += answer + rest
    assert filled == list(range(len(filled)))
    holes = sum(map(len, answers))
    assert 1 <= holes <= 0.45 * len(told) and len(filled) + 2 * len(answers) - 1 == len(told)
    wanted = torch.zeros(len(told), dtype=torch.bool)
    wanted[context - 1 : -1] = can[context - 1 :]
    assert torch.equal(asked, wanted)


def _retrieve(objective: Any, told: list[int], asked: Tensor, prefix: Tensor, can: Tensor, known: Tensor) -> None:
    each = objective.key + objective.copied
    context, *questions = cut(torch.tensor(told), -1)
    assert context == list(range(len(context))) and prefix.sum() == len(context) and prefix[: len(context)].all()
    assert questions and 0.5 * len(told) < len(context)
    for question in questions:
        assert question == list(range(question[0], question[0] + each)) and question[-1] < len(context)
    wanted = torch.zeros(len(told), dtype=torch.bool)
    for number in range(len(questions)):
        begin = len(context) + number * (each + 1) + objective.key
        wanted[begin : begin + objective.copied] = True
    wanted[:-1] &= can
    assert torch.equal(asked, wanted)


CHECKS = {
    "prefix": _prefix,
    "twice": _again,
    "copy": _again,
    "middle": _middle,
    "infill": _infill,
    "retrieve": _retrieve,
}


def test_both_forms_of_the_middle_come_up_as_often_as_asked() -> None:
    for share in (0.0, 1.0, 0.5):
        module = task({"middle": FillMiddle(suffix_first=share)})
        second = torch.cat([module.prepare(packed(first)[0]).tokens[[0, 2], 1] for first in range(0, 300, 3)])
        found = (second == FIRST + 1).double().mean().item()
        assert abs(found - share) < (0.1 if share == 0.5 else 0.03)  # the first part may be empty


def test_rows_do_not_depend_on_who_makes_them() -> None:
    """The draws are of sample numbers: other batches, or ranks, make the same of a row."""
    module = task({name: make() for name, make in ALL.items()})
    batch, _ = packed(6)
    whole = module.prepare(batch)
    for row in range(3):
        one = {name: v[row : row + 1] for name, v in vars(batch).items() if isinstance(v, Tensor)}
        alone = module.prepare(dataclasses.replace(batch, **one))
        for name in ("tokens", "targets", "loss_weight", "prefix"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[row])


def test_shares_are_kept_and_evaluation_is_of_the_next_token() -> None:
    module = task({"causal": Causal(3.0), "copy": Copy(1.0)})
    changed = []
    for first in range(0, 600, 3):
        batch, _ = packed(first)
        changed.append(bool((module.prepare(batch).tokens[0] != batch.tokens[0]).any()))
    assert abs(sum(changed) / len(changed) - 0.25) < 0.08
    module.eval()
    assert torch.equal(module.prepare(batch).tokens, batch.tokens)
    asking = task({"causal": Causal(3.0), "copy": Copy(1.0)}, evaluate="copy").eval()
    assert (asking.prepare(batch).tokens == FIRST).any(1).all()


def test_only_signs_in_use_need_ids() -> None:
    both = {"middle": FillMiddle(), "infill": Infill(), "twice": ReadTwice(), "copy": Copy()}
    names = ["prefix", "suffix", "middle", "end", "gap", "fill", "again"]
    assert task(both).describe()["signs"] == {name: FIRST + at for at, name in enumerate(names)}
    with pytest.raises(ConfigError, match=r"7 signs .*ids 1002 to 1008.*set model.backbone.vocab_size=1009"):
        MixedObjectives(config(), both, first_sign=1002)
    MixedObjectives(config(size=FIRST), {"prefix": Prefix()}, first_sign=FIRST)  # none at all


def test_gradients_reach_both_readings_of_a_prefix() -> None:
    module = task({"prefix": Prefix()})
    batch = module.prepare(packed()[0])
    both = module.backbone(batch).hidden
    one_way = module.backbone(dataclasses.replace(batch, prefix=None)).hidden
    differs = (both - one_way).abs().sum(-1) > 0
    assert differs[batch.prefix].float().mean() > 0.9 and not torch.equal(both, one_way)
    loss, _ = module.objective(packed()[0])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


# --- shares that follow rewards ---------------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    made = Bandit([1.0, 3.0], Reward(every=1, momentum=0.5, sharpness=2.0, floor=0.2))
    assert made.shares.tolist() == pytest.approx([0.25, 0.75])

    def period(first: float, second: float) -> None:
        nats, asked = torch.tensor([first * 10, second * 4]), torch.tensor([10.0, 4.0])
        made.add(torch.tensor([0, 1]), nats, asked)

    period(2.0, 4.0)
    assert made.shares.tolist() == pytest.approx([0.25, 0.75])  # nothing to compare with
    assert made.bits.tolist() == pytest.approx([2 / math.log(2), 4 / math.log(2)])
    period(1.0, 3.6)  # gained a half, and a tenth: values 0.5 · 1, 0.5 · 0.2
    first, second = 0.25 * math.exp(2 * 0.5), 0.75 * math.exp(2 * 0.1)
    wanted = 0.2 * 0.25 + 0.8 * first / (first + second)
    assert made.shares.tolist() == pytest.approx([wanted, 1 - wanted])
    period(1.1, math.nan)  # worse, and one that went wrong: it keeps what it had
    assert made.shares.isfinite().all() and made.shares[0] < wanted


def test_an_objective_that_nobody_drew_keeps_its_value() -> None:
    made = Bandit([1.0, 1.0], Reward(every=1))
    for loss in (3.0, 2.0):
        made.add(torch.tensor([0, 1]), torch.tensor([loss, 2.0]), torch.ones(2))
    before = made._values.clone()
    made.add(torch.tensor([0, 0]), torch.tensor([1.0, 1.0]), torch.ones(2))
    assert made._values[1] == before[1] and made._values[0] > before[0]


def test_ranks_agree_and_a_checkpoint_has_the_sums_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Bandit([1.0, 1.0], Reward(every=2)) for _ in range(2)]
    one = Bandit([1.0, 1.0], Reward(every=2))
    monkeypatch.setattr(bandit, "world", lambda: (0, 2))
    others: list[Tensor] = []
    monkeypatch.setattr(bandit.dist, "all_reduce", lambda value: value.add_(others.pop()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        parts = [(torch.randint(2, (3,), generator=generator), torch.rand(3, generator=generator)) for _ in range(2)]
        asked = torch.ones(3)
        others[:] = [ranks[1]._sums + _table(parts[1])]
        before = ranks[1]._batches
        ranks[0].add(parts[0][0], parts[0][1], asked)
        others[:] = [ranks[0]._sums + 0 if before == 0 else torch.zeros(2, 2).double()]
        ranks[1]._sums, ranks[1]._batches = (
            (torch.zeros(2, 2).double(), 0) if before == 1 else (ranks[1]._sums + _table(parts[1]), before + 1)
        )
        monkeypatch.setattr(bandit, "world", lambda: (0, 1))
        one.add(torch.cat([parts[0][0], parts[1][0]]), torch.cat([parts[0][1], parts[1][1]]), torch.ones(6))
        monkeypatch.setattr(bandit, "world", lambda: (0, 2))
    assert torch.allclose(ranks[0].shares, one.shares)
    others[:] = [ranks[1]._sums]
    saved = ranks[0].saved()
    assert torch.allclose(saved["sums"], one._sums)
    for rank, wanted in ((0, saved["sums"]), (1, torch.zeros(2, 2))):
        monkeypatch.setattr(bandit, "world", lambda rank=rank: (rank, 2))
        again = Bandit([1.0, 1.0], Reward(every=2))
        again.load(saved)
        assert torch.equal(again._sums, wanted.double()) and again._batches == one._batches


def _table(part: tuple[Tensor, Tensor]) -> Tensor:
    return torch.zeros(2, 2).double().index_add_(1, part[0], torch.stack([part[1], torch.ones(3)]).double())


OBJECTIVES = {"causal": Causal, "twice": ReadTwice, "middle": FillMiddle}


def fit(folder: Path, steps: int, resume: Path | None = None, **settings: Any) -> tuple[Any, MixedObjectives]:
    torch.manual_seed(0)
    mixers = {"m": partial(Mamba2, d_state=4, head_dim=8)}
    backbone = BackboneConfig(vocab_size=16, d_model=8, pattern="m", mixers=mixers)
    objectives = {name: make() for name, make in OBJECTIVES.items()}
    reward = Reward(every=2, sharpness=3.0)
    module = MixedObjectives(backbone, objectives, first_sign=9, reward=reward, optimizer=Optimizer(lr=0.02))
    made = trainer(folder, steps, **settings)
    made.fit(module, datamodule=Data("next"), ckpt_path=resume, weights_only=True)
    return made, module


def test_a_run_goes_on_exactly_with_its_shares(tmp_path: Path) -> None:
    """Saved within a period of the bandit, after shares moved."""
    whole, expected = fit(tmp_path, 9)

    class SaveAndStop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "five.ckpt")
                trainer.should_stop = True

    fit(tmp_path, 9, callbacks=[SaveAndStop()])
    saved = torch.load(tmp_path / "five.ckpt", weights_only=True)["seqlong_objectives"]
    assert saved["batches"] == 1 and saved["values"].any()
    after, found = fit(tmp_path, 9, resume=tmp_path / "five.ckpt")
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=1e-7)
    assert torch.equal(found.bandit.shares, expected.bandit.shares)
    shares = {row["train/share_middle"] for row in whole.logger.rows if "train/share_middle" in row}
    assert len(shares) > 1
    assert any("train/bits_twice" in row for row in after.logger.rows)


def test_without_other_objectives_it_is_causal_modelling() -> None:
    backbone = config("p")
    torch.manual_seed(0)
    plain = CausalLM(backbone)
    torch.manual_seed(0)
    mixed = MixedObjectives(backbone, {"causal": Causal()}, first_sign=FIRST)
    batch, _ = packed()
    assert torch.equal(plain.objective(batch)[0], mixed.objective(batch)[0])


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: task({}), "task.objectives is empty"),
        (lambda: task({"copy": Copy()}, evaluate="cpoy"), "task.evaluate is 'cpoy'.*copy"),
        (lambda: task({"copy": Copy(weight=0.0)}), "weights of 0 or more, and one above"),
        (lambda: Infill(rate=0.7), "rate 0.7"),
        (lambda: Copy(weight=-1.0), "weight -1"),
        (lambda: FillMiddle(suffix_first=2.0), "suffix_first 2"),
        (lambda: Bandit([1.0], Reward(momentum=1.0)), "momentum"),
        (lambda: task({"copy": Copy()}).prepare(dataclasses.replace(packed()[0], index=None)), "with index"),
    ],
    ids=["none", "evaluate", "weights", "rate", "weight", "share", "reward", "index"],
)
def test_wrong_settings(make: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make()
