"""Optimiser settings: groups that cover everything once, a schedule that is a function of the step, exact going on."""

from __future__ import annotations

import logging
import math
from functools import partial

import pytest
import torch
from torch import nn

from seqlong.backbone import Backbone, BackboneConfig
from seqlong.errors import ConfigError
from seqlong.mixers import Attention, Mamba2
from seqlong.optim import Optimizer, Schedule, parameter_groups


def model() -> Backbone:
    mixers = {"m": partial(Mamba2, d_state=4, head_dim=4), "a": partial(Attention, heads=2, bias=True)}
    return Backbone(BackboneConfig(vocab_size=8, d_model=8, pattern="ma", mixers=mixers))  # type: ignore[arg-type]


def names_of(module: nn.Module, group: dict) -> set[str]:
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    return {known[id(parameter)] for parameter in group["params"]}


def test_groups_hold_every_parameter_once_and_spare_the_right_ones() -> None:
    backbone = model()
    decayed, spared = parameter_groups(backbone, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(backbone.parameters()))
    assert not names_of(backbone, decayed) & names_of(backbone, spared)
    assert names_of(backbone, decayed) == {
        "blocks.0.mixer.in_proj.weight",
        "blocks.0.mixer.conv1d.weight",
        "blocks.0.mixer.out_proj.weight",
        "blocks.1.mixer.qkv_proj.weight",
        "blocks.1.mixer.out_proj.weight",
        *(f"blocks.{n}.ffn.{layer}.weight" for n in (0, 1) for layer in ("gate_up_proj", "down_proj")),
    }


def test_shape_does_not_make_a_decay_rate_a_weight_and_a_tied_weight_is_spared() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.embedding = nn.Embedding(3, 3)
            self.projection = nn.Linear(3, 3, bias=False)
            self.projection.weight = self.embedding.weight  # tied
            self.A_log = nn.Parameter(torch.zeros(3, 3))
            self.D = nn.Parameter(torch.zeros(3, 3))
            self.dt_bias = nn.Parameter(torch.zeros(3, 3))
            self.marked = nn.Parameter(torch.zeros(3, 3))
            self.marked._no_weight_decay = True  # type: ignore[attr-defined]
            self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)

    odd = Odd()
    decayed, spared = parameter_groups(odd, 0.1)
    assert names_of(odd, decayed) == {"linear.weight"}
    assert names_of(odd, spared) == {"linear.bias", "embedding.weight", "A_log", "D", "dt_bias", "marked"}
    assert len(spared["params"]) == 6


@pytest.mark.parametrize("fused", [False, True])
def test_lightning_clips_with_it_under_autocast(fused: bool) -> None:
    """Lightning 2.6 refuses fused optimisers there, for the sake of a scaler that bfloat16 does not have."""
    from lightning.pytorch.plugins.precision.amp import MixedPrecision

    backbone = model()
    optimizer = Optimizer().build(backbone, fused=fused)
    assert optimizer.param_groups[0]["fused"] is (True if fused else None)
    for parameter in backbone.parameters():
        parameter.grad = torch.ones_like(parameter)
    MixedPrecision("bf16-mixed", "cpu").clip_gradients(optimizer, 1.0)
    total = torch.nn.utils.get_total_norm([p.grad for p in backbone.parameters() if p.grad is not None])
    assert total == pytest.approx(1.0, abs=1e-4)


