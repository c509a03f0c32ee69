"""Mixers with routers: MoM, SSE and SwitchHead against their definitions, MoH against Attention; loads and losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.block import Block
from seqlong.cost import mixer_cost
from seqlong.ffn import MoE
from seqlong.ffn.balance import step_of_bias, wanted_shares
from seqlong.layout import SequenceLayout
from seqlong.mixers import (
    GLA,
    RGLRU,
    SSE,
    Attention,
    Bidirectional,
    GatedDeltaNet,
    LogLinearGatedDeltaNet,
    Mixer,
    MoH,
    MoM,
    Parallel,
    Scout,
    SwitchHead,
)
from seqlong.mixers.routing import unevenness
from seqlong.norms import RMSNorm
from seqlong.report.experts import experts_section
from seqlong.report.record import RunRecord, Series
from seqlong.tasks.experts import ExpertLoads

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
    assert block(hidden, layout)[2] == {}, "in evaluation nothing is counted"
    block.train()
    normed = block.mixer_norm(hidden)
    assert isinstance(block.mixer, Mixer) and isinstance(block.ffn, MoE) and block.ffn_norm is not None
    own = block.mixer.router_sums(normed, layout)["router_loss_sum"]
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
def test_loads_are_the_choices_of_tokens_that_are_not_padding(name: str) -> None:
    torch.manual_seed(0)
    mixer = shaken(ROUTED[name](WIDTH))
    ids = torch.tensor([[1] * 9 + [2] * 14, [1] * 20 + [0] * 3, [0] * 23], dtype=torch.int32)
    layout = SequenceLayout.build(3, 23, ids)
    hidden = torch.randn(3, 23, WIDTH, dtype=torch.float64)
    weight, active = (mixer.part_proj.weight, 2) if isinstance(mixer, SSE) else (mixer.router.weight, 2)  # type: ignore[union-attr]
    scores = (hidden[ids > 0] @ weight.T).softmax(dim=-1)  # type: ignore[operator]
    sums = mixer.router_sums(hidden.masked_fill(ids[..., None] == 0, torch.nan), layout)
    assert sums["load"].dtype == torch.int64
    assert sums["load"].tolist() == scores.topk(active).indices.flatten().bincount(minlength=3).tolist()
    assert sums["positions"] == 43
    torch.testing.assert_close(sums["entropy"], -(scores * scores.log()).sum())
    assert sums["router_loss_sum"] > 0 and sums["router_loss_sum"].requires_grad
    assert not any(value.requires_grad for what, value in sums.items() if what != "router_loss_sum")
    assert mixer.router_sums(hidden[:2], SequenceLayout.build(2, 23))["positions"] == 46
    setattr(mixer, "balance_loss", 0.0)  # noqa: B010
    assert set(mixer.router_sums(hidden, layout)) == {"load", "positions", "entropy"}, "counted without a loss too"


def test_routers_of_mixers_and_experts_stand_beside_each_other_in_the_log() -> None:
    """Under names of their own, summed over batches; no bias of theirs moves, and those of the experts by their own."""
    torch.manual_seed(0)
    mixers: dict[str, Callable[[int], Mixer]] = {
        "h": ROUTED["moh"],
        "p": partial(Parallel, mixers={"a": ROUTED["moh"], "g": partial(GLA, heads=2), "s": ROUTED["sse"]}),
        "b": partial(Bidirectional, mixer=ROUTED["mom"]),
        "t": partial(Bidirectional, mixer=ROUTED["mom"], tied=True),
        "s": partial(Scout, mixer=ROUTED["sse"], heads=2),
    }
    feed = partial(MoE, experts=4, active=1, d_hidden=8, shared=0)
    model = Backbone(BackboneConfig(16, WIDTH, "hpbts", mixers, ffn=feed, ffns={"p": None}, checkpointing="block"))
    given = SequenceBatch(tokens=torch.randint(1, 16, (2, 20)), segment_ids=torch.ones(2, 20, dtype=torch.int32))
    given.segment_ids[1, 15:] = 0  # type: ignore[index]
    loads = ExpertLoads()
    counted = [model(given).aux for _ in range(2)]
    for aux in counted:
        loads.add(aux)
    before = {name: value.clone() for name, value in model.named_buffers() if name.endswith("router.bias")}
    loads.end_step(model)
    places = {
        (1, "mixer"): 3, (1, "ffn"): 4, (2, "mixer/a"): 3, (2, "mixer/s"): 3, (3, "mixer/backward"): 3,
        (3, "mixer/forward"): 3, (3, "ffn"): 4, (4, "mixer"): 3, (4, "ffn"): 4, (5, "mixer"): 3, (5, "ffn"): 4,
    }  # fmt: skip
    found = loads.loads()
    assert list(found) == list(places)
    for (block, part), experts in places.items():
        name = f"{'experts' if part == 'ffn' else 'routers'}/{block}{part.removeprefix('ffn').removeprefix('mixer')}"
        assert found[block, part] == sum(aux[f"{name}/load"] for aux in counted).tolist()  # type: ignore[union-attr]
        assert len(found[block, part]) == experts and sum(found[block, part]) == 2 * 35 * (1 if part == "ffn" else 2)
    for name, value in model.named_buffers():
        if name in before:
            number = int(name.split(".")[1])
            if ".ffn." in name:
                step = step_of_bias(torch.tensor(found[number + 1, "ffn"]), wanted_shares(4, 0, None), 1e-3)
                assert step.any()
                torch.testing.assert_close(value - before[name], step)
            else:
                assert torch.equal(value, before[name])
    figures = loads.figures(model)
    assert figures["routers/2/s/max_violation"] == max(found[2, "mixer/s"]) * 3 / 140 - 1
    assert {name.rsplit("/", 1)[1] for name in figures} == {"max_violation", "dead", "entropy"}
    assert all(0 < value < 1 for name, value in figures.items() if name.endswith("entropy"))
    model.eval()
    assert model(given).aux == {}


def test_the_report_finds_the_figures_of_every_router() -> None:
    parts = {"mixer": "routers/2", "mixer/a": "routers/3/a", "ffn": "experts/3"}
    record = RunRecord(Path(), experts=[(4, 2 if part == "mixer" else 3, part, [5, 1, 0]) for part in parts])
    for number, place in enumerate(parts.values()):
        for what in ("max_violation", "dead", "entropy"):
            record.metrics[f"{place}/{what}"] = Series([4], [1.0], [number + 0.5])
    page = str(experts_section(record))
    for number, name in enumerate(("2 mixer", "3 mixer a", "3 ffn")):
        assert f">{name}<" in page and f"MaxVio {number}.50, {number + 0.5:.0f} dead, entropy {number}.50" in page
    assert page.index(">2 mixer<") < page.index(">3 mixer a<") < page.index(">3 ffn<")


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


def attention_by_loops(mixer: SwitchHead, x: Tensor, ids: list[int]) -> tuple[Tensor, Tensor]:
    """SwitchHead over one row, a token, a head and an expert at a time; and how often each expert is used, ``(2 h e)``.
    Without positions; id 0 is padding."""
    length, heads, dim = len(x), mixer.heads, mixer.head_dim
    q, k = mixer.qk_proj(x).view(length, 2, heads, dim).unbind(1)
    count = torch.zeros(2, heads, mixer.experts, dtype=torch.int64)

    def used(router: nn.Linear, kind: int, t: int, h: int) -> list[tuple[int, Tensor]]:
        scores = router.weight[h * mixer.experts : (h + 1) * mixer.experts] @ x[t]
        best = scores.topk(mixer.active).indices.tolist()
        for e in best:
            count[kind, h, e] += 1
        return [(h * mixer.experts + e, scores[e].sigmoid()) for e in best]

    real = [t for t in range(length) if ids[t]]
    values = {
        (t, h): sum(w * (x[t] @ mixer.value_experts.weight[n]) for n, w in used(mixer.value_router, 0, t, h))
        for t in real for h in range(heads)
    }  # fmt: skip
    output = torch.zeros_like(x)
    for t in real:
        for h in range(heads):
            seen = [j for j in real if j <= t and ids[j] == ids[t]]
            share = torch.stack([q[t, h] @ k[j, h] / dim**0.5 for j in seen]).softmax(dim=0)
            read = sum(share[i] * values[j, h] for i, j in enumerate(seen))
            for n, w in used(mixer.out_router, 1, t, h):
                output[t] += w * (read @ mixer.out_experts.weight[n])
    return output, count


@pytest.mark.parametrize(("heads", "experts", "active"), [(1, 3, 1), (2, 4, 2), (3, 2, 2)])
def test_switch_head_is_its_definition(heads: int, experts: int, active: int) -> None:
    torch.manual_seed(0)
    mixer = shaken(SwitchHead(WIDTH, heads, experts, active, head_dim=5, positions="none", balance_loss=0.5))
    assert isinstance(mixer, SwitchHead)
    hidden = torch.randn(2, 13, WIDTH, dtype=torch.float64)
    ids = torch.tensor([[1] * 5 + [2] * 8, [1] * 9 + [0] * 4], dtype=torch.int32)
    layout = SequenceLayout.build(2, 13, ids)
    found, sums = mixer(hidden, layout)[0], mixer.router_sums(hidden, layout)
    expected = [attention_by_loops(mixer, hidden[row], ids[row].tolist()) for row in range(2)]
    torch.testing.assert_close(found, torch.stack([output for output, _ in expected]))  # zero at padding
    assert (mixer._choose(mixer.value_router, hidden, layout)[1][1, 9:] == heads * experts).all(), "no work for padding"
    counts = expected[0][1] + expected[1][1]
    assert sums["values/load"].tolist() == counts[0].tolist() and sums["output/load"].tolist() == counts[1].tolist()
    assert sums["values/positions"] == sums["output/positions"] == 22 * heads
    scores = mixer._scores(mixer.out_router, hidden)[ids > 0]
    chances = scores / scores.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(sums["output/entropy"], -(chances * chances.log()).sum())
    assert 0.5 * 2 * 22 * 0.9 < sums["router_loss_sum"] < 0.5 * 2 * 22 * experts, "1 a token where all is even, twice"


def test_switch_head_costs_what_a_token_uses() -> None:
    mixer = SwitchHead(WIDTH, heads=2, experts=4, active=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(torch.randn(1, 24, WIDTH), SequenceLayout.build(1, 24))
    counted = counter.get_flop_counts()["Global"]
    dense = sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm"))
    cost = mixer_cost(mixer, 24)
    terms = {term.what: term.flops for term in cost.terms}
    routers_and_qk = 2 * (2 * WIDTH * 8 + WIDTH * 2 * WIDTH)
    assert terms["products"] == routers_and_qk and dense == 24 * routers_and_qk
    assert terms["experts"] == 2 * 2 * 2 * WIDTH * 8, "values and output, two heads, one expert each"
    assert mixer.idle_parameters == 2 * 2 * 3 * WIDTH * 8


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="active from 1 to memories"):
        MoM(WIDTH, partial(GLA, heads=2), memories=2, active=3)
    with pytest.raises(ValueError, match="needs a linear mixer such as GatedDeltaNet or GLA, found RGLRU"):
        MoM(WIDTH, partial(RGLRU, heads=2))
    with pytest.raises(ValueError, match="found LogLinearGatedDeltaNet"):
        MoM(WIDTH, LogLinearGatedDeltaNet)
    with pytest.raises(ValueError, match="active from 1 to parts"):
        SSE(WIDTH, parts=2, active=0)
    with pytest.raises(ValueError, match="active from 1 to experts"):
        SwitchHead(WIDTH, experts=2, active=3)
    with pytest.raises(ValueError, match="active from 1 to heads - shared"):
        MoH(WIDTH, heads=4, shared=3, active=2)
