"""Triton's scalar_decay and ssd against the float64 loop over tokens: in the interpreter here, on a GPU there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from seqlong.kernels import runtime, tuning
from seqlong.kernels.scalar_decay import plan, scalar_decay, ssd, windows
from seqlong.layout import SequenceLayout

# The interpreter computes what a mask then throws away: powers of the future, infinity times zero.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

OPS = {"scalar_decay": scalar_decay, "ssd": ssd}
#: Largest relative error (root mean square) of a result. In float32 a gate in a chunk with many starts has 1e-4 of its
#: own: a start is a decay of 2^-160, and the running sum of many has few digits left.
EXACT = {torch.float32: 3e-4, torch.bfloat16: 1.5e-2}
#: The same between two ways to cut a row.
CUT = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2}


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


GATES = {
    "usual": lambda drawn: -2 * drawn,
    "slow": lambda drawn: -0.01 * drawn,
    "none": lambda drawn: 0 * drawn,
    "strong": lambda drawn: 0 * drawn - 100,
    "never": lambda drawn: 0 * drawn - 1e4,
    "mixed": lambda drawn: -1e4 * drawn**8,
}
STARTS = {
    "none": lambda starts: None,
    "random": lambda starts: starts.copy_(torch.rand(starts.shape) < 0.15),
    "every": lambda starts: starts.fill_(True),
    "first": lambda starts: starts.index_fill_(1, torch.tensor([0], device=starts.device), True),
    "consecutive": lambda starts: starts.index_fill_(
        1, torch.tensor([t for t in (1, 2, 3, 15, 16, 17, 40, 63, 64) if t < starts.shape[1]], device=starts.device),
        True,
    ),
}  # fmt: skip


@dataclass
class Case:
    """Inputs of one op: what is learned, and what is not."""

    op: str
    learned: dict[str, Tensor]
    fixed: dict[str, Any]

    def run(self, implementation: str, **options: Any) -> tuple[Tensor, Tensor]:
        return OPS[self.op](**self.learned, **{**self.fixed, **options}, implementation=implementation)

    def results(self, implementation: str = "triton", **options: Any) -> dict[str, Tensor]:
        """Output, final state, and gradients of a sum of both with fixed weights."""
        output, final = self.run(implementation, **options)
        source = torch.Generator().manual_seed(5)
        weigh = [torch.randn(x.shape, generator=source).bfloat16().to(x.device, x.dtype) for x in (output, final)]
        grads = torch.autograd.grad([output, final], list(self.learned.values()), weigh)
        named = zip((f"grad of {name}" for name in self.learned), grads, strict=True)
        return {"output": output.detach(), "final state": final.detach(), **dict(named)}

    def but(self, **changed: Any) -> Case:
        """The same with other tensors."""
        fixed = {name: changed.pop(name, value) for name, value in self.fixed.items()}
        return Case(self.op, {**self.learned, **{n: x.requires_grad_() for n, x in changed.items()}}, fixed)

    def in_double(self) -> Case:
        learned = {name: x.detach().double().requires_grad_() for name, x in self.learned.items()}
        return Case(self.op, learned, self.fixed)

    def cut(self, **settings: int) -> AbstractContextManager[None]:
        """Run with these settings of the plan; ``programs_per_sm=0`` makes one segment a row."""
        q, v = (self.learned[name] for name in (("q", "v") if self.op == "scalar_decay" else ("c", "x")))
        widths = plan.power(q.shape[3]), plan.power(v.shape[3])
        name = plan._asked(v.dtype, *widths, q.shape[2] != v.shape[2], self.op == "ssd")[1]
        return tuning.using(self.op, settings, name)


def make(op: str, rows: int, length: int, groups: int, heads: int, k: int, v: int, gate: str = "usual",
         starts: str = "none", dtype: torch.dtype = torch.float32, device: str = "cpu", state: bool = True,
         **fixed: Any) -> Case:  # fmt: skip
    """Inputs drawn on the CPU, so that they are the same everywhere."""
    on = {"device": device, "dtype": dtype}
    q, key = torch.randn(rows, length, groups, k), torch.randn(rows, length, groups, k) * k**-0.5
    value, drawn = torch.randn(rows, length, heads, v), GATES[gate](torch.rand(rows, length, heads))
    if op == "scalar_decay":
        learned = {"q": q.to(**on), "k": key.to(**on), "v": value.to(**on), "log_decay": drawn.to(device)}
    else:
        rate = -1 - 15 * torch.rand(heads)  # as Mamba2 draws them
        # softplus is the identity where it is large, and e^x where it is small: steps of the size of the gates.
        step = (drawn / rate).clamp(min=1e-6)
        raw = torch.where(step > 20, step, step.expm1().log())
        bias = torch.randn(heads)
        learned = {"x": value.to(**on), "dt": (raw - bias).to(device), "a": rate.to(device), "b": key.to(**on),
                   "c": q.to(**on), "d": torch.randn(heads).to(device), "dt_bias": bias.to(device)}  # fmt: skip
    if state:
        learned["initial_state"] = torch.randn(rows, heads, k, v).to(device)
    marks = STARTS[starts](torch.zeros(rows, length, dtype=torch.bool, device=device))
    return Case(op, {name: x.requires_grad_() for name, x in learned.items()}, {"starts": marks, **fixed})


def error(found: Tensor, exact: Tensor) -> float:
    """Relative to the exact values, or 0.1: gradients of gates are near zero where nothing is remembered."""
    scale = exact.double().norm().clamp(min=0.1 * exact.numel() ** 0.5)
    return ((found.double() - exact.double()).norm() / scale).item()


def agree(found: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> None:
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert value.isfinite().all(), f"{name} is not finite"
        assert error(value, exact[name]) < limit, f"{name}: {error(value, exact[name]):.1e}"


def same(found: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit by bit."""
    for name, value in found.items():
        assert torch.equal(value, other[name]), name


