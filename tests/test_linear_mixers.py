"""Single linear mixers against their equations written out; what all of them keep to is in ``test_mixers.py``."""

from __future__ import annotations

import pytest
import torch
from test_mixers import WIDTH, close, make, packed, plain, rows

from seqlong.mixers import (
    MLSTM,
    RGLRU,
    Based,
    GatedDeltaNet,
    Hedgehog,
    LogLinearGatedDeltaNet,
    LogLinearMamba2,
    Mamba2,
    Mixer,
)


@pytest.mark.parametrize("name", ["log_linear_mamba2", "log_linear_gated_deltanet"])
def test_levels_of_weight_one_are_the_mixer_without_levels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = make(name)
    assert isinstance(mixer, LogLinearMamba2 | LogLinearGatedDeltaNet)
    if isinstance(mixer, LogLinearMamba2):
        other: Mixer = Mamba2(WIDTH, d_state=6, head_dim=8, groups=2).double()
    else:
        other = GatedDeltaNet(WIDTH, heads=2, head_dim=6, groups=1).double()
    other.load_state_dict({name: value for name, value in mixer.state_dict().items() if "levels." not in name})
    layout, hidden = packed()[0], rows(23, 3)
    real = (layout.segment_ids > 0)[..., None]
    assert not torch.allclose(mixer(hidden, layout)[0], other(hidden, layout)[0])
    shape = mixer.levels.scale.shape
    monkeypatch.setattr(mixer.levels, "forward", lambda x: torch.ones(*x.shape[:2], *shape, dtype=x.dtype))
    close(mixer(hidden, layout)[0].where(real, 0), other(hidden, layout)[0].where(real, 0))


def test_normalised_linear_attention_is_a_weighted_mean() -> None:
    """By all pairs: BASED's weights are exp's Taylor series, Hedgehog's are sums of products of softmaxes."""
    for name in ("based", "hedgehog"):
        mixer, hidden = make(name), rows(11)
        assert isinstance(mixer, Based | Hedgehog)
        q, k, v = mixer.qkv_proj(hidden).split(list(mixer.widths), dim=-1)
        q, k, v = (x.unflatten(2, (2, -1)).transpose(1, 2) for x in (q, k, v))
        if isinstance(mixer, Based):
            scores = q @ k.mT / 4**0.5
            weights = 1 + scores + scores.square() / 2
        else:
            maps = zip((q, k), (mixer.query_map, mixer.key_map), strict=True)
            fq, fk = (torch.cat([x @ w.mT, -x @ w.mT], dim=-1).softmax(-1) for x, w in maps)
            weights = fq @ fk.mT
        weights = weights.tril()
        expected = (weights / weights.sum(-1, keepdim=True)) @ v
        close(mixer(hidden, plain(11))[0], mixer.out_proj(expected.transpose(1, 2).flatten(2)))


def test_exponential_gates_are_as_without_a_stabiliser_and_do_not_overflow() -> None:
    mixer, hidden = make("mlstm"), rows(19)
    assert isinstance(mixer, MLSTM)
    q, k, v = mixer.qkv_proj(hidden).split(list(mixer.widths), dim=-1)
    q, k, v = (x.unflatten(2, (2, -1)).transpose(1, 2) for x in (q, k, v))
    forget, write = mixer.gates_proj(hidden).transpose(1, 2).chunk(2, dim=1)
    faded = torch.nn.functional.logsigmoid(forget).cumsum(-1)
    weights = (q @ k.mT / 4**0.5 * (faded[..., None] - faded[..., None, :] + write[..., None, :]).exp()).tril()
    divisor = weights.sum(-1, keepdim=True).abs()
    assert divisor.min() < 1 < divisor.max()
    output = mixer.finish((weights @ v / divisor.clamp(min=1)).transpose(1, 2), hidden)
    close(mixer(hidden, plain(19))[0], mixer.out_proj(output.flatten(2)))
    mixer.gates_proj.weight.data *= 1e4
    found = mixer.float()(hidden.float().requires_grad_(), plain(19))[0]
    found.sum().backward()
    gradients = [parameter.grad for parameter in mixer.parameters()]
    assert found.isfinite().all() and all(x is not None and x.isfinite().all() for x in gradients)


def test_rglru_is_its_recurrence_a_token_at_a_time() -> None:
    mixer, hidden = make("rglru"), rows(150)
    assert isinstance(mixer, RGLRU)
    hidden.requires_grad_()
    found = mixer(hidden, plain(150))[0]
    x = mixer.conv1d(torch.nn.functional.pad(mixer.in_proj(hidden).mT, (3, 0))).mT
    blocks = [torch.block_diag(*weight) for weight in mixer.gates_weight]
    recurrent, taken = (torch.sigmoid(x @ w + b) for w, b in zip(blocks, mixer.gates_bias, strict=True))
    decay = torch.exp(-8 * torch.nn.functional.softplus(mixer.rate) * recurrent)
    steps, h = [], taken[:, 0] * x[:, 0]
    for t in range(150):
        h = h if t == 0 else decay[:, t] * h + (1 - decay[:, t] ** 2).sqrt() * taken[:, t] * x[:, t]
        steps.append(h)
    gate = torch.nn.functional.gelu(mixer.gate_proj(hidden), approximate="tanh")
    expected = mixer.out_proj(torch.stack(steps, dim=1) * gate)
    close(found, expected)
    target, wanted = torch.randn_like(found), [hidden, *mixer.parameters()]
    pairs = (torch.autograd.grad((y * target).sum(), wanted, retain_graph=True) for y in (found, expected))
    for mine, theirs in zip(*pairs, strict=True):
        close(mine, theirs, 1e-9)
