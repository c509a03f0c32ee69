"""Rows of training that start from a state: whose it is, how noise is made, exact resume."""

from __future__ import annotations

import dataclasses
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
from seqlong.errors import CheckpointError, ConfigError
from seqlong.mixers import GLA, Attention, Mamba2
from seqlong.optim import Optimizer
from seqlong.tasks import CausalLM, starting
from seqlong.tasks.starting import StartingStates

MIXERS = {
    "m": partial(Mamba2, d_state=4, head_dim=4),
    "g": partial(GLA, heads=2),
    "a": partial(Attention, heads=2, window=3),
}


def task(pattern: str = "mga", **settings: Any) -> CausalLM:
    torch.manual_seed(0)
    backbone = BackboneConfig(vocab_size=16, d_model=8, pattern=pattern, mixers=MIXERS)
    return CausalLM(backbone, **{"start": "passed", "start_share": 1.0, **settings})


def batch(first: int, rows: int = 4, length: int = 10) -> SequenceBatch:
    tokens = torch.randint(4, 8, (rows, length + 1), generator=torch.Generator().manual_seed(first))
    return SequenceBatch(tokens=tokens[:, :-1], targets=tokens[:, 1:], index=torch.arange(first, first + rows))


def joined(one: SequenceBatch, two: SequenceBatch) -> SequenceBatch:
    return SequenceBatch(tokens=torch.cat([one.inputs, two.inputs], dim=1))


def test_a_passed_state_is_that_of_the_row_before_without_its_gradient() -> None:
    """With recurrences alone, the second row is what stands behind the first in a longer one."""
    module = task("mg").double()
    first, second = batch(0), batch(4)
    assert module.starting is not None
    module.starting.run(module.backbone, first)
    found = module.starting.run(module.backbone, second).hidden
    whole = module.backbone(joined(first, second)).hidden[:, 10:]
    assert (found - whole).abs().max() < 1e-10
    alone = module.backbone(second).hidden
    assert (found - alone).abs().amax(dim=(1, 2)).min() > 1e-4
    module.objective(first)[0].backward()  # no graph of the batch before is kept, which would be an error here
    module.zero_grad()
    module.objective(second)[0].backward()


def test_only_the_chosen_rows_start_so_and_the_choice_is_of_the_sample() -> None:
    module = task("m", start_share=0.5).double()
    assert module.starting is not None
    started = []
    for number in range(1, 11):
        module.starting.run(module.backbone, batch(0))
        now = batch(4 * number)
        found, alone = module.starting.run(module.backbone, now).hidden, module.backbone(now).hidden
        started += ((found - alone).abs().amax(dim=(1, 2)) > 1e-9).tolist()
        again = module.starting.run(module.backbone, dataclasses.replace(now, index=now.index.flip(0)))
        differs = (again.hidden - alone).abs().amax(dim=(1, 2)) > 1e-9
        assert differs.tolist() == started[-4:][::-1]
    assert 0.3 < sum(started) / len(started) < 0.7


def test_attention_starts_as_always() -> None:
    """A window that saw the row before would see other tokens."""
    module = task("am").double()
    assert module.starting is not None
    module.starting.run(module.backbone, batch(0))
    second = batch(4)
    module.backbone.blocks[1] = torch.nn.Identity()  # the attention alone
    wanted = module.backbone.blocks[0](module.backbone.embedding(second.inputs), _layout(second))[0]
    module = task("am").double()
    assert module.starting is not None
    module.starting.run(module.backbone, batch(0))
    held: list[Tensor] = []
    module.backbone.blocks[0].register_forward_hook(lambda block, given, out: held.append(out[0]))
    module.starting.run(module.backbone, second)
    assert (held[0] - wanted).abs().max() < 1e-10


def _layout(batch: SequenceBatch) -> Any:
    from seqlong.layout import SequenceLayout

    return SequenceLayout.build(*batch.shape)


