"""selective_scan against its reference: real and complex, of the token and constant, over blocks and segments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqlong.kernels.selective_scan import chunked, selective_scan


def inputs(length: int, complex_: bool, constant: bool, rows: int = 2, n: int = 3, d: int = 5) -> list[Tensor]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    def turned(x: Tensor) -> Tensor:
        return torch.complex(x, drawn(*x.shape)) if complex_ else x

    torch.manual_seed(length)
    b, c = ((turned(drawn(n, d)) if constant else drawn(rows, length, n)) for _ in range(2))
    made = [drawn(rows, length, d), drawn(rows, length, d).abs(), turned(-drawn(n, d).abs()), b, c]
    return [x.requires_grad_() for x in (*made, turned(drawn(rows, n, d)))]


def everything(given: list[Tensor], starts: Tensor | None, implementation: str) -> list[Tensor]:
    *rest, state = given
    y, final = selective_scan(*rest, starts=starts, initial_state=state, implementation=implementation)
    torch.manual_seed(0)
    loss = (y * torch.randn_like(y)).sum() + (final * torch.randn_like(final).conj()).sum().real
    return [y, final, *torch.autograd.grad(loss, given)]


@pytest.mark.parametrize("sizes", [(32, 16, 256), (4, 1, 2)], ids=["as it is", "many small blocks"])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("length", [1, 5, 33, 131])
def test_chunks_are_the_loop(
    length: int, complex_: bool, constant: bool, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(("CHUNK", "FEWEST", "MOST"), sizes, strict=True):
        monkeypatch.setattr(chunked, name, value)
    given = inputs(length, complex_, constant)
    for starts in (None, torch.rand(2, length) < 0.1):
        for found, expected in zip(*(everything(given, starts, x) for x in ("chunked", "reference")), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_steps_of_nothing_and_of_too_much() -> None:
    """A step of 0 is no token; one of 1e4 forgets all, and its gradients are finite."""
    torch.manual_seed(0)
    x, dt = torch.randn(1, 90, 5), torch.rand(1, 90, 5)
    a, b, c, state = -1 - torch.rand(3, 5), torch.randn(1, 90, 3), torch.randn(1, 90, 3), torch.randn(1, 3, 5)
    dt[:, 40:] = 0
    after = selective_scan(x[:, :40], dt[:, :40], a, b[:, :40], c[:, :40], initial_state=state)[1]
    torch.testing.assert_close(selective_scan(x, dt, a, b, c, initial_state=state)[1], after)
    dt[:, 45] = 1e4
    given = [y.requires_grad_() for y in (x, dt, a, b, c, state)]
    y, final = selective_scan(*given[:-1], initial_state=state)
    torch.testing.assert_close(final, b[:, 45, :, None] * (dt * x)[:, 45, None])
    grads = torch.autograd.grad(y[:, 45:].sum() + final.sum(), given)
    assert all(grad.isfinite().all() for grad in grads) and not grads[-1].any() and not grads[0][:, :45].any()


def test_what_is_kept_for_the_backward_pass_is_small() -> None:
    """Inputs and a state a block: a fraction of one (b t d), where all states would be n of them."""
    x, dt = torch.randn(1, 4096, 64, requires_grad=True), torch.rand(1, 4096, 64)
    b, c = torch.randn(2, 1, 4096, 16).unbind()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y.numel()) or y, lambda y: y):
        selective_scan(x, dt, -torch.rand(16, 64), b, c)
    assert 2 * x.numel() < sum(kept) < 2.7 * x.numel()


def test_mistakes_are_told() -> None:
    x, dt, a, b, c, _ = inputs(7, False, False)
    function = getattr(selective_scan, "__wrapped__", selective_scan)  # jaxtyping, on in tests, would speak first
    with pytest.raises(ValueError, match=r"needs dt like x, a of \(n, 5\), b and c of \(2, 7, 3\) or \(3, 5\)"):
        function(x, dt, a, b[:, :6], c)
    with pytest.raises(ValueError, match=r"needs a state of \(2, 3, 5\), found \(2, 5, 3\)"):
        function(x, dt, a, b, c, initial_state=torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=r"needs starts of shape \(2, 7\)"):
        function(x, dt, a, b, c, starts=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs starts of type bool"):
        function(x, dt, a, b, c, starts=torch.zeros(2, 7, dtype=torch.int64))
