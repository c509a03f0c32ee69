"""What every op promises to the rest of torch: compilers, fake tensors, CUDA graphs, autocast, checkpointing, FSDP2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils._python_dispatch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from seqlong.block import Block
from seqlong.ffn import SwiGLU
from seqlong.kernels import probes, runtime
from seqlong.kernels.norm import rms_norm
from seqlong.kernels.probes import PROBES, Inputs
from seqlong.kernels.rotary import rotary
from seqlong.kernels.scalar_decay import ssd
from seqlong.kernels.short_conv import short_conv
from seqlong.layout import SequenceLayout
from seqlong.mixers import Mamba2
from seqlong.norms import RMSNorm

needs_triton = pytest.mark.skipif(not runtime._INSTALLED, reason="triton is not installed")
#: Ops with a Triton form, and widths that an interpreter runs in a blink.
SIZES: dict[str, dict[str, int]] = {
    "scalar_decay": {"g": 1, "h": 2, "k": 16, "v": 16},
    "bidirectional_decay": {"g": 2, "h": 2, "k": 16, "v": 16},
    "ssd": {"g": 1, "h": 2, "k": 16, "v": 16},
    "vector_decay": {"h": 2, "k": 16, "v": 16},
    "delta_rule": {"g": 2, "h": 2, "k": 16, "v": 16},
    "dplr": {"h": 2, "k": 16, "v": 16},
    "short_conv": {"d": 8, "w": 4},
    "rms_norm": {"d": 16},
    "gated_rms_norm": {"d": 16, "g": 2},
    "rotary": {"h": 2, "k": 8},
    "linear_cross_entropy": {"d": 16, "y": 40},
}
CASES = [(op, case) for op in SIZES for case in PROBES[op].cases]
EACH = pytest.mark.parametrize(("op", "case"), CASES)


@pytest.fixture(params=["chunked", "triton"])
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and (reason := runtime.triton_runs_on(DEVICE)):
        pytest.skip(reason)
    return str(request.param)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(op: str, case: str = "plain", length: int = 40, dtype: torch.dtype | None = None, rows: int = 1) -> Inputs:
    kept = dtype or (torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    return probes.inputs(PROBES[op], DEVICE, kept, case=case, rows=rows, length=length, sizes=SIZES[op])


def run(op: str, given: Inputs, implementation: str | None) -> dict[str, Tensor]:
    return probes.run(PROBES[op], given, implementation)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_every_op_with_triton_is_here() -> None:
    # Rows without a sequence, and runs of others' kernels: tests of their own ask the same of them.
    elsewhere = {"grouped_matmul", "log_linear"}
    offered = {op for op, probe in PROBES.items() if "triton" in probes.implementations(probe)}
    assert set(SIZES) == offered - elsewhere


class Names(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the names of our ops; anything that watches sends calls through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "seqlong":
            self.seen.add(func.name().removeprefix("seqlong::"))
        return func(*args, **(kwargs or {}))


# -- The short way around the dispatcher ------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("op", "case"), [pair for pair in CASES if pair[0] in ("scalar_decay", "ssd")])
def test_eager_calls_go_around_the_dispatcher_and_change_no_bit(op: str, case: str, recompute: bool) -> None:
    given = draw(op, case)
    given.fixed["recompute"] = recompute
    watched, without, plain = Names(), Names(), run(op, given, "triton")
    with watched:
        same(run(op, given, "triton"), plain)
    name = "scalar_decay_windows" if recompute else "scalar_decay_triton"
    assert {name, f"{name}_backward"} <= watched.seen
    with torch.no_grad():
        short = probes.call(PROBES[op], given, "triton")
        with without:
            same(probes.call(PROBES[op], given, "triton"), short)
    assert without.seen == {"scalar_decay_triton"}
    same(short, {name: plain[name] for name in short})


@needs_triton
def test_what_watches_sees_the_op() -> None:
    from seqlong.kernels.scalar_decay.triton import untraced

    x = torch.ones(2)
    assert untraced(x, None, torch.nn.Parameter(x))
    assert not untraced(x, torch.ones(2, device="meta"))
    assert not untraced(x.as_subclass(type("Tagged", (Tensor,), {})))
    with torch.device("cpu"):
        assert not untraced(x)
    with Names():
        assert not untraced(x)
    with FakeTensorMode() as mode:
        assert not untraced(mode.from_tensor(x))
    assert not any(torch.func.vmap(lambda y: y * untraced(y))(torch.ones(2, 2)).flatten().tolist())


@needs_triton
def test_a_second_derivative_is_refused() -> None:
    """Silence would be a wrong one."""
    for fixed in ({}, {"recompute": True}):
        given = draw("scalar_decay")
        given.fixed.update(fixed)
        output = probes.call(PROBES["scalar_decay"], given, "triton")["o"]
        (grad,) = torch.autograd.grad(output.sum(), given.learned["q"], create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            (output.sum() + grad.square().sum()).backward()


# -- Registration, shapes, memory -------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("ssd_like", [False, True])
def test_opcheck_of_the_scan(ssd_like: bool) -> None:
    """torch's own checks: schema and aliases, autograd registration, fake tensors, tracing with symbolic shapes."""
    from seqlong.kernels.scalar_decay import triton as module
    from seqlong.kernels.scalar_decay import windows
    from seqlong.kernels.scalar_decay.plan import CHUNKS, NOTHING

    given = draw("ssd" if ssd_like else "scalar_decay", "packed").learned
    if ssd_like:
        inputs = [*(given[n] for n in ("c", "b", "x", "dt", "dt_bias", "a", "d")), None, given["initial_state"], False]
    else:
        inputs = [*(given[n] for n in ("q", "k", "v", "log_decay")), None, None, None, None, None, True]
    torch.library.opcheck(module.scalar_decay_triton, (*inputs, CHUNKS))
    torch.library.opcheck(windows.scalar_decay_windows, tuple(inputs))
    bare = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    bare[7] = torch.rand(1, 40, device=DEVICE) < 0.1
    forward_checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(module.scalar_decay_triton, (*bare, NOTHING), test_utils=forward_checks)
    output, final, *kept = module.scalar_decay_triton(*bare, CHUNKS)
    q, k, v, gate, bias, rate, skip, starts, initial, reverse = bare
    common = (q, k, v, bias, rate, skip, starts, initial, *kept, reverse)
    torch.library.opcheck(module.scalar_decay_triton_backward, (output, None, *common), test_utils=forward_checks)
    *_, entries = windows.scalar_decay_windows(*bare)
    common = (q, k, v, gate, bias, rate, skip, starts, entries, reverse)
    torch.library.opcheck(windows.scalar_decay_windows_backward, (output, final, *common), test_utils=forward_checks)


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_of_cross_entropy(bias: bool) -> None:
    from seqlong.kernels.cross_entropy.op import _forward

    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
    offset = torch.randn(12, requires_grad=True) if bias else None
    targets = torch.randint(-1, 12, (9,))
    torch.library.opcheck(_forward, (hidden, weight, targets, offset, 0.1, 4, 0, 0))