def test_noise_has_the_mean_and_deviation_of_states() -> None:
    """By head; other rows and places draw other numbers; nothing is drawn before there is a state."""
    made = StartingStates("noise", 1.0, 0)
    states = [torch.randn(64, 2, 16, 8) * torch.tensor([1.0, 3.0])[:, None, None] + 2, torch.randn(64, 3) - 5]
    own = [torch.zeros(64, dtype=torch.int64), *states]
    every = torch.ones(64, dtype=torch.bool)
    zero = [torch.zeros_like(one) for one in own]
    assert made._starts(zero, torch.arange(64), every) is zero
    made._remember(own, every)
    position, heads, narrow = made._starts(zero, torch.arange(64), every)
    assert not position.any()
    for head, deviation in ((0, 1.0), (1, 3.0)):
        assert abs(heads[:, head].mean() - 2) < 0.1 * deviation
        assert abs(heads[:, head].std() / deviation - 1) < 0.05
    assert (narrow.mean(0) + 5).abs().max() < 0.5 and (narrow.std(0) - 1).abs().max() < 0.4
    flat = heads[:, 0].flatten(1)
    assert len(flat.flatten().unique()) > 0.99 * flat.numel()
    again = made._starts(zero, torch.arange(32, 96), every)
    assert torch.equal(again[1][:32], heads[32:])


def test_states_that_are_not_finite_are_not_passed_on() -> None:
    for kind in ("passed", "noise"):
        made = StartingStates(kind, 1.0, 0)  # type: ignore[arg-type]
        state = torch.ones(2, 2, 3, 3)
        state[1] = torch.inf
        own = [torch.zeros(2, dtype=torch.int64), state]
        made._remember(own, torch.tensor([True, False]))
        found = made._starts([torch.zeros_like(one) for one in own], torch.arange(2), torch.ones(2, dtype=torch.bool))
        assert found[1].isfinite().all()
        assert kind == "noise" or (found[1][0] == 1).all()


def test_ranks_have_the_moments_of_all_and_share_out_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    states, rows = torch.randn(4, 2, 3, 3), torch.ones(2, dtype=torch.bool)
    whole = StartingStates("noise", 1.0, 0)
    whole._remember([torch.zeros(4), states], torch.ones(4, dtype=torch.bool))
    sums: list[Tensor] = []
    monkeypatch.setattr(starting, "world", lambda: (0, 2))
    for rank in range(2):  # first what each adds, then the result of rank 0
        monkeypatch.setattr(starting.dist, "all_reduce", lambda value: sums.append(value.clone()))
        StartingStates("noise", 1.0, 0)._remember([torch.zeros(2), states[rank::2]], rows)
    monkeypatch.setattr(starting.dist, "all_reduce", lambda value: value.copy_(sums[0] + sums[1]))
    half = StartingStates("noise", 1.0, 0)
    half._remember([torch.zeros(2), states[::2]], rows)
    assert torch.allclose(half._left[1], whole._left[1])
    passed = StartingStates("passed", 1.0, 0)
    monkeypatch.setattr(starting, "world", lambda: (1, 2))
    passed.load({"kind": "passed", "tensors": [torch.arange(4), states]})
    assert passed._left[0].tolist() == [1, 3] and torch.equal(passed._left[1], states[1::2])


def fit(kind: str, folder: Path, steps: int, resume: Path | None = None, **settings: Any) -> tuple[Any, CausalLM]:
    module = task("ma", start=kind, start_share=0.7, optimizer=Optimizer(lr=0.02))
    made = trainer(folder, steps, **settings)
    made.fit(module, datamodule=Data("next"), ckpt_path=resume, weights_only=True)
    return made, module


@pytest.mark.parametrize("kind", ["passed", "noise"])
def test_a_run_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    _, expected = fit(kind, tmp_path, 7)

    class SaveAndStop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "four.ckpt")
                trainer.should_stop = True

    fit(kind, tmp_path, 7, callbacks=[SaveAndStop()])
    _, found = fit(kind, tmp_path, 7, resume=tmp_path / "four.ckpt")
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=1e-7)
    assert found.starting is not None and found.starting._left[1].any()


def test_another_model_is_refused() -> None:
    module, other = task("m"), task("mm")
    assert module.starting is not None and other.starting is not None
    module.objective(batch(0))
    other.starting.load(module.starting.saved())
    with pytest.raises(CheckpointError, match=r"has 3 states .* this model 5"):
        other.objective(batch(4))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"pattern": "a"}, "every block of this model keeps tokens"),
        ({"start_share": 0.0}, "a share above 0"),
        ({"carry_state": True, "pattern": "m"}, "set task.start=zero, or task.carry_state=false"),
    ],
    ids=["attention", "share", "carried"],
)
def test_wrong_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        task(**settings)
