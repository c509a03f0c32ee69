"""Triton's scalar_decay and ssd against the float64 loop over tokens: in the interpreter here, on a GPU there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from decay_cases import CUT, EXACT, OPS, Case, agree, bfloat16_or_float32, make, same

from seqlong.kernels import runtime
from seqlong.kernels.scalar_decay import scalar_decay, windows
from seqlong.layout import SequenceLayout

# The interpreter computes what a mask then throws away: powers of the future, infinity times zero.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    reason = runtime.triton_runs_on(request.param)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN: an element that is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


# -- The definition, in the interpreter -------------------------------------------------------------------------------

B16 = {"dtype": torch.bfloat16}
CASES: list[tuple[tuple[Any, ...], dict[str, Any], dict[str, int]]] = [
    # rows, length, groups, heads, k, v; the rest; settings of the plan
    (("scalar_decay", 2, 1, 1, 1, 16, 24), {}, {}),
    (("scalar_decay", 1, 2, 2, 2, 24, 16), {"starts": "consecutive"}, {}),
    (("scalar_decay", 2, 15, 1, 3, 16, 60), {"starts": "random"}, {}),
    (("scalar_decay", 1, 16, 2, 4, 60, 16), {"gate": "strong", "starts": "first"}, {}),
    (("scalar_decay", 1, 17, 2, 2, 64, 100), {"reverse": True, "starts": "random"}, {"value_tile": 32}),
    (("scalar_decay", 1, 15, 1, 1, 256, 256), {"state": False}, {"value_tile": 128, "key_slice": 256}),
    (("scalar_decay", 1, 63, 2, 2, 16, 16), {"starts": "every"}, {"programs_per_sm": 2}),
    (("scalar_decay", 1, 64, 1, 2, 64, 64), {"gate": "none", **B16}, {"programs_per_sm": 4}),
    (("scalar_decay", 1, 65, 2, 2, 24, 60), {"gate": "never", "reverse": True}, {"programs_per_sm": 4}),
    (("scalar_decay", 2, 65, 1, 2, 16, 16), {"gate": "slow", "reverse": True, **B16}, {"programs_per_sm": 9}),
    (("scalar_decay", 1, 127, 1, 2, 100, 24), {"gate": "usual", "starts": "random"}, {"programs_per_sm": 4}),
    (("scalar_decay", 1, 63, 1, 1, 64, 128), {**B16}, {"programs_per_sm": 3, "chunk": 32, "run": 1, "key_slice": 32}),
    (("scalar_decay", 1, 257, 2, 2, 16, 16), {"gate": "mixed", "starts": "random"}, {"programs_per_sm": 5}),
    (("scalar_decay", 1, 257, 1, 2, 16, 16), {"gate": "slow", "starts": "consecutive"}, {"programs_per_sm": 16}),
    (("ssd", 2, 1, 1, 2, 16, 16), {}, {}),
    (("ssd", 1, 2, 2, 2, 16, 24), {"starts": "first"}, {}),
    (("ssd", 1, 15, 1, 3, 24, 16), {"starts": "every", "state": False}, {}),
    (("ssd", 1, 17, 2, 4, 60, 60), {"starts": "random"}, {"programs_per_sm": 4}),
    (("ssd", 1, 16, 1, 1, 192, 100), {}, {"key_slice": 128}),
    (("ssd", 1, 64, 1, 2, 128, 64), {**B16, "starts": "random"}, {"programs_per_sm": 2}),
    (("ssd", 2, 65, 2, 4, 16, 16), {"gate": "strong"}, {"programs_per_sm": 8}),
    (("ssd", 1, 127, 1, 2, 16, 16), {"gate": "mixed", "starts": "consecutive"}, {"programs_per_sm": 6}),
    (("ssd", 1, 257, 1, 2, 24, 16), {"gate": "slow"}, {"programs_per_sm": 16}),
]  # fmt: skip


@pytest.mark.skipif(not runtime.INTERPRETED, reason="float32 compiles for minutes; the GPU has cases of its own")
@pytest.mark.parametrize(("sizes", "options", "settings"), CASES, ids=lambda x: "-".join(map(str, x)) or "default")
def test_it_is_its_definition(sizes: tuple[Any, ...], options: dict[str, Any], settings: dict[str, int]) -> None:
    case = make(*sizes, **options)
    with case.cut(chunk=settings.pop("chunk", 16), **settings):
        limit = EXACT[options.get("dtype", torch.float32)]
        if sizes[0] == "ssd" and options.get("gate") == "mixed":
            limit *= 10  # steps of hundreds weigh what is lost in the gradients of gates that forget everything
        agree(case.results(), case.in_double().results("reference"), limit)


# -- What must hold whatever the numbers ------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("op", OPS)
PAIR = pytest.mark.parametrize(("op", "groups"), [("scalar_decay", 2), ("scalar_decay", 1), ("ssd", 1)])


@PAIR
def test_what_is_kept_changes_no_bit(op: str, groups: int, device: str) -> None:
    """Everything, nothing (no gradient is asked for), or little, where a row is one window; nor does a second time."""
    dtype = bfloat16_or_float32(device)
    case = make(op, 1, 37, groups, 2, 16, 16, starts="random", dtype=dtype, device=device)
    with case.cut(chunk=16, programs_per_sm=6):
        kept = case.results()
        same(case.results(recompute=True), kept)
        same(case.results(), kept)
        with torch.no_grad():
            assert torch.equal(case.run("triton")[0], kept["output"])


@pytest.mark.parametrize(("op", "groups", "reverse"), [("scalar_decay", 2, True), ("ssd", 1, False)])
def test_recompute_goes_by_windows(
    op: str, groups: int, reverse: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "BUDGET", 0)
    monkeypatch.setattr(windows, "SHORTEST", 16)
    fixed, dtype = {"reverse": True} if reverse else {}, bfloat16_or_float32(device)
    case = make(op, 2, 37, groups, 2, 16, 16, gate="slow", starts="random", dtype=dtype, device=device, **fixed)
    bare = Case(op, {name: x for name, x in case.learned.items() if name != "initial_state"}, case.fixed)
    with case.cut(chunk=16, programs_per_sm=0):
        agree(case.results(recompute=True), case.results(), CUT[dtype])
        agree(bare.results(recompute=True), bare.results(), CUT[dtype])


@PAIR
def test_short_rows_share_a_window(op: str, groups: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of 20 tokens, two to a window of 40: the last window has one."""
    monkeypatch.setattr(windows, "window", lambda *widths: 40)
    dtype = bfloat16_or_float32(device)
    case = make(op, 3, 20, groups, 2, 16, 16, gate="slow", starts="random", dtype=dtype, device=device)
    with case.cut(chunk=16, programs_per_sm=0):
        agree(case.results(recompute=True), case.results(), CUT[dtype])