@EACH
def test_fake_tensors_have_the_shapes_of_real_ones(op: str, case: str, implementation: str) -> None:
    """Also everything that a compiler is told of: types, strides and devices."""
    given = draw(op, case, rows=2)
    real = run(op, given, implementation)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        learned = {name: mode.from_tensor(x) for name, x in given.learned.items()}
        fixed = {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in given.fixed.items()}
        outputs = probes.call(PROBES[op], Inputs(learned, fixed), implementation)
        grads = torch.autograd.grad(
            list(outputs.values()), list(learned.values()), [torch.ones_like(x) for x in outputs.values()]
        )
    fake = {**outputs, **{f"d{name}": grad for name, grad in zip(learned, grads, strict=True)}}
    for name, value in real.items():
        found = fake[name]
        assert (found.shape, found.dtype, found.device) == (value.shape, value.dtype, value.device), name
        assert found.stride() == value.stride(), name


@EACH
def test_meta_tensors_have_the_shapes_of_real_ones(op: str, case: str) -> None:
    if op == "linear_cross_entropy":
        pytest.skip("it asks for the autocast of its device, and meta has none")
    given = draw(op, case)
    meta = Inputs(
        {name: x.detach().to("meta") for name, x in given.learned.items()},
        {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in given.fixed.items()},
    )
    for name, value in probes.call(PROBES[op], meta, None).items():
        assert value.shape == run(op, given, "chunked")[name].shape


@EACH
def test_results_share_no_memory(op: str, case: str, implementation: str) -> None:
    """Not with inputs, nor with each other: a caller may write to any of them."""
    given = draw(op, case)
    found = run(op, given, implementation)
    places = [x.untyped_storage().data_ptr() for x in (*found.values(), *given.learned.values())]
    assert len(set(places)) == len(places), dict(zip((*found, *given.learned), places, strict=True))


