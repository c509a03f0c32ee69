"""Single linear mixers against their equations written out; what all of them keep to is in ``test_mixers.py``."""

from __future__ import annotations

import pytest
import torch
from mixer_cases import WIDTH, close, make, packed, plain, rows

from seqlong.layout import SequenceLayout
from seqlong.mixers import (
    GLA,
    MLSTM,
    RGLRU,
    Based,
    Bidirectional,
    GatedDeltaNet,
    Hedgehog,
    LightningAttention,
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


@pytest.mark.parametrize("both", [False, True])
def test_rglru_does_not_ask_positions_where_a_segment_begins(both: bool) -> None:
    mixer = make("rglru")
    if both:
        mixer = Bidirectional(WIDTH, mixer=lambda _: make("rglru"), tied=True).double()
    hidden = rows(12)
    frames = torch.stack([torch.arange(12) // 4, torch.arange(12) % 4 // 2, torch.arange(12) % 2], dim=-1)
    for positions in (frames.expand(len(hidden), 12, 3), frames[:, 0].expand(len(hidden), 12) + 7):
        close(mixer(hidden, SequenceLayout(None, positions))[0], mixer(hidden, plain(12))[0])


def test_retnet_turns_by_the_first_axis() -> None:
    mixer, hidden, time = make("retnet"), rows(12), torch.arange(12) // 4
    grid = torch.stack([time, torch.arange(12) % 4, torch.arange(12) % 2], dim=-1)
    found, expected = (mixer(hidden, SequenceLayout(None, x.expand(len(hidden), *x.shape)))[0] for x in (grid, time))
    close(found, expected)


def test_a_refined_decay_is_the_published_one_and_can_be_undone() -> None:
    mixer, hidden = make("gla_refined"), rows(9)
    assert isinstance(mixer, GLA) and mixer.refine_proj is not None
    q, k, v = (x.unflatten(2, (2, -1)) for x in mixer.qkv_proj(hidden).split(list(mixer.widths), dim=-1))
    f = torch.sigmoid(mixer.decay_proj(hidden)) ** (1 / 2.0)
    r = torch.sigmoid(mixer.refine_proj(hidden))
    decay = ((1 - r) * f**2 + r * (1 - (1 - f) ** 2)).unflatten(2, (2, -1))
    state, read = torch.zeros(2, 2, 4, 8, dtype=torch.float64), []
    for t in range(9):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        read.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / 4**0.5)
    close(mixer(hidden, plain(9))[0], mixer.out_proj(mixer.finish(torch.stack(read, dim=1), hidden).flatten(2)))
    for parameter in mixer.refine_proj.parameters():
        parameter.data.zero_()  # r is a half
    other = GLA(WIDTH, heads=2, divisor=2.0).double()
    other.load_state_dict({name: value for name, value in mixer.state_dict().items() if "refine" not in name})
    close(mixer(hidden, plain(9))[0], other(hidden, plain(9))[0])


def test_lightning_attention_turns_in_the_first_block_only() -> None:
    first, later, never = (LightningAttention(WIDTH, heads=2, lrpe=lrpe).double() for lrpe in (True, True, False))
    for layer, mixer in ((0, first), (1, later), (1, never)):
        mixer.place(layer, 3)
        mixer.load_state_dict(first.state_dict())
    hidden, layout = rows(11), plain(11).slice(0, 11)
    assert torch.equal(later(hidden, layout)[0], never(hidden, layout)[0])
    assert [x.initial_state(1, "cpu", torch.float32).memory.shape[2] for x in (first, later)] == [16, 8]
    q, k, v = (torch.nn.functional.silu(x).unflatten(2, (2, 8)) for x in first.qkv_proj(hidden).chunk(3, dim=-1))
    distance = torch.arange(11).double()[:, None] - torch.arange(11)
    falls = (distance[..., None] * 10000 ** (-torch.arange(8).double() / 4)).cos()  # Σ_i q_i k_i cos((t - s) θ_i)
    weights = torch.einsum("bthk,bshk,tsk->bhts", q, k, falls) * (distance * first.decay.numbers[:, None, None]).exp()
    read = torch.einsum("bhts,bshv->bthv", weights.tril(), v)
    close(first(hidden, layout)[0], first.out_proj(first.finish(read, hidden).flatten(2)))
