"""What ops say of inputs that they cannot take. In a process of its own: here annotations are checked before."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from seqlong.errors import ConfigError
from seqlong.kernels import starts_of
from seqlong.kernels.dispatch import choose
from seqlong.kernels.scalar_decay import scalar_decay, scalar_decay_step
from seqlong.kernels.scalar_decay.reference import scalar_decay_reference

CASES = """
import torch
from seqlong.kernels import starts_of
from seqlong.kernels.attention import attention
from seqlong.kernels.cross_entropy import linear_cross_entropy
from seqlong.kernels.delta_rule import delta_rule_step
from seqlong.kernels.dplr import dplr_step
from seqlong.kernels.log_linear import log_linear, log_linear_step
from seqlong.kernels.norm import gated_rms_norm, rms_norm
from seqlong.kernels.grouped_matmul import grouped_matmul
from seqlong.kernels.rotary import rotary
from seqlong.kernels.scalar_decay import scalar_decay, scalar_decay_step
from seqlong.kernels.selective_scan import selective_scan
from seqlong.kernels.short_conv import short_conv
from seqlong.kernels.vector_decay import vector_decay, vector_decay_step

def bounded(bound):
    return vector_decay(x, None, x, x, activation="lower_bound", lower_bound=torch.tensor([[bound] * 4] * 2))

x, g, y = torch.randn(1, 1, 2, 4), torch.zeros(1, 1, 2), torch.randn(1, 9, 4)
calls = [
    lambda: scalar_decay_step(x, x, x, g, None),
    lambda: vector_decay_step(x, x, x, x, None),
    lambda: delta_rule_step(x, x, x, g, g, None),
    lambda: dplr_step(x, x, x, x, x, x, None),
    lambda: log_linear_step(x, x, x, g, x, None),
    lambda: log_linear(x, x, x, g, x, initial_state=torch.zeros(2, 2)),
    lambda: scalar_decay(None, x, x, g),
    lambda: scalar_decay(x, x.numpy(), x, g),
    lambda: scalar_decay(x, x, x, g, starts=[0]),
    lambda: scalar_decay(x, x, x, g, starts=torch.tensor([0, 1])),
    lambda: rms_norm(torch.ones(2, 8, dtype=torch.int32), torch.rand(8)),
    lambda: gated_rms_norm(y, torch.ones(1, 9, 4, dtype=torch.int64), torch.rand(4)),
    lambda: short_conv(torch.ones(1, 9, 4, dtype=torch.int64), torch.rand(4, 3)),
    lambda: short_conv(y, torch.rand(4, 3), lengths=torch.tensor([27])),
    lambda: short_conv(y, torch.rand(4, 3), lengths=torch.tensor([-1])),
    lambda: short_conv(y, torch.rand(4, 3), lengths=torch.tensor([2.0])),
    lambda: linear_cross_entropy(y, torch.rand(6, 4), torch.full((1, 9), 36)),
    lambda: linear_cross_entropy(y, torch.rand(0, 4), torch.full((1, 9), 0)),
    lambda: linear_cross_entropy(y, torch.rand(6, 4), torch.full((1, 9), 0), chunk=-5),
    lambda: starts_of(torch.tensor([0, 5, 3, 9]), 9),
    lambda: starts_of(torch.tensor([1, 9]), 9),
    lambda: starts_of(torch.tensor([0, 8]), 9),
    lambda: starts_of(torch.tensor([0.0, 9.0]), 9),
    lambda: starts_of([0, 9], 9),
    lambda: bounded(1.5),
    lambda: bounded(-0.25),
    lambda: bounded(float("nan")),
    lambda: bounded(1.0) and print("a bound of 1 is rounded up to"),
    lambda: scalar_decay(x, x, x, g.to("meta")),
    lambda: scalar_decay(x, x, x, g, starts=torch.zeros(1, 1, dtype=torch.bool, device="meta")),
    lambda: scalar_decay(x.to("meta"), x, x, g),
    lambda: vector_decay(x, x, x, x, initial_state=torch.zeros(1, 2, 4, 4, device="meta")),
    lambda: rms_norm(y, torch.rand(4, device="meta")),
    lambda: short_conv(y, torch.rand(4, 3), starts=torch.zeros(1, 9, dtype=torch.bool, device="meta")),
    lambda: rotary(x, torch.zeros(1, 1, dtype=torch.int64, device="meta")),
    lambda: linear_cross_entropy(y.to("meta"), torch.rand(6, 4), torch.full((1, 9), 3)),
    lambda: selective_scan(y, y, torch.rand(3, 4), torch.rand(1, 9, 3), torch.rand(1, 9, 3, device="meta")),
    lambda: grouped_matmul(y[0], torch.rand(2, 4, 4), torch.tensor([3, 9], device="meta")),
    lambda: print(scalar_decay(*(a.to("meta") for a in (x, x, x, g)))[0].device),
    lambda: scalar_decay(x, x, x, g, implementation="tritn"),
    lambda: rms_norm(y.double(), torch.rand(4).double(), implementation="triton"),
    lambda: rms_norm(y, torch.rand(4), implementation="fast"),
    lambda: attention(x, x, x, window=1, implementation="sdpa"),
]
for call in calls:
    try:
        call()
        print("no error")
    except ValueError as error:
        print(error)