# -- Modes ------------------------------------------------------------------------------------------------------------


@EACH
def test_autocast_changes_nothing(op: str, case: str, implementation: str) -> None:
    """Types are those of the inputs: an op that has to be exact is exact under autocast too."""
    if op == "linear_cross_entropy":
        pytest.skip("its products are the caller's choice, see its own tests")
    given = draw(op, case)
    plain = run(op, given, implementation)
    with torch.autocast(DEVICE, torch.bfloat16):
        same(run(op, given, implementation), plain)


@EACH
def test_checkpointing_changes_nothing(op: str, case: str, implementation: str) -> None:
    given = draw(op, case)
    plain, names = run(op, given, implementation), list(given.learned)

    def call(*learned: Tensor) -> tuple[Tensor, ...]:
        again = Inputs(dict(zip(names, learned, strict=True)), given.fixed)
        return tuple(probes.call(PROBES[op], again, implementation).values())

    outputs = checkpoint(call, *given.learned.values(), use_reentrant=False)
    found = dict(zip(PROBES[op].outputs, outputs, strict=False))
    source = torch.Generator().manual_seed(2)
    weigh = [torch.randn(x.shape, generator=source).bfloat16().to(x.device, x.dtype) for x in outputs]
    grads = torch.autograd.grad(outputs, list(given.learned.values()), weigh)
    same({**found, **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}, plain)


def test_selective_checkpointing_knows_the_scan_by_name(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy decides by the names of ops, so it must see them; gradients stay the same."""
    monkeypatch.setenv("SEQLONG_KERNELS", implementation)
    block, layout, hidden = (
        block_of(),
        SequenceLayout.build(1, 40, device=DEVICE),
        torch.randn(1, 40, 32, device=DEVICE),
    )
    results = []
    for mode in ("none", "selective", "block"):
        output, _, _ = block(hidden, layout, checkpointing=mode)
        results.append(torch.autograd.grad(output.square().sum(), list(block.parameters())))
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            torch.testing.assert_close(a, b)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def block_of() -> Block:
    torch.manual_seed(1)
    mixer = Mamba2(32, d_state=16, head_dim=16)
    return Block(32, mixer, SwiGLU(32), RMSNorm).to(DEVICE)


def train(block: Block) -> list[float]:
    torch.manual_seed(2)
    optimizer, losses = torch.optim.SGD(block.parameters(), lr=0.1), []
    for _ in range(2):
        hidden = torch.randn(1, 12, 32, device=DEVICE)
        output, _, _ = block(hidden, SequenceLayout.build(1, 12, device=DEVICE))
        loss = (output - hidden.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo shards on a CPU")
@pytest.mark.usefixtures("one_process")
def test_a_sharded_block_trains_as_a_whole_one(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2: parameters are DTensors outside of the forward pass, and plain tensors where ops see them."""
    monkeypatch.setenv("SEQLONG_KERNELS", implementation)
    whole = train(block_of())
    block = block_of()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(block.mixer, mesh=mesh)
    fully_shard(block, mesh=mesh)
    assert train(block) == pytest.approx(whole, rel=1e-6)
    assert whole[1] != whole[0]


# -- Derivatives of what has no gradcheck elsewhere --------------------------------------------------------------------


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradcheck_of_ssd() -> None:
    x, dt, b, c = double(1, 7, 2, 2), double(1, 7, 2), double(1, 7, 1, 3), double(1, 7, 1, 3)
    a = (-torch.rand(2).double()).requires_grad_()
    starts = torch.tensor([[False, False, True, False, True, True, False]])

    def op(x, dt, a, b, c, d, bias, state):  # type: ignore[no-untyped-def]
        return ssd(x, dt, a, b, c, d=d, dt_bias=bias, starts=starts, initial_state=state, implementation="chunked")

    assert torch.autograd.gradcheck(op, (x, dt, a, b, c, double(2), double(2), double(1, 2, 3, 2)))


def test_gradcheck_of_short_conv() -> None:
    starts = torch.tensor([[False, False, True, False, True]])

    def op(x, weight, bias, state):  # type: ignore[no-untyped-def]
        return short_conv(x, weight, bias, starts=starts, state=state, output_state=True, implementation="chunked")

    assert torch.autograd.gradcheck(op, (double(1, 5, 3), double(3, 3), double(3), double(1, 2, 3)))


def test_gradcheck_of_rms_norm_and_rotary() -> None:
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, implementation="chunked"), (double(3, 4), double(4)))
    positions = torch.tensor([[0, 3, 70000]])
    assert torch.autograd.gradcheck(lambda x: rotary(x, positions, implementation="chunked"), (double(1, 3, 2, 4),))


