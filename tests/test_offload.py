"""What is kept in the host's memory comes back as it was, in time."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from seqlong import backbone as module
from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.mixers import Attention, Mamba2
from seqlong.offload import HostMemory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model(**settings: Any) -> Backbone:
    torch.manual_seed(0)
    mixers: dict[str, Any] = {"m": partial(Mamba2, d_state=16, head_dim=16), "a": partial(Attention, heads=2)}
    config = BackboneConfig(vocab_size=16, d_model=32, pattern="mam", mixers=mixers, tile=16, **settings)
    return Backbone(config).to(DEVICE)


def gradients(net: Backbone) -> tuple[torch.Tensor, ...]:
    tokens = torch.arange(80, device=DEVICE).view(2, 40) * 7 % 16
    return torch.autograd.grad(net(SequenceBatch(tokens=tokens)).hidden.square().sum(), list(net.parameters()))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block", "tiled"])
def test_gradients_are_the_same(checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[HostMemory] = []

    def memory() -> HostMemory:
        used.append(HostMemory(least=0, everywhere=True))
        return used[-1]

    monkeypatch.setattr(module, "HostMemory", memory)
    expected = gradients(model(checkpointing=checkpointing))
    assert not used
    found = gradients(model(checkpointing=checkpointing, offload=True))
    assert all(map(torch.equal, found, expected))
    (host,) = used
    inputs = 2 * 40 * 32 * 4
    moved = sum(kept.host.numel() * kept.host.element_size() for kept in host.kept)
    # Of each block its input; of attention in tiles that of the second half too.
    assert checkpointing not in ("block", "tiled") or moved == (3 + (checkpointing == "tiled")) * inputs
    assert all(kept.host.device.type == "cpu" and kept.back is None for kept in host.kept)


def test_what_is_small_or_a_weight_stays() -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64, device=DEVICE))
    x = torch.ones(8, 64, device=DEVICE, requires_grad=True)
    with HostMemory(least=8 * 64 * 4 + 1, everywhere=True) as host:
        y = (x * 2) @ weight
    assert host.kept == []
    y.sum().backward()
    with HostMemory(least=8 * 64 * 4, everywhere=True) as host:
        y = (x * 2) @ weight
    assert len(host.kept) == 1
    y.sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.full_like(weight, 32.0))


@pytest.mark.gpu
def test_memory_of_the_gpu_is_freed() -> None:
    """Eight blocks keep eight inputs of 64 MiB, or none."""
    torch.manual_seed(0)
    peaks, results = [], []
    for offload in (False, True):
        mixers: dict[str, Any] = {"m": partial(Mamba2, d_state=16, head_dim=64)}
        config = BackboneConfig(
            vocab_size=16, d_model=256, pattern="m" * 8, mixers=mixers, ffn=None, checkpointing="tiled", tile=4096,
            offload=offload,
        )  # fmt: skip
        torch.manual_seed(0)
        net = Backbone(config).cuda()
        tokens = torch.randint(0, 16, (1, 65536), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = net(SequenceBatch(tokens=tokens)).hidden.square().mean()
        results.append(torch.autograd.grad(loss, list(net.parameters())))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    first, *others = zip(*results, strict=True)  # the embedding's gradient: torch adds it up in any order
    torch.testing.assert_close(*first, rtol=1e-4, atol=1e-5 * first[0].abs().max().item())
    assert all(torch.equal(*pair) for pair in others)
    assert peaks[0] - peaks[1] > 4 * 64 * 2**20, peaks
