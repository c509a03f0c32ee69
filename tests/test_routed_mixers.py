"""Mixers with routers: MoM and SSE against their definitions, MoH against Attention, and the loss for even loads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from seqlong.block import Block
from seqlong.cost import mixer_cost
from seqlong.ffn import MoE
from seqlong.layout import SequenceLayout
from seqlong.mixers import GLA, RGLRU, SSE, Attention, GatedDeltaNet, Mixer, MoH, MoM
from seqlong.mixers.visits import unevenness
from seqlong.norms import RMSNorm

WIDTH = 16
ROUTED: dict[str, Callable[[int], Mixer]] = {
    "mom": partial(MoM, mixer=partial(GatedDeltaNet, heads=2, head_dim=4), memories=3, balance_loss=0.5),
    "sse": partial(SSE, heads=2, parts=3, active=2, balance_loss=0.5),
    "moh": partial(MoH, heads=4, shared=1, active=2, balance_loss=0.5),
}


def shaken(mixer: Mixer) -> Mixer:
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer.double()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("inner", [partial(GatedDeltaNet, heads=2, head_dim=4), partial(GLA, heads=2)])
def test_mom_is_its_mixer_over_the_tokens_of_each_memory(inner: Callable[[int], Mixer], shared: bool) -> None:
    torch.manual_seed(0)
    mixer = shaken(MoM(WIDTH, inner, memories=4, active=2, shared_memory=shared))
    assert isinstance(mixer, MoM)
    hidden = torch.randn(1, 70, WIDTH, dtype=torch.float64)
    routing = mixer.router(hidden[0])
    assert routing.experts.flatten().bincount(minlength=4).min() > 10, "a memory is hardly used"
    expected = mixer.mixer(hidden, SequenceLayout.build(1, 70))[0][0] if shared else torch.zeros(70, WIDTH).double()
    for memory in range(4):
        token, slot = (routing.experts == memory).nonzero().unbind(1)
        alone = mixer.mixer(hidden[:, token], SequenceLayout.build(1, len(token)))[0][0]
        expected = expected.index_add(0, token, routing.weights[token, slot, None] * alone)
    torch.testing.assert_close(mixer(hidden, SequenceLayout.build(1, 70))[0][0], expected)


def test_mom_keeps_no_state_of_a_segment_that_a_memory_did_not_see_end() -> None:
    """A memory may sleep through a whole segment, and wake in a window of the next."""
    torch.manual_seed(0)
    mixer = shaken(MoM(WIDTH, partial(GLA, heads=2), memories=4, active=1, shared_memory=False))
    hidden = torch.randn(3, 30, WIDTH, dtype=torch.float64)
    layout = SequenceLayout.build(3, 30, torch.tensor([[1] * 10 + [2] * 2 + [3] * 18]).int().expand(3, 30))
    whole, state = mixer(hidden, layout)[0], mixer.initial_state(3, "cpu", torch.float64)
    parts = []
    for a, z in ((0, 11), (11, 14), (14, 15), (15, 30)):
        part, state = mixer(hidden[:, a:z], layout.slice(a, z), state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_sse_is_its_recurrence() -> None:
    torch.manual_seed(0)
    mixer = shaken(SSE(WIDTH, heads=1, parts=3, active=2))
    assert isinstance(mixer, SSE)
    hidden = torch.randn(1, 40, WIDTH, dtype=torch.float64)
    x = hidden[0]
    q, k, v = mixer.qkv_proj(x).split([16, 16, 16], dim=-1)
    (turn_q, turn_k), (decay, decay_of_parts) = mixer.turn_proj, mixer.decay_proj
    e = mixer.part_proj(x).softmax(dim=-1)
    state = torch.zeros(4, 16, 16, dtype=torch.float64)  # that of all tokens last
    for t in range(40):
        chosen = e[t].topk(2).indices.tolist()
        value, read = nn.functional.silu(v[t]), torch.zeros(16, dtype=torch.float64)
        for part, weight in [*((i, e[t, i]) for i in chosen), (3, torch.tensor(1.0))]:
            key, query, gate = (
                (k[t], q[t], decay(x)[t]) if part == 3
                else (k[t] + turn_k(x)[t], q[t] + turn_q(x)[t], decay_of_parts(x)[t])
            )  # fmt: skip
            fade = (nn.functional.logsigmoid(gate) / 16).exp()
            state[part] = fade[:, None] * state[part] + weight * torch.outer(key.softmax(0), value)
            read = read + weight / 4 * nn.functional.silu(query) @ state[part]
        normed = mixer.norm(read) * nn.functional.silu(mixer.gate_proj(x)[t])
        torch.testing.assert_close(mixer(hidden, SequenceLayout.build(1, 40))[0][0, t], mixer.out_proj(normed))


def test_moh_with_even_scores_and_all_heads_in_use_is_attention() -> None:
    torch.manual_seed(0)
    plain, routed = Attention(WIDTH, heads=4), MoH(WIDTH, heads=4, shared=2, active=2)
    for name, parameter in routed.named_parameters():
        nn.init.zeros_(parameter) if "router" in name or "kind" in name or "shared" in name else None
    routed.load_state_dict(plain.state_dict(), strict=False)
    hidden, layout = torch.randn(2, 9, WIDTH), SequenceLayout.build(2, 9)
    torch.testing.assert_close(routed(hidden, layout)[0], plain(hidden, layout)[0])


@pytest.mark.parametrize(("shared", "active"), [(0, 3), (1, 2), (2, 1)])
def test_moh_uses_shared_heads_and_the_best_of_the_others(shared: int, active: int) -> None:
    torch.manual_seed(0)
    mixer = MoH(WIDTH, heads=6, head_dim=4, shared=shared, active=active)
    hidden = torch.randn(2, 50, WIDTH)
    weights = mixer._weigh(torch.ones(2, 50, 6, 1), hidden)[..., 0]
    assert ((weights > 0).sum(dim=-1) == shared + active).all() and (weights[..., :shared] > 0).all()
    scores = mixer.router.scored(hidden.flatten(0, 1))[0].view(2, 50, -1)
    assert ((weights[..., shared:] > 0) == (scores >= scores.topk(active).values[..., -1:])).all()
    used = weights[..., shared:].sum(dim=-1) / active + (weights[..., :shared].sum(dim=-1) / shared if shared else 1)
    torch.testing.assert_close(used, torch.full((2, 50), 2.0))


@pytest.mark.parametrize("name", ROUTED)
def test_the_loss_reaches_training_in_every_kind_of_checkpointing(name: str) -> None:
    torch.manual_seed(0)
    block = Block(WIDTH, ROUTED[name](WIDTH), MoE(WIDTH, 4, 2, d_hidden=8, balance_loss=0.25), RMSNorm).double()
    hidden = torch.randn(2, 23, WIDTH, dtype=torch.float64)
    layout = SequenceLayout.build(2, 23, torch.tensor([[1] * 9 + [2] * 14, [1] * 20 + [0] * 3]).int())
    block.eval()
    assert block(hidden, layout)[2] == {}
    block.train()
    normed = block.mixer_norm(hidden)
    assert isinstance(block.mixer, Mixer) and isinstance(block.ffn, MoE) and block.ffn_norm is not None
    own = block.mixer.router_loss_sum(normed, layout)
    assert 0.5 * 0.5 * 43 < own < 0.5 * 3 * 43
    fed = block.ffn(block.ffn_norm(block.mix(hidden, layout)[0]), layout)[1]["router_loss_sum"]
    wanted = list(block.parameters())
    for mode in ("none", "selective", "block"):
        loss = block(hidden, layout, checkpointing=mode)[2]["router_loss_sum"]
        torch.testing.assert_close(loss, own + fed)
        found = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
        expected = torch.autograd.grad(own + fed, wanted, allow_unused=True, retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(*(torch.zeros(()) if x is None else x for x in (one, other)))
    loss = block(hidden, layout, checkpointing="tiled", tile=8)[2]["router_loss_sum"]  # shares of a tile, then
    assert 0.5 * own < loss < 2 * (own + fed)


def test_what_is_even_costs_one_a_token() -> None:
    layout = SequenceLayout.build(2, 6, torch.tensor([[1] * 6, [1] * 4 + [0] * 2]).int())
    scores = torch.full((2, 6, 2), 0.5)
    chosen = torch.tensor([[True, False], [False, True]]).repeat(3, 1).expand(2, 6, 2)
    assert unevenness(scores, chosen, layout) == 10
    sure = torch.tensor([1.0, 0.0]).expand(2, 6, 2)
    assert unevenness(sure, sure > 0, layout) == 20


@pytest.mark.parametrize("name", ROUTED)
def test_costs_are_what_torch_counts(name: str) -> None:
    mixer = ROUTED[name](WIDTH)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(torch.randn(1, 24, WIDTH), SequenceLayout.build(1, 24))
    counted = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm"))
    cost = mixer_cost(mixer, 24)
    assert linear == 24 * sum(x.flops for x in cost.terms if x.what in ("products", "router", "experts"))
    state = mixer.initial_state(1, "cpu", torch.float32)
    if name != "moh":
        assert cost.state is not None
        held = sum(x.numel() * (4 if key == "memory" else 2) for key, x in vars(state).items() if x is not None)
        assert cost.state == held, "activations in bfloat16"


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="active from 1 to memories"):
        MoM(WIDTH, partial(GLA, heads=2), memories=2, active=3)
    with pytest.raises(ValueError, match="needs a linear mixer such as GatedDeltaNet or GLA, found RGLRU"):
        MoM(WIDTH, partial(RGLRU, heads=2))
    with pytest.raises(ValueError, match="active from 1 to parts"):
        SSE(WIDTH, parts=2, active=0)
    with pytest.raises(ValueError, match="active from 1 to heads - shared"):
        MoH(WIDTH, heads=4, shared=3, active=2)