@PAIR
def test_every_cut_gives_the_same(op: str, groups: int, device: str) -> None:
    """Chunks, segments, tiles: how a row is cut is nobody's business."""
    dtype = bfloat16_or_float32(device)
    case = make(op, 1, 70, groups, 2, 32, 32, gate="slow", starts="random", dtype=dtype, device=device)
    with case.cut(chunk=64, programs_per_sm=0):
        expected = case.results()
    for settings in (
        {"chunk": 32, "programs_per_sm": 0},
        {"chunk": 16, "programs_per_sm": 1 << 20, "value_tile": 16},
        {"chunk": 16, "programs_per_sm": 2, "key_slice": 16, "run": 3},
    ):
        with case.cut(**settings):
            agree(case.results(), expected, CUT[dtype])


@BOTH
@pytest.mark.parametrize("at", [1, 16, 29])
def test_a_row_split_anywhere_is_the_row(op: str, at: int, device: str) -> None:
    """Also: parts of ``starts`` of two rows do not lie side by side."""
    dtype = bfloat16_or_float32(device)
    case = make(op, 2, 33, 1, 2, 16, 16, starts="random", dtype=dtype, device=device)
    along = [name for name, x in case.learned.items() if x.dim() > 1 and x.shape[1] == 33]

    def part(a: int, z: int, state: Tensor) -> tuple[Tensor, Tensor]:
        pieces = {name: case.learned[name][:, a:z] for name in along}
        inputs = {**case.learned, **pieces, "initial_state": state}
        return OPS[op](**inputs, starts=case.fixed["starts"][:, a:z], implementation="triton")

    with case.cut(chunk=16, programs_per_sm=8):
        whole = case.results()
        first, state = part(0, at, case.learned["initial_state"])
        second, final = part(at, 33, state)
        output = torch.cat([first, second], dim=1)
        source = torch.Generator().manual_seed(5)
        weigh = [torch.randn(x.shape, generator=source).bfloat16().to(x.device, x.dtype) for x in (output, final)]
        grads = torch.autograd.grad([output, final], list(case.learned.values()), weigh)
    found = dict(zip(whole, [output, final, *grads], strict=True))
    agree(found, whole, CUT[dtype])