def test_schedules() -> None:
    cosine = Schedule("cosine", warmup_steps=4, final=0.1)
    assert [cosine.factor(step, 24) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert cosine.factor(14, 24) == pytest.approx(0.55)  # half way down
    assert cosine.factor(23, 24) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 19 / 20)))
    assert [cosine.factor(step, 24) for step in (24, 1000)] == [0.1, 0.1]

    stable = Schedule("stable", warmup_steps=2, decay_steps=4, final=0.0)
    assert [stable.factor(step, 12) for step in (0, 1, 5, 8)] == [0.5, 1.0, 1.0, 1.0]
    assert [stable.factor(step, 12) for step in (9, 11, 12)] == pytest.approx([0.5, 1 - math.sqrt(0.75), 0.0])
    assert Schedule("stable", 0, final=0.0).factor(81, 100) == pytest.approx(1 - math.sqrt(0.05))  # a fifth: 80 to 100
    assert Schedule("stable", 6, decay_steps=50).factor(6, 10) == 1.0  # the fall begins after the warm-up

    constant = Schedule("constant", warmup_steps=2)
    assert [constant.factor(step, None) for step in (0, 1, 10**9)] == [0.5, 1.0, 1.0]
    assert (Schedule().warmup(100), Schedule().warmup(10**6), Schedule().warmup(None)) == (5, 2000, 2000)
    assert Schedule(warmup_steps=0).factor(0, 10) == 1.0


@pytest.mark.parametrize("kind", ["cosine", "stable", "constant"])
def test_the_scheduler_gives_the_function_and_goes_on_exactly(kind: str) -> None:
    schedule, settings = Schedule(kind, warmup_steps=3, final=0.2), Optimizer(lr=0.5)  # type: ignore[arg-type]

    def steps(
        optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR, count: int
    ) -> list[float]:
        seen = []
        for _ in range(count):
            seen.append(optimizer.param_groups[1]["lr"])
            assert optimizer.param_groups[0]["lr"] == seen[-1]
            optimizer.step()
            scheduler.step()
        return seen

    optimizer = settings.build(model())
    scheduler = schedule.build(optimizer, 10)
    whole = steps(optimizer, scheduler, 4)
    saved = scheduler.state_dict(), optimizer.state_dict()
    whole += steps(optimizer, scheduler, 6)
    assert whole == [0.5 * schedule.factor(step, 10) for step in range(10)]
    assert saved[0] == {"last_epoch": 4}

    again = settings.build(model())
    scheduler = schedule.build(again, 10)
    again.load_state_dict(saved[1])  # in Lightning's order
    scheduler.load_state_dict(saved[0])
    assert steps(again, scheduler, 6) == whole[4:]


def test_going_on_with_other_settings_takes_the_moments_and_leaves_the_settings() -> None:
    first = model()
    optimizer = Optimizer(lr=0.5, weight_decay=0.1).build(first)
    scheduler = Schedule("constant", 0).build(optimizer, None)
    for parameter in first.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    second = model()
    other = Optimizer(lr=0.25, betas=(0.8, 0.9), weight_decay=0.3).build(second)
    prolonged = Schedule("cosine", 0, final=0.0).build(other, 2)
    other.load_state_dict(optimizer.state_dict())
    prolonged.load_state_dict(scheduler.state_dict())
    assert [group["weight_decay"] for group in other.param_groups] == [0.3, 0.0]
    assert [group["betas"] for group in other.param_groups] == [(0.8, 0.9)] * 2
    assert [group["lr"] for group in other.param_groups] == pytest.approx([0.125] * 2)
    weight = second.embedding.weight
    assert other.state[weight]["step"] == 1 and bool((other.state[weight]["exp_avg"] == 0.1 * 1).all())


def test_settings_out_of_range_say_so(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = Optimizer().build(model())
    with pytest.raises(ConfigError, match=r"betas \(0\.9, 1\.0\) from 0 to below 1"):
        Optimizer(betas=(0.9, 1.0)).build(model())
    with pytest.raises(ConfigError, match="no trainable parameter"):
        Optimizer().build(nn.Identity())
    with pytest.raises(ConfigError, match=r"trainer\.max_steps sets none; set it, or schedule\.kind=constant"):
        Schedule("stable").build(optimizer, None)
    with pytest.raises(ConfigError, match=r"final 2\.0 from 0 to 1"):
        Schedule(final=2.0).build(optimizer, 10)
    logging.getLogger("seqlong").propagate = True
    with caplog.at_level(logging.WARNING, logger="seqlong"):
        Schedule(warmup_steps=40).build(optimizer, 10)
    assert "rises to 25 % of optimizer.lr" in caplog.text
