"""On a CUDA device: the torch paths of every op and mixer against the float64 definitions, in float32 and bfloat16."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.kernels.attention import attention
from seqlong.kernels.scalar_decay import scalar_decay
from seqlong.mixers import Attention, Mamba2
from seqlong.tasks import CausalLM

pytestmark = pytest.mark.gpu


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 3e-3), (torch.bfloat16, 2e-2)])
def test_scalar_decay(dtype: torch.dtype, limit: float) -> None:
    q, k = torch.randn(2, 2, 777, 2, 32, device="cuda").unbind()
    v, g = torch.randn(2, 777, 4, 48, device="cuda"), -torch.rand(2, 777, 4, device="cuda")
    starts, weigh = torch.rand(2, 777, device="cuda") < 0.01, torch.randn(2, 777, 4, 48, device="cuda")
    results = []
    for implementation, kind in (("reference", torch.float64), ("chunked", dtype)):
        inputs = [x.to(dtype).to(kind).requires_grad_() for x in (q, k, v)]
        inputs.append(g.to(torch.promote_types(kind, torch.float32)).requires_grad_())
        output, final = scalar_decay(*inputs, starts=starts, implementation=implementation)
        grads = torch.autograd.grad((output * weigh.to(output.dtype)).sum(), inputs)
        results.append([output, final, *grads])
    for expected, found in zip(*results, strict=True):
        assert error(found, expected) < limit


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(packed: bool, window: int | None, causal: bool) -> None:
    q = torch.randn(2, 600, 4, 64, device="cuda")
    k, v = torch.randn(2, 2, 600, 2, 64, device="cuda").unbind()
    ids = torch.ones(2, 600, dtype=torch.int32, device="cuda")
    ids[0, 130:400], ids[0, 400:401], ids[0, 401:590], ids[0, 590:] = 2, 3, 4, 0
    way: dict = {"query_ids": ids, "key_ids": ids} if packed else {}
    spans = {"boundaries": [[(0, 130), (130, 400), (400, 401), (401, 590)], [(0, 600)]]} if packed else {}
    weigh = torch.randn(2, 600, 4, 64, device="cuda") * (ids > 0)[..., None, None]
    results = []
    for implementation in ("reference", None, "blocks"):
        extra = spans if implementation is None else {}
        kind = torch.float64 if implementation == "reference" else torch.bfloat16
        inputs = [x.bfloat16().to(kind).requires_grad_() for x in (q, k, v)]
        out = attention(*inputs, causal=causal, window=window, implementation=implementation, **way, **extra)
        real = out * (ids > 0)[..., None, None] if packed else out
        results.append([real, *torch.autograd.grad((out * weigh.to(kind)).sum(), inputs)])
    for found in results[1:]:
        for expected, value in zip(results[0], found, strict=True):
            assert error(value, expected) < 2e-2


@pytest.mark.parametrize("packed", [False, True])
def test_a_hybrid_on_the_gpu_is_the_hybrid_on_the_cpu(packed: bool) -> None:
    mixers = {"m": partial(Mamba2, d_state=32, head_dim=32), "a": partial(Attention, heads=4, window=100)}
    model = Backbone(BackboneConfig(d_model=128, pattern="mam", mixers=mixers))
    tokens, ids = torch.randint(0, 16, (2, 700)), torch.ones(2, 700, dtype=torch.int32)
    ids[0, 300:], ids[0, 650:] = 2, 0
    batch = SequenceBatch(tokens=tokens, segment_ids=ids if packed else None)
    expected = model(batch).hidden
    real = (ids > 0)[..., None].cuda() if packed else 1
    model.cuda()
    found = model(batch.to("cuda")).hidden
    assert error(found * real, expected.cuda() * real) < 3e-3
    with torch.autocast("cuda", torch.bfloat16):
        found = model(batch.to("cuda")).hidden
    assert error(found * real, expected.cuda() * real) < 3e-2
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_training_step_waits_for_nothing() -> None:
    """Loss and gradients of a batch are recorded in a CUDA graph, which no copy from the host may be part of."""
    mixers = {"m": partial(Mamba2, d_state=16, head_dim=32), "a": partial(Attention, heads=2)}
    task = CausalLM(BackboneConfig(d_model=64, pattern="ma", mixers=mixers)).cuda()
    batch = SequenceBatch(*torch.randint(0, 16, (2, 2, 256), device="cuda").unbind())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            task.objective(batch)[0].backward()
            task.zero_grad()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = task.objective(batch)
        loss.backward()
    graph.replay()
    again = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    expected, _ = task.objective(batch)
    expected.backward()
    assert error(loss, expected) < 1e-3
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None
        assert error(again[name], parameter.grad) < 2e-2, name