@pytest.mark.parametrize("reverse", [False, True])
@PAIR
def test_the_past_knows_nothing_of_the_future(op: str, groups: int, reverse: bool, device: str) -> None:
    if op == "ssd" and reverse:
        pytest.skip("ssd reads from the left only")
    dtype, fixed = bfloat16_or_float32(device), {} if op == "ssd" else {"reverse": reverse}
    case = make(op, 1, 70, groups, 2, 16, 16, dtype=dtype, device=device, **fixed)
    for at in (16, 37):
        future = slice(0, 70 - at) if reverse else slice(at, 70)
        past = slice(70 - at, 70) if reverse else slice(0, at)
        changed = {}
        for name, x in case.learned.items():
            if name != "initial_state" and x.dim() > 1:
                changed[name] = x.detach().clone()
                changed[name][:, future] = changed[name][:, future] * 3 - (1 if name in ("log_decay", "dt") else -1)
        with case.cut(chunk=16, programs_per_sm=4), torch.no_grad():
            before, after = case.run("triton")[0], case.but(**changed).run("triton")[0]
        assert torch.equal(before[:, past], after[:, past])
        assert not torch.equal(before[:, future], after[:, future])


def test_parts_of_one_projection_are_read_where_they_lie(device: str) -> None:
    """As in Mamba2: x, b and c are slices of one tensor, here with NaN on every side."""
    dtype = bfloat16_or_float32(device)
    case = make("ssd", 2, 37, 1, 2, 16, 16, starts="random", dtype=dtype, device=device)
    wide = torch.full((4, 40, 8 + 32 + 16 + 16 + 8), torch.nan, dtype=dtype, device=device)
    inner = wide[1:3, 2:39]
    views = {}
    for name, (a, z) in {"x": (8, 40), "b": (40, 56), "c": (56, 72)}.items():
        views[name] = inner[..., a:z].unflatten(2, (-1, 16))
        views[name].copy_(case.learned[name].detach())
        assert not views[name].is_contiguous()
    steps = torch.full((4, 40, 4), torch.nan, device=device)
    views["dt"] = steps[1:3, 2:39, 1:3]
    views["dt"].copy_(case.learned["dt"].detach())
    with case.cut(chunk=16, programs_per_sm=4):
        expected = case.results()
        same(case.but(**views).results(), expected)
        # Off the 16 bytes that tensor cores read at a time.
        shifted = torch.full((2, 37, 33), torch.nan, dtype=dtype, device=device)[..., 1:].unflatten(2, (2, 16))
        shifted.copy_(case.learned["x"].detach())
        same(case.but(x=shifted).results(), expected)
        marks = torch.ones(2, 74, dtype=torch.bool, device=device)[:, ::2]
        marks.copy_(case.fixed["starts"])
        same(case.but(starts=marks).results(), expected)


def test_gradients_that_are_views(device: str) -> None:
    """``sum()`` gives a gradient of one number in memory; a loss on a part leaves the others without."""
    case = make("scalar_decay", 1, 20, 2, 2, 16, 16, dtype=bfloat16_or_float32(device), device=device)
    exact, wanted = case.in_double(), list(case.learned)
    with case.cut(chunk=16):
        for pick in (0, 1):
            found = torch.autograd.grad(case.run("triton")[pick].sum(), [case.learned[n] for n in wanted])
            expected = torch.autograd.grad(
                exact.run("reference")[pick].sum(), list(exact.learned.values()), allow_unused=True
            )
            for name, a, b in zip(wanted, found, expected, strict=True):
                b = torch.zeros_like(a) if b is None else b
                agree({name: a}, {name: b}, 1e-5 if device == "cpu" else 1.5e-2)