"""
SAID = [
    "scalar_decay_step needs state, a tensor, found None",
    "vector_decay_step needs state, a tensor, found None",
    "delta_rule_step needs state, a tensor, found None",
    "dplr_step needs state, a tensor, found None",
    "log_linear_step needs state, a Fenwick, found None; before the first token it is Fenwick of zeros "
    "(b h buckets k v), and zeros (b) of int64, with buckets(levels.shape[3]) buckets",
    "log_linear needs a state such as it returns, Fenwick(states, tokens), found (2, 2) float32",
    "scalar_decay needs q, a tensor, found None",
    "scalar_decay needs k, a tensor, found a ndarray",
    "scalar_decay needs starts of type bool, one mark a token, found a list; seqlong.kernels.starts_of makes starts of "
    "offsets",
    "scalar_decay needs starts of type bool, one mark a token, found (2,) int64; seqlong.kernels.starts_of makes "
    "starts of offsets",
    "rms_norm needs x of a floating type, found (2, 8) int32",
    "gated_rms_norm needs gate of a floating type, found (1, 9, 4) int64",
    "short_conv needs x of a floating type, found (1, 9, 4) int64",
    "short_conv needs lengths from 0 to 9, found 27 to 27",
    "short_conv needs lengths from 0 to 9, found -1 to -1",
    "short_conv needs lengths in whole numbers, found (1,) float32",
    "linear_cross_entropy needs targets below 6 classes, found 36",
    "linear_cross_entropy needs classes, and chunk of 0 or more, found (0, 4) float32, 0",
    "linear_cross_entropy needs classes, and chunk of 0 or more, found (6, 4) float32, -5",
    "starts_of needs offsets that rise from 0 to the row's length 9, they fall somewhere",
    "starts_of needs offsets that rise from 0 to the row's length 9, found 1 to 9",
    "starts_of needs offsets that rise from 0 to the row's length 9, found 0 to 8",
    "starts_of needs offsets, whole numbers in one row, found (2,) float32",
    "starts_of needs offsets, a tensor, found a list",
    "vector_decay needs lower_bound in [0, 1), the least decay, found 1.5 to 1.5",
    "vector_decay needs lower_bound in [0, 1), the least decay, found -0.25 to -0.25",
    "vector_decay needs lower_bound in [0, 1), the least decay, found nan to nan",
    "a bound of 1 is rounded up to",
    "no error",
    *(
        f"{op} needs all its inputs on one device, found {first} and {second}"
        for op, first, second in [
            ("scalar_decay", "q on cpu", "log_decay on meta"),
            ("scalar_decay", "q on cpu", "starts on meta"),
            ("scalar_decay", "q on meta", "k on cpu"),
            ("vector_decay", "v on cpu", "initial_state on meta"),
            ("rms_norm", "x on cpu", "weight on meta"),
            ("short_conv", "x on cpu", "starts on meta"),
            ("rotary", "x on cpu", "positions on meta"),
            ("linear_cross_entropy", "hidden on meta", "weight on cpu"),
            ("selective_scan", "x on cpu", "c on meta"),
            ("grouped_matmul", "x on cpu", "ends on meta"),
        ]
    ),
    "meta",
    "no error",
    "scalar_decay has no implementation 'tritn'; it has chunked, reference, triton; did you mean 'triton'?",
    "rms_norm cannot run in Triton: the Triton kernels do not compute in torch.float64",
    "rms_norm has no implementation 'fast'; it has chunked, reference, triton",
    "attention cannot run as sdpa: it does not serve this device, type, mask or cache",
]


def test_errors_are_one_sentence() -> None:
    done = subprocess.run([sys.executable, "-c", CASES], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == SAID, done.stderr[-2000:]


def test_starts_of_offsets() -> None:
    found = starts_of(torch.tensor([0, 3, 3, 5, 9]), 9)  # the second is empty
    assert found.tolist() == [[True, False, False, True, False, True, False, False, False]]
    assert starts_of(torch.tensor([0, 0]), 0).shape == (1, 0)
    q, k, v = torch.randn(3, 1, 9, 2, 4).unbind()
    whole, _ = scalar_decay(q, k, v, -torch.rand(1, 9, 2), starts=found)
    torch.testing.assert_close(whole[:, 5:6], (q * k).sum(-1, keepdim=True)[:, 5:6] * v[:, 5:6])


@pytest.mark.parametrize(("tokens", "groups"), [(1, 4), (1, 2), (5, 2), (0, 2)])
def test_scalar_decay_step_is_the_loop(tokens: int, groups: int) -> None:
    q, k = torch.randn(2, 3, tokens, groups, 6, dtype=torch.float64).unbind()
    v, g = torch.randn(3, tokens, 4, 5, dtype=torch.float64), -torch.rand(3, tokens, 4, dtype=torch.float64)
    state = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    kept = state.clone()
    starts = torch.zeros(3, tokens, dtype=torch.bool)
    starts[1, :1] = True
    for decay in (g, torch.linspace(-1, 0, 4).double()):
        found = scalar_decay_step(q, k, v, decay, state, starts=starts)
        expected = scalar_decay_reference(q, k, v, decay.expand(v.shape[:3]), starts, state)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    padding = torch.tensor([True, False, False])[:, None].expand(3, tokens)
    _, after = scalar_decay_step(q, k, v, g, state, starts=starts, padding=padding)
    torch.testing.assert_close(after[0], state[0])
    assert torch.equal(state, kept)


def test_what_is_asked_and_cannot_be_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SEQLONG_KERNELS", "triton")
    monkeypatch.setattr("seqlong.kernels.dispatch._announced", set())
    with caplog.at_level(logging.INFO, logger="seqlong.kernels.dispatch"):
        for _ in range(2):
            choose("one", {"chunked": "torch (no Triton)"}, "chunked")
        choose("two", {"chunked": "torch", "triton": "here"}, "chunked")
    levels = [(record.levelname, record.message) for record in caplog.records]
    assert sorted(set(levels)) == [
        ("INFO", "two runs as triton: SEQLONG_KERNELS=triton"),
        ("WARNING", "one runs as chunked: torch (no Triton); SEQLONG_KERNELS=triton cannot be used by this op here"),
    ]


def test_doctor_says_once_that_the_variable_is_misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    from seqlong import doctor

    monkeypatch.setenv("SEQLONG_KERNELS", "chunkd")
    with pytest.raises(ConfigError, match=r"SEQLONG_KERNELS=chunkd names no implementation"):
        doctor.command(["--quick"])
