"""bidirectional_decay against its definition: the sum over tokens, two loops, and chunks; Triton in its interpreter.
And ``Bidirectional`` around every mixer, against readings of each segment from either end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seqlong.mixers
from seqlong.block import Block
from seqlong.cost import mixer_cost
from seqlong.kernels import runtime
from seqlong.kernels.scalar_decay import bidirectional, bidirectional_decay, chunked
from seqlong.layout import SequenceLayout
from seqlong.mixers import (
    GLA,
    HGRN2,
    MLSTM,
    SSE,
    Attention,
    Based,
    Bidirectional,
    CosFormer2,
    GatedDeltaNet,
    GatedMemoryUnit,
    Hedgehog,
    LightningAttention,
    LinearAttention,
    LogLinearGatedDeltaNet,
    Mamba2,
    Mixer,
    MoH,
    MoM,
    PrefixMixer,
    RetNet,
    SimpleGLA,
    readings,
)
from seqlong.mixers.readings import bidirectional_form
from seqlong.norms import RMSNorm


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN: an element that is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.SIZES, "cpu", (16, 48))


def by_pairs(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, starts: Tensor | None) -> Tensor:
    """The formula, a pair of tokens at a time."""
    rows, length, heads = v.shape[:3]
    output = torch.zeros_like(v)
    group = torch.arange(heads) // (heads // q.shape[2])
    segment = torch.zeros(rows, length) if starts is None else starts.cumsum(1)
    for t in range(length):
        for s in range(length):
            between = decay[:, s + 1 : t + 1] if s <= t else decay[:, t:s]
            score = (q[:, t] * k[:, s]).sum(-1)[:, group] * between.sum(1).exp()
            same = (segment[:, t] == segment[:, s]).to(v.dtype)[:, None, None]
            output[:, t] += same * score[..., None] * v[:, s]
    return output


def inputs(
    rows: int,
    length: int,
    groups: int,
    heads: int,
    k: int,
    v: int,
    gate: str = "usual",
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    q, key = (torch.randn(rows, length, groups, k, dtype=torch.float64) for _ in range(2))
    drawn = torch.rand(rows, length, heads, dtype=torch.float64)
    decay = {"usual": -drawn, "none": 0 * drawn, "strong": 0 * drawn - 100, "mixed": -(drawn**8) * 1e4}[gate]
    value = torch.randn(rows, length, heads, v, dtype=torch.float64)
    made = [q.to(dtype), (key * k**-0.5).to(dtype), value.to(dtype)]
    return [x.requires_grad_() for x in (*made, decay if dtype == torch.float64 else decay.float())]


def results(given: list[Tensor], starts: Tensor | None, implementation: str, **options: bool) -> list[Tensor]:
    """Output and gradients of a fixed sum of it."""
    output = bidirectional_decay(*given, starts=starts, implementation=implementation, **options)
    weigh = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    return [output.detach(), *torch.autograd.grad(output, given, weigh.to(output.device, output.dtype))]


def marks(rows: int, length: int) -> list[Tensor | None]:
    return [None, torch.rand(rows, length) < 0.2, torch.ones(rows, length, dtype=torch.bool)]


def test_the_definition_is_the_formula() -> None:
    given = inputs(2, 13, 1, 2, 3, 4)
    for starts in marks(2, 13):
        expected = by_pairs(*given, starts)
        found = bidirectional_decay(*given, starts=starts, implementation="reference")
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for one, other in zip(
            torch.autograd.grad(found.square().sum(), given),
            torch.autograd.grad(expected.square().sum(), given),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("gate", ["usual", "none", "strong", "mixed"])
@pytest.mark.parametrize(
    ("rows", "length", "groups", "heads", "k", "v"), [(2, 1, 1, 1, 3, 5), (1, 17, 2, 4, 8, 6), (2, 131, 1, 2, 5, 3)]
)
def test_chunks_agree_with_the_definition(
    rows: int, length: int, groups: int, heads: int, k: int, v: int, gate: str
) -> None:
    given = inputs(rows, length, groups, heads, k, v, gate)
    for starts in marks(rows, length):
        pairs = zip(results(given, starts, "chunked"), results(given, starts, "reference"), strict=True)
        for found, expected in pairs:
            tol = 1e-9 if gate == "mixed" else 1e-11
            torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def test_it_reads_the_same_from_either_end() -> None:
    q, k, v, g = inputs(1, 40, 2, 2, 4, 4)
    starts = torch.rand(1, 40) < 0.1
    there = bidirectional_decay(q, k, v, g, starts=starts)
    last = torch.cat([starts[:, 1:], torch.ones(1, 1, dtype=torch.bool)], dim=1)
    back = bidirectional_decay(*(x.flip(1) for x in (q, k, v, g)), starts=last.flip(1)).flip(1)
    torch.testing.assert_close(there, back, rtol=1e-12, atol=1e-12)


def test_a_constant_decay_and_wrong_heads() -> None:
    q, k, v, _ = inputs(1, 9, 1, 2, 3, 3)
    rate = torch.tensor([-0.1, -2.0], dtype=torch.float64)
    assert torch.equal(bidirectional_decay(q, k, v, rate), bidirectional_decay(q, k, v, rate.expand(1, 9, 2)))
    with pytest.raises(ValueError, match="3 heads, 2 groups"):
        bidirectional_decay(torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 2), torch.ones(1, 2, 3, 2), torch.ones(1, 2, 3))


# -- Triton, in its interpreter where there is no GPU ------------------------------------------------------------------


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    reason = runtime.triton_runs_on(request.param)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def small_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 and as many segments as the row can have."""
    monkeypatch.setattr(bidirectional.PLANS, "settled", lambda q, v: replace(bidirectional.default(v.dtype), chunk=16))