def test_packed_rows_are_their_segments(device: str) -> None:
    """Boundaries as in cu_seqlens, with segments of one token and of none."""
    bounds = [0, 0, 5, 5, 6, 7, 7, 7, 40, 57, 57]
    lengths = torch.tensor(bounds).diff()
    ids = torch.repeat_interleave(torch.arange(1, len(bounds)), lengths)[None].to(device)
    starts = SequenceLayout.build(1, 57, ids.to(torch.int32)).starts
    case = make("scalar_decay", 1, 57, 1, 2, 16, 16, gate="slow", dtype=bfloat16_or_float32(device), device=device)
    case.fixed["starts"] = starts
    with case.cut(chunk=16, programs_per_sm=4):
        found = case.results()
    assert not found["grad of log_decay"][starts].any(), "a decay that is not applied has no gradient"
    pieces = [(a, z) for a, z in itertools.pairwise(bounds) if z > a]
    exact = case.in_double().learned
    outputs = []
    for a, z in pieces:
        inputs = {name: x[:, a:z] for name, x in exact.items() if name != "initial_state"}
        state = exact["initial_state"] if a == 0 else None
        outputs.append(scalar_decay(**inputs, initial_state=state, implementation="reference"))
    expected = torch.cat([output for output, _ in outputs], dim=1)
    agree({"output": found["output"]}, {"output": expected}, EXACT[bfloat16_or_float32(device)])
    agree({"final state": found["final state"]}, {"final state": outputs[-1][1]}, EXACT[bfloat16_or_float32(device)])


def test_a_step_of_minus_infinity_is_padding(device: str) -> None:
    """The state passes by, nothing is written, and every gradient there is zero or that of the direct path."""
    dtype = bfloat16_or_float32(device)
    case = make("ssd", 1, 40, 1, 2, 16, 16, dtype=dtype, device=device)
    kept = torch.rand(40) < 0.6
    kept[[0, 20, 39]] = torch.tensor([False, True, False])
    raw = case.learned["dt"].detach().clone()
    raw[:, ~kept] = -torch.inf
    padded = case.but(dt=raw)
    shorter = padded.but(
        **{name: x.detach()[:, kept] for name, x in padded.learned.items() if x.dim() > 1 and x.shape[1] == 40}
    )
    with case.cut(chunk=16, programs_per_sm=4):
        found, expected = padded.run("triton"), shorter.run("triton")
        agree({"o": found[0][:, kept], "s": found[1]}, {"o": expected[0], "s": expected[1]}, EXACT[dtype])
        weigh = torch.ones_like(found[0])
        names = ["x", "dt", "b", "c", "a", "dt_bias"]
        grads = dict(zip(names, torch.autograd.grad(found[0], [padded.learned[n] for n in names], weigh), strict=True))
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["dt"][:, ~kept].any() and not grads["b"][:, ~kept].any()
    direct = padded.learned["d"].detach()[None, None, :, None].expand_as(found[0]).to(dtype)
    torch.testing.assert_close(grads["x"][:, ~kept], direct[:, ~kept])


def test_a_constant_decay(device: str) -> None:
    dtype = bfloat16_or_float32(device)
    case = make("scalar_decay", 1, 33, 1, 2, 16, 16, dtype=dtype, device=device)
    rate = torch.tensor([-0.02, -3.0], device=device)
    constant = case.but(log_decay=rate)
    spread = case.but(log_decay=rate.expand(1, 33, 2).clone())
    with case.cut(chunk=16):
        one, other = constant.results(), spread.results()
    assert one["grad of log_decay"].shape == (2,)
    other["grad of log_decay"] = other["grad of log_decay"].sum((0, 1))
    agree(one, other, 1e-6)


def test_it_says_why_it_cannot_run(device: str) -> None:
    q, wide = torch.ones(1, 3, 1, 16, device=device), torch.ones(1, 3, 1, 257, device=device)
    gate = torch.zeros(1, 3, 1, device=device)
    with pytest.raises(ValueError, match=r"cannot run in Triton: .* not torch.float16"):
        scalar_decay(q.half(), q.half(), q.half(), gate, implementation="triton")
    with pytest.raises(ValueError, match="heads up to 256 wide, not 16 and 257"):
        scalar_decay(q, q, wide, gate, implementation="triton")
    with pytest.raises(ValueError, match="an empty input"):
        scalar_decay(q[:, :0], q[:, :0], q[:, :0], gate[:, :0], implementation="triton")
    output, final = scalar_decay(q[:, :0], q[:, :0], q[:, :0], gate[:, :0])
    assert output.shape == (1, 0, 1, 16) and not final.any()
