"""What only a GPU shows of vector decay, the delta rule and dplr: errors, repeatability, a million tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqlong.kernels import probes, runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]

#: op, case of its probe, widths.
KINDS = [
    ("vector_decay", "plain", {"h": 2, "k": 64, "v": 64}),
    ("vector_decay", "packed", {"h": 2, "k": 128, "v": 128}),
    ("delta_rule", "packed", {"g": 2, "h": 2, "k": 128, "v": 128}),
    ("delta_rule", "no_gate", {"g": 1, "h": 2, "k": 64, "v": 64}),
    ("delta_rule", "channels", {"g": 2, "h": 2, "k": 128, "v": 128}),
    ("dplr", "packed", {"h": 2, "k": 64, "v": 64}),
]


@pytest.fixture(autouse=True)
def triton_runs() -> None:
    reason = runtime.triton_runs_on("cuda")
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(("op", "case", "sizes"), KINDS, ids=lambda x: x if isinstance(x, str) else "")
def test_errors_are_those_of_bfloat16_and_two_runs_are_equal(op: str, case: str, sizes: dict[str, int]) -> None:
    probe, kind = probes.PROBES[op], torch.bfloat16
    settings = {"case": case, "length": 1337, "sizes": sizes, "truth": probe.yardstick}
    found = probes.error(probe, "triton", "cuda", kind, **settings)  # type: ignore[arg-type]
    plain = probes.error(probe, probe.yardstick, "cuda", kind, **settings)  # type: ignore[arg-type]
    assert probes.wrong(found, plain, kind) is None, (found, plain)
    given = probes.inputs(probe, "cuda", kind, case=case, length=1337, sizes=sizes)
    first, second = (probes.run(probe, given, "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(("op", "case", "sizes"), KINDS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_million_tokens_whole_are_a_million_in_two_parts(op: str, case: str, sizes: dict[str, int]) -> None:
    length, cut = 2**20 + 3, 600_001
    probe = probes.PROBES[op]
    given = probes.inputs(probe, "cuda", torch.bfloat16, case=case, length=length, sizes=sizes)

    def part(begin: int, end: int, state: Tensor | None) -> dict[str, Tensor]:
        def of(x: Any) -> Any:
            return x[:, begin:end] if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == length else x

        learned = {name: of(x.detach()) for name, x in given.learned.items() if name != "initial_state"}
        start = {} if state is None else {"initial_state": state}
        fixed = {name: of(x) for name, x in given.fixed.items()}
        return probes.call(probe, probes.Inputs({**learned, **start}, fixed), "triton")  # type: ignore[arg-type]

    before = given.learned.get("initial_state")
    with torch.no_grad():
        whole = part(0, length, None if before is None else before.detach())
        first = part(0, cut, None if before is None else before.detach())
        second = part(cut, length, first["final"])
    for found, wanted in (
        (first["o"], whole["o"][:, :cut]),
        (second["o"], whole["o"][:, cut:]),
        (second["final"], whole["final"]),
    ):
        assert ((found - wanted).float().norm() / wanted.float().norm()).item() < 1e-2
    gradients = probes.run(probe, given, "triton")
    for name, value in gradients.items():
        assert value.isfinite().all(), name