def distances(given: list[Tensor], starts: Tensor | None, device: str, **options: bool) -> list[float]:
    """Relative errors of output and gradients against the definition."""
    exact = results([x.detach().double().requires_grad_() for x in given], starts, "reference")
    there = [x.detach().to(device).requires_grad_() for x in given]
    found = results(there, None if starts is None else starts.to(device), "triton", **options)
    return [
        ((a.cpu().double() - b.double()).norm() / b.double().norm().clamp(min=0.1)).item()
        for a, b in zip(found, exact, strict=True)
    ]


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize("gate", ["usual", "mixed"])
@pytest.mark.parametrize(
    ("rows", "length", "heads", "k", "v"),
    [(1, 1, 1, 16, 16), (2, 70, 2, 16, 24), (1, 100, 1, 40, 16), (1, 97, 1, 5, 3)],
)
def test_triton(rows: int, length: int, heads: int, k: int, v: int, gate: str, device: str) -> None:
    given = inputs(rows, length, heads, heads, k, v, gate, torch.float32)
    for starts in (None, torch.rand(rows, length) < 0.1):
        found = distances(given, starts, device)
        # Sums of gates of -1e4 within a chunk leave 1e-5 of float32 in the exponent.
        assert max(found[:4]) < (1e-4 if gate == "mixed" else 1e-5), found
        assert found[4] < (1e-3 if gate == "mixed" else 1e-5), found


@pytest.mark.usefixtures("small_plan")
def test_triton_where_every_token_is_alone(device: str) -> None:
    given = inputs(1, 40, 1, 1, 16, 16, dtype=torch.float32)
    starts = torch.ones(1, 40, dtype=torch.bool)
    assert max(distances(given, starts, device)) < 2e-5
    assert not results([x.detach().to(device).requires_grad_() for x in given], starts.to(device), "triton")[4].any()


