"""Values that parameters start with, against those of the published code, written out channel by channel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from seqlong.layout import SequenceLayout
from seqlong.mixers import MLSTM, RGLRU, RWKV6, RWKV7, SwitchHead


@pytest.mark.parametrize(("layer", "layers"), [(0, 12), (5, 12), (11, 12)])
def test_rwkv6(layer: int, layers: int) -> None:
    mixer = RWKV6(32, heads=4)
    mixer.place(layer, layers)
    up, down = layer / (layers - 1), 1 - layer / layers
    for n in (0, 1, 13, 31):
        slow, fast = 1 - (n / 32) ** down, 1 - (n / 32) ** (0.5 * down)
        mixes = [slow, slow, slow - 0.3 * up, fast, fast]
        assert mixer.mix_base[n].item() == pytest.approx(slow, abs=1e-6)
        assert mixer.mix[:, n].tolist() == pytest.approx(mixes, abs=1e-6)
        assert mixer.decay[n].item() == pytest.approx(-6 + 5 * (n / 31) ** (0.7 + 1.3 * up), abs=1e-5)
        bonus = up * (1 - n / 31) + ((n + 1) % 3 - 1) * 0.1
        assert mixer.bonus.flatten()[n].item() == pytest.approx(bonus, abs=1e-6)
    assert mixer.norm_eps == 64e-5 and not mixer.mix_down.any() and not mixer.decay_down.any()
    assert 0.009 < mixer.mix_up.abs().max() <= 0.01 and 0.009 < mixer.decay_up.abs().max() <= 0.01
    assert (mixer.norm_weight - ((1 + layer) / layers) ** 0.7).abs().max() < 1e-6


@pytest.mark.parametrize(("layer", "layers"), [(0, 12), (5, 12), (11, 12)])
def test_rwkv7(layer: int, layers: int) -> None:
    mixer = RWKV7(32, heads=4)
    mixer.place(layer, layers)
    up, down = layer / (layers - 1), 1 - layer / layers
    assert mixer.decay.bias is not None and mixer.erase.bias is not None
    for n in (0, 1, 13, 31):
        mixes = [1 - (n / 32) ** (power * down) for power in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)]
        assert mixer.mix[:, n].tolist() == pytest.approx(mixes, abs=1e-6)
        linear, inside = n / 31 - 0.5, (n % 8 - 3.5) / 3.5
        zigzag = inside * abs(inside)
        decay = -6 + 6 * (n / 31) ** (1 + up**0.3) + 0.5 + 2.5 * zigzag
        assert mixer.decay.bias[n].item() == pytest.approx(decay, abs=1e-5)
        assert mixer.erase.bias[n].item() == pytest.approx(-0.19 + 0.3 * zigzag + 0.4 * linear, abs=1e-6)
        assert mixer.key_erased[n].item() == pytest.approx(0.71 - 0.1 * linear, abs=1e-6)
    assert (mixer.key_written == 1.02).all() and (mixer.bonus == -0.04).all()
    assert not mixer.decay.down.any() and not mixer.gate.down.any() and mixer.gate.bias is None
    assert mixer.k_proj.weight.abs().max() < 0.05 / math.sqrt(32) < mixer.r_proj.weight.abs().max()
    assert mixer.r_proj.weight.abs().max() < 0.5 / math.sqrt(32)
    assert (mixer.norm_weight - ((1 + layer) / layers) ** 0.7).abs().max() < 1e-6


def test_rwkv7_ranks() -> None:
    """The suggestions of the published code for widths of 768 and 4096."""
    ranks = []
    for width in (768, 4096):
        with torch.device("meta"):
            mixer = RWKV7(width, heads=width // 64)
        ranks.append([x.down.shape[1] for x in (mixer.decay, mixer.erase, mixer.gate)])
    assert ranks == [[64, 64, 128], [160, 160, 320]]


def test_rglru() -> None:
    torch.manual_seed(0)
    mixer = RGLRU(256, width=4096, heads=8)
    kept = (-16 * F.softplus(mixer.rate)).exp()  # a² at a gate of 1
    assert 0.9**2 <= kept.min() < 0.813 and 0.9965 < kept.max() <= 0.999**2 + 1e-6
    assert abs(kept.mean() - (0.9**2 + 0.999**2) / 2) < 0.003, "uniform"
    assert mixer.gates_weight.std().item() == pytest.approx(512**-0.5, rel=0.01)
    assert mixer.in_proj.weight.std().item() == pytest.approx(1 / 16, rel=0.01)
    assert mixer.out_proj.weight.std().item() == pytest.approx(1 / 64, rel=0.01)
    assert mixer.conv1d.weight.std().item() == pytest.approx(0.05, rel=0.03)
    for bias in (mixer.in_proj.bias, mixer.gate_proj.bias, mixer.out_proj.bias, mixer.conv1d.bias, mixer.gates_bias):
        assert bias is not None and not bias.any()


def test_mlstm() -> None:
    mixer = MLSTM(32, heads=4)
    assert mixer.gates_proj.bias.tolist() == [3, 4, 5, 6, -10, -10, -10, -10] and not mixer.gates_proj.weight.any()


def test_the_stabiliser_of_mlstm_starts_afresh_with_a_segment() -> None:
    """A large input gate in one segment would keep m large, and all that the next one writes near zero, in the next."""
    torch.manual_seed(0)
    mixer = MLSTM(16, heads=2, input_bias=0.0)
    with torch.no_grad():
        mixer.gates_proj.weight[2:].normal_(std=3)  # input gates
    hidden = torch.randn(1, 24, 16)
    hidden[:, 6] *= 100
    layout = SequenceLayout.build(1, 24, torch.tensor([[1] * 9 + [2] * 15]).int())
    found, state = mixer(hidden, layout, mixer.initial_state(1, "cpu", torch.float32))
    alone, expected = mixer(hidden[:, 9:], SequenceLayout.build(1, 15), mixer.initial_state(1, "cpu", torch.float32))
    assert state is not None and expected is not None
    _, first = mixer(hidden[:, :9], SequenceLayout.build(1, 9), mixer.initial_state(1, "cpu", torch.float32))
    assert first is not None and (first.memory[..., -1] > 50 + expected.memory[..., -1]).any(), "m was not large"
    torch.testing.assert_close(found[:, 9:], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.memory[..., -1], expected.memory[..., -1], rtol=1e-4, atol=1e-4)


def test_switch_head() -> None:
    torch.manual_seed(0)
    mixer = SwitchHead(256, heads=2, experts=16, head_dim=100)
    for part in (mixer.qk_proj, mixer.value_experts, mixer.value_router, mixer.out_router):
        assert part.weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert mixer.out_experts.weight.std().item() == pytest.approx(200**-0.5, rel=0.02)
    for router in (mixer.value_router, mixer.out_router):
        torch.testing.assert_close(router.weight.norm(dim=1), torch.ones(32))