def bfloat16_or_float32(device: str) -> torch.dtype:
    """On a GPU bfloat16, which models use: kernels in float32 take minutes to compile."""
    return torch.float32 if device == "cpu" else torch.bfloat16


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


# -- On a GPU: sizes that matter --------------------------------------------------------------------------------------


def by_blocks(x: Tensor) -> Tensor:
    """Norms of blocks of 64 tokens (the last has up to 127) and heads of x (b t h ...); of x without tokens its own."""
    if x.dim() < 3:
        return x.double().norm()[None]
    squares = x.double().square().flatten(3).sum(3) if x.dim() == 4 else x.double().square()
    block = (torch.arange(x.shape[1], device=x.device) // 64).clamp(max=max(1, x.shape[1] // 64) - 1)
    sums = squares.new_zeros(x.shape[0], int(block[-1]) + 1, x.shape[2])
    return sums.index_add_(1, block, squares).sqrt()


def no_worse(found: dict[str, Tensor], chunked: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """In every block of 64 tokens and every head, at most twice the error of torch in the same type, and a floor: that
    of rounding the block itself, and of rounding what a block of this tensor usually holds, 0.1 a number at least."""
    for name, value in found.items():
        assert value.isfinite().all(), f"{name} is not finite"
        # A state (b h k v) is a block a head.
        norms = (lambda x: x.double().flatten(2).norm(dim=2)) if "state" in name else by_blocks
        size = norms(exact[name])
        few = value.dim() == 1  # one number a head, of which plain torch may by chance have the last digit right
        floor = (1e-2 if few else 2e-3) * (size + size.square().mean().sqrt().clamp(min=0.8))
        worst = (norms(value - exact[name]) / (2 * norms(chunked[name] - exact[name]) + floor)).max().item()
        assert worst <= 1, f"{name}: {worst:.2f} of what is allowed"


SHAPES = [
    ("scalar_decay", 2, 1000, 4, 4, 64, 64), ("scalar_decay", 1, 4133, 2, 2, 128, 128),
    ("scalar_decay", 1, 1000, 1, 4, 64, 64), ("scalar_decay", 1, 333, 2, 4, 100, 60),
    ("scalar_decay", 2, 257, 2, 2, 16, 24), ("scalar_decay", 1, 257, 1, 2, 24, 192),
    ("scalar_decay", 1, 333, 2, 2, 256, 256), ("ssd", 2, 1000, 1, 8, 128, 64), ("ssd", 1, 333, 2, 4, 60, 100),
    ("ssd", 1, 333, 1, 2, 256, 256), ("ssd", 2, 65, 1, 4, 16, 16),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_gpu_errors_are_those_of_torch_in_the_same_type(shape: tuple[Any, ...]) -> None:
    """Extreme gates, starts, states; no bit differs when it is done again."""
    variants: list[dict[str, Any]] = [
        {"gate": "slow"},
        {"gate": "usual", "starts": "random"},
        {"gate": "mixed" if shape[0] == "scalar_decay" else "usual", "starts": "consecutive"},
        {"gate": "strong", "starts": "first"},
        {"gate": "none", "state": False},
    ]
    if shape[0] == "scalar_decay":
        variants.append({"gate": "slow", "starts": "random", "reverse": True})
    for options in variants:
        case = make(*shape, dtype=torch.bfloat16, device="cuda", **options)
        found = case.results()
        no_worse(found, case.results("chunked"), case.in_double().results("chunked"))
        same(case.results(), found)


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [0, 1, 4, 64])
def test_gpu_segments_are_nobodys_business(programs: int) -> None:
    for shape in (SHAPES[0], SHAPES[2], SHAPES[7]):
        case = make(*shape, gate="slow", starts="random", dtype=torch.bfloat16, device="cuda")
        with case.cut(programs_per_sm=programs):
            no_worse(case.results(), case.results("chunked"), case.in_double().results("chunked"))


def long(op: str, rows: int, length: int, groups: int, heads: int, k: int, v: int) -> Case:
    """Inputs drawn on the GPU, whose decays forget a token within a thousand others."""
    on = {"device": "cuda", "dtype": torch.bfloat16}
    q, key = (torch.randn(rows, length, groups, k, **on) * scale for scale in (1, k**-0.5))
    value, drawn = torch.randn(rows, length, heads, v, **on), torch.rand(rows, length, heads, device="cuda")
    marks = torch.rand(rows, length, device="cuda") < 1e-3
    if op == "scalar_decay":
        learned = {"q": q, "k": key, "v": value, "log_decay": -0.05 - 0.1 * drawn}
    else:
        rate = -1 - torch.rand(heads, device="cuda")
        ones = torch.ones(heads, device="cuda")
        learned = {"x": value, "dt": 0.5 * drawn - 3, "a": rate, "b": key, "c": q, "d": ones, "dt_bias": ones / 8}
    return Case(op, {name: x.requires_grad_() for name, x in learned.items()}, {"starts": marks})


def windows_agree(case: Case, found: dict[str, Tensor], weigh: Tensor, places: list[tuple[int, int]]) -> None:
    """Around (row, token), the middle of a window that reaches 1,024 tokens to either side, again in float64."""
    length = weigh.shape[1]
    for row, at in places:
        a, z = max(0, at - 1536), min(length, at + 1536)
        inner = slice(0 if a == 0 else 1024, z - a if z == length else z - a - 1024)
        results = []
        for dtype in (torch.float64, torch.bfloat16):
            learned = {}
            for name, x in case.learned.items():
                part = x.detach()[row : row + 1, a:z] if x.dim() > 1 else x.detach()
                kept = dtype if dtype == torch.float64 or x.dtype == torch.bfloat16 else torch.float32
                learned[name] = part.to(kept).requires_grad_()
            starts = case.fixed["starts"][row : row + 1, a:z]
            output, _ = OPS[case.op](**learned, starts=starts, implementation="chunked")
            grads = torch.autograd.grad(output, list(learned.values()), weigh[row : row + 1, a:z].to(output.dtype))
            named = zip((f"grad of {name}" for name in learned), grads, strict=True)
            results.append({"output": output.detach(), **{n: g for n, g in named if g.dim() > 1}})
        exact, torchs = ({n: x[:, inner] for n, x in result.items()} for result in results)
        mine = {n: found[n][row : row + 1, a:z][:, inner] for n in exact if n in found}
        no_worse(mine, torchs, exact)


def check_long(case: Case, places: list[tuple[int, int]], recompute: bool = False) -> None:
    like = case.learned["v" if case.op == "scalar_decay" else "x"]
    weigh = torch.randn_like(like)
    output, _ = case.run("triton", recompute=recompute)
    grads = torch.autograd.grad(output, list(case.learned.values()), weigh)
    named = zip((f"grad of {name}" for name in case.learned), grads, strict=True)
    windows_agree(case, {"output": output.detach(), **dict(named)}, weigh, places)


@pytest.fixture
def plain_memory() -> Iterator[None]:
    """Filling tens of GiB with NaN is not what is measured here."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.usefixtures("plain_memory")
@pytest.mark.parametrize("length", [131072, 1048576])
@pytest.mark.parametrize("recompute", [False, True])
def test_gpu_long_rows(length: int, recompute: bool) -> None:
    places = [(0, at) for at in (0, length // 3 + 17, length // 2, length - 1)]
    check_long(long("scalar_decay", 1, length, 4, 4, 64, 64), places, recompute)
    check_long(long("ssd", 1, length, 1, 8, 128, 64), places, recompute)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.usefixtures("plain_memory")
@pytest.mark.parametrize(("rows", "length"), [(1, (1 << 20) + 77), (3, 349_621)])
def test_gpu_past_two_to_the_31_elements(rows: int, length: int) -> None:
    """x and what is kept have more than 2^31 elements; the last tokens lie beyond. About 45 GiB."""
    case = long("ssd", rows, length, 1, 32, 128, 64)
    assert case.learned["x"].numel() > 1 << 31
    check_long(case, [(rows - 1, length - 1), (rows - 1, length - 3000), (0, 0), (rows // 2, length // 2)])