@pytest.mark.usefixtures("small_plan")
def test_triton_in_bfloat16_reads_strided_inputs_and_repeats_itself(device: str) -> None:
    """Views whose neighbours are NaN; twice the same bits; the same again where states are made anew."""
    wide = [x.detach().bfloat16() for x in inputs(2, 75, 2, 2, 16, 16)[:3]]
    decay = -torch.rand(2, 2, 75).transpose(1, 2)
    given = []
    for x in wide:
        around = torch.full((2, 77, 6, 24), torch.nan, dtype=torch.bfloat16)
        around[:, 1:-1, 2:4, 4:20] = x
        given.append(around[:, 1:-1, 2:4, 4:20].to(device).requires_grad_())
    given.append(decay.to(device).requires_grad_())
    starts = (torch.rand(150, 2) < 0.05).T[:, ::2]
    exact = [x.detach().cpu().double().requires_grad_() for x in given]
    wanted = results(exact, starts, "reference")
    found = [results(given, starts.to(device), "triton", recompute=again) for again in (False, False, True)]
    for one, two, anew, truth in zip(*found, wanted, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, anew)
        assert (one.cpu().double() - truth).norm() < 6e-3 * truth.norm()


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize("keep", [True, False])
def test_triton_is_a_well_formed_op(keep: bool, device: str) -> None:
    given = inputs(1, 37, 1, 1, 16, 16, dtype=torch.float32)
    starts = torch.rand(1, 37) < 0.1
    torch.library.opcheck(
        torch.ops.seqlong.bidirectional_decay_triton.default,
        (*(x.detach().to(device).requires_grad_() for x in given), starts.to(device), keep),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_triton_reads_heads_that_share_queries_twice(device: str) -> None:
    given = inputs(1, 70, 1, 2, 16, 16, dtype=torch.float32)
    assert max(distances(given, torch.rand(1, 70) < 0.1, device)) < 2e-5


def test_other_types_and_devices_say_why_not() -> None:
    with pytest.raises(ValueError, match="bidirectional_decay cannot run in Triton: "):
        bidirectional_decay(*inputs(1, 5, 1, 1, 4, 4), implementation="triton")


# -- the mixer that runs others from both ends -------------------------------------------------------------------------

WIDTH = 64
KINDS: dict[str, Callable[[int], Mixer]] = {
    name: kind
    for name in seqlong.mixers.__all__
    if inspect.isclass(kind := getattr(seqlong.mixers, name))
    and issubclass(kind, Mixer)
    and kind not in (Mixer, Bidirectional, PrefixMixer)
}
ENDS = [[(0, 9), (9, 10), (10, 23)], [(0, 17)]]
TURNED = sorted(name for name, kind in KINDS.items() if bidirectional_form(kind(WIDTH)) != "none")


def packed() -> tuple[Tensor, SequenceLayout]:
    ids = torch.tensor([[1] * 9 + [2] + [3] * 13, [1] * 17 + [0] * 6], dtype=torch.int32)
    return torch.randn(2, 23, WIDTH, dtype=torch.float64), SequenceLayout.build(2, 23, ids)


def shaken(mixer: Mixer) -> Any:
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer.double()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", TURNED)
def test_every_mixer_runs_both_ways_over_each_segment(name: str, tied: bool) -> None:
    both = shaken(Bidirectional(WIDTH, KINDS[name], tied=tied))
    hidden, layout = packed()
    found, state = both(hidden, layout)
    other = both.forward_mixer if tied else both.backward_mixer
    assert state is None and (both.backward_mixer is None) is tied
    for row, segments in enumerate(ENDS):
        for a, z in segments:
            part, alone = hidden[row : row + 1, a:z], SequenceLayout.build(1, z - a)
            expected = both.forward_mixer(part, alone)[0] + other(part.flip(1), alone)[0].flip(1)
            torch.testing.assert_close(found[row : row + 1, a:z], expected, rtol=1e-9, atol=1e-9)


def gates(mixer: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """q, k, v and the log-decay (t h k) of a linear mixer, from its formula."""
    heads, width = mixer.heads, mixer.key_dim
    if isinstance(mixer, SimpleGLA):
        return [q / width**0.5, k, v, (F.logsigmoid(mixer.decay_proj(x)) / 16)[..., None].expand(k.shape)]
    if isinstance(mixer, GLA):
        return [q / width**0.5, k, v, F.logsigmoid(mixer.decay_proj(x)).unflatten(1, (heads, width)) / 16]
    if isinstance(mixer, HGRN2):
        keep = mixer.bound.sigmoid() + (1 - mixer.bound.sigmoid()) * k.sigmoid()
        return [q, 1 - keep, v, keep.log()]
    if isinstance(mixer, MLSTM):
        forget, write = mixer.gates_proj(x).chunk(2, dim=-1)
        return [q / width**0.5, k * write.sigmoid()[..., None], v, F.logsigmoid(forget)[..., None].expand(k.shape)]
    return [q, k, v, mixer.decay.numbers[:, None].expand(k.shape)]


JOINED: dict[str, Callable[[int], Mixer]] = {
    "linear_attention": LinearAttention,
    "linear_attention_gated": partial(LinearAttention, feature="silu", gate="silu"),
    "retnet": RetNet,
    "lightning": LightningAttention,
    "cosformer2": CosFormer2,
    "hedgehog": Hedgehog,
    "based": partial(Based, feature_dim=4),
    "simple_gla": partial(SimpleGLA, conv_width=0),
    "gla": GLA,
    "hgrn2": HGRN2,
    "mlstm": partial(MLSTM, input_gate="sigmoid", input_bias=0.0),
}


@pytest.mark.parametrize("name", JOINED)
def test_joined_readings_are_a_sum_over_the_whole_segment(name: str) -> None:
    """A pair of tokens at a time: every token s of the segment, weighed by the decays between it and t, t once."""
    both = shaken(Bidirectional(WIDTH, JOINED[name], join="readings"))
    mixer = both.forward_mixer
    hidden, layout = packed()
    found = both(hidden, layout)[0]
    for row, segments in enumerate(ENDS):
        for a, z in segments:
            x, alone = hidden[row, a:z], SequenceLayout.build(1, z - a)
            q, k, v = mixer.qkv_proj(x[None]).split(list(mixer.widths), dim=-1)
            q, k, v = (part.unflatten(2, (mixer.heads, -1)) for part in (q, k, v))
            q, k, v, g = gates(mixer, x, *(part[0] for part in mixer.features(q, k, v, alone)))
            if name in ("hedgehog", "based"):
                v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
            read = torch.zeros_like(v)
            g = g.expand(z - a, *g.shape[-2:])
            for t in range(z - a):
                for s in range(z - a):
                    faded = (g[s + 1 : t + 1] if s <= t else g[t:s]).sum(0).exp()
                    read[t] += (q[t] * faded * k[s]).sum(-1, keepdim=True) * v[s]
            expected = mixer.out_proj(mixer.finish(read[None], x[None]).flatten(2))[0]
            torch.testing.assert_close(found[row, a:z], expected, rtol=1e-8, atol=1e-8)


def test_joined_readings_of_a_delta_rule() -> None:
    """Left and right by the recurrence of a token; what a token reads of itself, β (q·k) v, once."""
    both = shaken(Bidirectional(WIDTH, partial(GatedDeltaNet, heads=1, head_dim=8, conv_width=0), join="readings"))
    mixer = both.forward_mixer
    hidden, layout = packed()
    found = both(hidden, layout)[0]
    for row, segments in enumerate(ENDS):
        for a, z in segments:
            x = hidden[row, a:z]
            q, k, v = mixer.qkv_proj(x).split(list(mixer.widths), dim=-1)
            q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
            beta = mixer.beta_proj(x).sigmoid()
            fade = (-mixer.A_log.exp() * F.softplus(mixer.decay_proj(x) + mixer.dt_bias)).exp()
            read = -beta * (q * k).sum(-1, keepdim=True) * v
            for order in (range(z - a), reversed(range(z - a))):
                state = torch.zeros(8, v.shape[1], dtype=torch.float64)
                for t in order:
                    state = fade[t] * state
                    state = state + beta[t] * torch.outer(k[t], v[t] - k[t] @ state)
                    read[t] += q[t] @ state
            read = (read / 8**0.5)[None, :, None]
            expected = mixer.out_proj(mixer.finish(read, x[None]).flatten(2))[0]
            torch.testing.assert_close(found[row, a:z], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["linear_attention", "simple_gla", "hedgehog", "mlstm"])
def test_one_op_is_the_definition_and_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = shaken(Bidirectional(WIDTH, JOINED[name], join="readings"))
    hidden, layout = packed()
    calls: list[bool] = []
    op = readings.bidirectional_decay
    monkeypatch.setattr(readings, "bidirectional_decay", lambda *a, **k: calls.append(True) or op(*a, **k))
    found = both(hidden, layout)[0]
    assert bool(calls) == (bidirectional_form(both.forward_mixer) == "one op") == (name != "mlstm")
    monkeypatch.setattr(readings, "_in_one_op", readings.by_definition)
    real = (layout.segment_ids > 0)[..., None]
    torch.testing.assert_close(found.where(real, 0), both(hidden, layout)[0].where(real, 0), rtol=1e-10, atol=1e-10)


def test_joined_readings_have_one_set_of_weights_and_half_the_products() -> None:
    apart, joined = Bidirectional(WIDTH, GLA, tied=True), Bidirectional(WIDTH, GLA, join="readings")
    assert joined.tied and set(joined.state_dict()) == set(apart.state_dict())
    one = {term.what: term.flops for term in mixer_cost(GLA(WIDTH), 50).terms}
    costs = [{t.what: t.flops for t in mixer_cost(mixer, 50).terms} for mixer in (apart, joined)]
    assert costs[0] == {what: 2 * flops for what, flops in one.items()}
    assert costs[1] == {"products": one["products"], "recurrence": 2 * one["recurrence"]}
    assert mixer_cost(joined, 50).state is None


def test_both_directions_are_told_their_place() -> None:
    for tied in (True, False):
        both = Bidirectional(WIDTH, LightningAttention, tied=tied)
        both.place(2, 5)
        alone = LightningAttention(WIDTH)
        alone.place(2, 5)
        for mixer in (both.forward_mixer, both.forward_mixer if tied else both.backward_mixer):
            assert torch.equal(mixer.decay.numbers, alone.decay.numbers)  # type: ignore[union-attr]


@pytest.mark.parametrize("inner", [MoM, MoH, SSE])
def test_routers_inside_are_balanced_in_training(inner: Callable[[int], Mixer]) -> None:
    hidden, layout = packed()
    for tied in (True, False):
        block = Block(WIDTH, shaken(Bidirectional(WIDTH, inner, tied=tied)), None, RMSNorm).double()
        both: Any = block.mixer
        normed = block.mixer_norm(hidden)
        expected = both.forward_mixer.router_sums(normed, layout)["router_loss_sum"]
        if not tied:
            expected = expected + both.backward_mixer.router_sums(normed, layout)["router_loss_sum"]  # of no order
        said = block(hidden, layout)[2]
        torch.testing.assert_close(said["router_loss_sum"], expected)
        assert expected > 0


def test_what_has_no_other_direction_says_so() -> None:
    for kind, complaint in (
        (partial(Attention, causal=False), "Attention already sees both sides"),
        (GatedMemoryUnit, "GatedMemoryUnit reads another block's memory"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Bidirectional(WIDTH, kind)
    for kind, complaint in (
        (Mamba2, "readings of Mamba2 cannot be joined before they are normed; set join=outputs"),
        (MLSTM, "readings of MLSTM cannot"),
        (LogLinearGatedDeltaNet, "readings of LogLinearGatedDeltaNet cannot"),
        (SimpleGLA, "the convolution of SimpleGLA has one; set its conv_width=0, or join=outputs"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Bidirectional(WIDTH, kind, join="readings")
        Bidirectional(WIDTH, kind)


def test_the_documentation_says_what_each_mixer_can() -> None:
    text = (Path(__file__).parents[1] / "docs" / "mixers.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    told = {row[0].strip("`"): row[-2] for row in rows}
    assert set(told) == {*KINDS, "Bidirectional", "PrefixMixer"}
    for name, *cells in rows:  # expand, input, oscillation, shrink; or what is kept, how it fades, how it is read
        assert all(cells) or (name, cells.index("")) == ("`GatedMemoryUnit`", 3), f"{name} has an empty cell"
    for name, kind in KINDS.items():
        assert told[name].removesuffix("; `causal: false`") == bidirectional_form(kind(WIDTH)), name
        takes = "causal" in inspect.signature(kind).parameters
        assert told[name].endswith("`causal: false`") == takes, name