# -- Compilers --------------------------------------------------------------------------------------------------------


def compile_whole(ops: list[str], implementations: list[str], lengths: list[int], backend: str) -> None:
    """Forward and backward as one graph equal eager; one graph or two serve every length."""
    if DEVICE == "cpu" and "triton" in implementations:
        sys.path.insert(0, str(Path(__file__).parent))
        import triton_on_cpu

        triton_on_cpu.install()
    for op, case in CASES:
        for implementation in implementations:
            if op in ops:
                compile_one(op, case, implementation, lengths, backend)
                print("compiled", op, case, implementation)


def compile_one(op: str, case: str, implementation: str, lengths: list[int], backend: str) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    names, function = list(draw(op, case).learned), probes.function(PROBES[op])
    assert function is not None

    def call(fixed: dict[str, Any], *learned: Tensor) -> list[Tensor]:
        named = dict(zip(names, learned, strict=True))
        outputs = function(**named, **fixed, implementation=implementation)
        return [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for length in lengths:
        given = draw(op, case, length)
        for x in (*given.learned.values(), *given.fixed.values()):
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == length:
                torch._dynamo.mark_dynamic(x, 1)
        results = []
        for way in (call, compiled):
            outputs = way(given.fixed, *given.learned.values())
            grads = torch.autograd.grad(outputs, list(given.learned.values()), [torch.ones_like(x) for x in outputs])
            results.append([*outputs, *grads])
        for found, expected in zip(*reversed(results), strict=True):
            # A compiler rounds elsewhere: what is near zero among large numbers has their digits. A gate that differs
            # in its last digit changes what a kernel rounds to bfloat16, and that the gates' own gradients.
            near = 1.6e-2 if found.dtype == torch.bfloat16 else 1e-3 if DEVICE == "cuda" else 1e-5
            torch.testing.assert_close(found, expected, rtol=near, atol=near * expected.abs().max().item())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 2, f"{op}, {case}, {implementation}: {graphs} graphs for {len(lengths)} lengths"


def in_its_own_process(call: str) -> str:
    """Shapes checked at run time cannot be traced."""
    code = f"import runpy; runpy.run_path({str(Path(__file__))!r})['compile_whole']({call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_scans_compile_for_every_length() -> None:
    kinds = ["chunked"] + ["triton"] * (runtime.triton_runs_on(DEVICE) is None)
    said = in_its_own_process(f"['scalar_decay', 'ssd'], {kinds}, [70, 40, 130], 'aot_eager'")
    assert said.count("compiled ") == 5 * len(kinds)


@pytest.mark.gpu
def test_everything_compiles_on_a_gpu() -> None:
    said = in_its_own_process(f"{list(SIZES)}, ['triton'], [70, 150, 1000, 40000], 'inductor'")
    assert said.count("compiled ") == len(CASES)


@pytest.mark.gpu
@EACH
def test_cuda_graphs_replay_what_is_eager(op: str, case: str) -> None:
    given, other = draw(op, case, 300), draw(op, case, 300)
    with torch.no_grad():
        for name, x in other.learned.items():
            x.copy_(x.flip(0) if x.dim() == 1 else x.flip(-1))
            assert x.shape == given.learned[name].shape
    expected = [run(op, one, "triton") for one in (given, other)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    outputs = probes.call(PROBES[op], given, "triton")
    source = torch.Generator().manual_seed(2)
    weigh = [torch.randn(x.shape, generator=source).bfloat16().to(x.device, x.dtype) for x in outputs.values()]

    def both() -> dict[str, Tensor]:
        # Leaves of this stream: autograd would make a capture wait for the stream that first used the others.
        leaves = {name: x.detach().requires_grad_() for name, x in given.learned.items()}
        found = probes.call(PROBES[op], replace(given, learned=leaves), "triton")
        grads = torch.autograd.grad(list(found.values()), list(leaves.values()), weigh, materialize_grads=True)
        return {**found, **{f"d{name}": grad for name, grad in zip(given.learned, grads, strict=True)}}

    with torch.cuda.stream(stream):
        for _ in range(3):
            both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    graph.replay()
    same(found, expected[0])
    with torch.no_grad():
        for name, x in given.learned.items():
            x.copy_(other.learned[name])
    graph.replay()
    same(found, expected[1])
