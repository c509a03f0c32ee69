"""linear_cross_entropy: every implementation against the loop over positions, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seqlong.kernels import probes, tuning
from seqlong.kernels.cross_entropy import linear_cross_entropy
from seqlong.kernels.cross_entropy import op as module
from seqlong.kernels.runtime import triton_runs_on

PROBE = probes.PROBES["linear_cross_entropy"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    triton_runs_on(DEVICE) is not None, reason=f"Triton does not run here: {triton_runs_on(DEVICE)}"
)
FORMS = ["chunked", pytest.param("triton", marks=needs_triton)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 256, so that a few hundred classes take several."""
    monkeypatch.setattr(tuning, "_find", lambda op, key, default, device: ({"block": 256, "warps": 4}, "own"))
    tuning.forget()
    yield
    tuning.forget()


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("case", PROBE.cases)
@pytest.mark.parametrize("classes", [1, 3, 16, 255, 256, 700])
def test_against_the_loop(classes: int, case: str, implementation: str) -> None:
    settings = {"case": case, "length": 37, "sizes": {"y": classes, "d": 24}}
    # Of one class there is no choice, so its gradients are those of z_loss: differences too small for bf16.
    for dtype in [torch.float32] + [torch.bfloat16] * (classes > 1):
        found = probes.error(PROBE, implementation, DEVICE, dtype, **settings)
        plain = probes.error(PROBE, "chunked", DEVICE, dtype, **settings)
        assert probes.wrong(found, plain, dtype) is None
        if dtype == torch.float32 and DEVICE == "cpu":
            assert max(found.values()) < 1e-5, found


def draws(classes: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(2, 9, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(classes, 8, device=DEVICE, requires_grad=True)
    return hidden, weight, torch.randint(-1, classes, (2, 9), device=DEVICE)


@pytest.mark.parametrize("implementation", FORMS)
def test_chunks_do_not_change_the_result(implementation: str) -> None:
    hidden, weight, targets = draws()
    results = []
    for chunk in (0, 1, 5):
        loss = linear_cross_entropy(hidden, weight, targets, z_loss=0.1, chunk=chunk, implementation=implementation)
        results.append((loss, *torch.autograd.grad(loss.square().sum(), (hidden, weight))))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", FORMS)
def test_ignored_positions_have_neither_loss_nor_gradient(implementation: str) -> None:
    hidden, weight, targets = draws()
    targets[0] = -1
    loss = linear_cross_entropy(hidden, weight, targets, z_loss=0.1, implementation=implementation)
    (grad,) = torch.autograd.grad(loss.sum(), hidden)
    assert loss[0].eq(0).all() and grad[0].eq(0).all()
    assert loss[1][targets[1] >= 0].gt(0).all()


@pytest.mark.parametrize("implementation", FORMS)
def test_impossible_classes(implementation: str) -> None:
    """A bias of minus infinity forbids a class: also a whole tile of them, and the first."""
    hidden, weight, _ = draws(700)
    bias = torch.zeros(700, device=DEVICE)
    bias[:520] = -math.inf
    targets = torch.randint(520, 700, (2, 9), device=DEVICE)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, implementation=implementation)
    wanted = linear_cross_entropy(hidden, weight[520:], targets - 520, implementation="reference")
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(loss.sum(), weight)
    assert grad[:520].eq(0).all() and grad.isfinite().all()


@needs_triton
def test_a_class_that_does_not_exist_does_not_train_in_silence() -> None:
    hidden, weight, targets = draws(40)
    targets[1, 3] = 40
    if DEVICE == "cpu":  # where looking costs nothing
        with pytest.raises(ValueError, match="needs targets below 40 classes, found 40"):
            linear_cross_entropy(hidden, weight, targets, implementation="triton")
        return
    loss = linear_cross_entropy(hidden, weight, targets, implementation="triton")
    assert loss.isnan().sum() == 1 and loss[1, 3].isnan()


@pytest.mark.parametrize("implementation", FORMS)
def test_large_logits_and_empty_rows(implementation: str) -> None:
    hidden, weight, targets = draws()
    loss = linear_cross_entropy(hidden * 1e4, weight, targets, implementation=implementation)
    assert loss.isfinite().all()
    none = linear_cross_entropy(hidden[:, :0], weight, targets[:, :0], implementation=implementation)
    assert none.shape == (2, 0)
    (grad,) = torch.autograd.grad(none.sum(), weight)
    assert grad.eq(0).all()


def compile_whole() -> None:
    hidden, weight, targets = draws()
    for name in ["chunked"] + ["triton"] * (triton_runs_on(DEVICE) is None):

        def step(hidden: Tensor, weight: Tensor, name: str = name) -> Tensor:
            return linear_cross_entropy(hidden, weight, targets, implementation=name).sum()

        wanted = torch.autograd.grad(step(hidden, weight), (hidden, weight))
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for a, b in zip(torch.autograd.grad(compiled(hidden, weight), (hidden, weight)), wanted, strict=True):
            torch.testing.assert_close(a, b)
        print(f"compiled {name}")


def test_compiles_whole() -> None:
    """In a process without the checks of shapes, which compilers cannot trace."""
    code = f"import runpy; runpy.run_path({str(Path(__file__))!r})['compile_whole']()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "compiled chunked" in done.stdout
    assert "compiled triton" in done.stdout or triton_runs_on(DEVICE)


def test_gradcheck_in_float64() -> None:
    hidden, weight, targets = draws(7)
    inputs = (hidden.double(), weight.double(), torch.randn(7, dtype=torch.float64, device=DEVICE, requires_grad=True))

    def op(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, targets, bias=b, z_loss=0.1, chunk=4)

    assert torch.autograd.gradcheck(op, inputs)


def test_what_cannot_serve_is_said() -> None:
    hidden, weight, targets = draws()
    with pytest.raises(ValueError, match=r"cannot run in Triton: .* do not compute in torch.float64"):
        linear_cross_entropy(hidden.double(), weight.double(), targets, implementation="triton")


@needs_triton
def test_runs_chunked_where_no_configuration_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "settle", lambda *_: None)
    hidden, weight, targets = draws()
    assert "no configuration" in str(module._config(hidden, 40)[1])
    assert linear_cross_entropy(hidden, weight, targets).isfinite().all()


@pytest.mark.gpu
def test_bitwise_repeatable_and_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    hidden = torch.randn(1, 40000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(64000, 64, device="cuda", requires_grad=True)  # 2.56e9 logits
    targets = torch.randint(0, 64000, (1, 40000), device="cuda")
    runs = []
    for _ in range(2):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=40000, implementation="triton")
        runs.append((loss, *torch.autograd.grad(loss.mean(), (hidden, weight))))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    tail = linear_cross_entropy(hidden[:, -50:], weight, targets[:, -50:], implementation="chunked")
    torch.testing.assert_close(runs[0][0][:, -50:], tail, rtol=1e-2, atol=1e-2)
