"""Mamba1 against transformers: the mixer, with weights copied, and with the norms that Jamba and Falcon-Mamba add."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from oracle import library

from seqlong.layout import SequenceLayout
from seqlong.mixers import S4D, Mamba1

falcon = library("models.falcon_mamba.modeling_falcon_mamba")
jamba = library("models.jamba.modeling_jamba")
mamba = library("models.mamba.modeling_mamba")

LENGTHS = [3, 77, 300]


def close(ours: Mamba1, theirs: nn.Module, length: int) -> None:
    hidden = torch.randn(2, length, 32)
    with torch.no_grad():
        found = ours(hidden, SequenceLayout.build(2, length))[0]
        torch.testing.assert_close(found, theirs(hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
def test_mamba(length: int) -> None:
    torch.manual_seed(0)
    config = mamba.MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=1, vocab_size=8)
    theirs = mamba.MambaModel(config).eval().layers[0].mixer
    theirs.dt_proj.bias.data.normal_()
    ours = Mamba1(32, d_state=8)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    close(ours, theirs, length)


@pytest.mark.parametrize("length", LENGTHS)
def test_jamba_norms_with_weights(length: int) -> None:
    torch.manual_seed(0)
    config = jamba.JambaConfig(
        hidden_size=32, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=8,
    )  # fmt: skip
    theirs = jamba.JambaMambaMixer(config, 0).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    names = {"dt_layernorm": "dt_norm", "b_layernorm": "b_norm", "c_layernorm": "c_norm"}
    weights = {".".join(names.get(p, p) for p in k.split(".")): v for k, v in theirs.state_dict().items()}
    ours = Mamba1(32, d_state=8, dt_rank=4, inner_norm=True)
    ours.load_state_dict(weights, strict=True)
    close(ours, theirs, length)


@pytest.mark.parametrize("length", LENGTHS)
def test_falcon_mamba_norms_without_weights(length: int) -> None:
    torch.manual_seed(0)
    config = falcon.FalconMambaConfig(hidden_size=32, state_size=8, num_hidden_layers=1, vocab_size=8)
    theirs = falcon.FalconMambaModel(config).eval().layers[0].mixer
    theirs.dt_proj.bias.data.normal_()
    ours = Mamba1(32, d_state=8, inner_norm=True, norm_eps=config.mixer_rms_eps)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert unexpected == [] and missing == ["dt_norm.weight", "b_norm.weight", "c_norm.weight"]  # ones, as they come
    close(ours, theirs, length)


def test_s4d_is_a_convolution_with_the_kernel_of_its_source() -> None:
    """Powers of the discrete rates times C, over the whole row at once, by a Fourier transform."""
    torch.manual_seed(0)
    ours, x = S4D(6, d_state=8).double(), torch.randn(2, 50, 6, dtype=torch.float64)
    rate = torch.complex(-ours.A_log.exp(), ours.A_imag)  # (d n)
    turned = rate * ours.log_dt.exp()[:, None]
    weight = torch.complex(*ours.C) * (turned.exp() - 1) / rate
    kernel = 2 * (weight[..., None] * (turned[..., None] * torch.arange(50)).exp()).sum(dim=1).real  # (d t)
    turned_x, turned_kernel = torch.fft.rfft(x, 100, dim=1), torch.fft.rfft(kernel, 100).T
    y = torch.fft.irfft(turned_x * turned_kernel, 100, dim=1)[:, :50] + ours.D * x
    value, gate = ours.out_proj(nn.functional.gelu(y)).chunk(2, dim=-1)
    torch.testing.assert_close(ours(x, SequenceLayout.build(2, 50))[0], value * gate.sigmoid())


def test_first_values() -> None:
    torch.manual_seed(0)
    mixer = Mamba1(512, d_state=4)
    torch.testing.assert_close(mixer.A_log.exp(), torch.tensor([1.0, 2, 3, 4]).expand(1024, 4))
    steps = nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.001 <= steps.min() < 0.0012 and 0.085 < steps.max() <= 0.1001
    assert abs(steps.log().mean() - math.log(0.01)) < 0.15, "log-uniform"
    assert mixer.dt_proj.weight.abs().max() <= 32**-0.5
