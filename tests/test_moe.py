"""Experts: against a dense float64 loop, the laws of routing and balance, and a whole model that trains with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from moe_cases import PADDED, batch, config, layout
from oracle import library

from seqlong.backbone import Backbone
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.ffn import MoE, SwiGLU
from seqlong.ffn.balance import step_of_bias, violation, wanted_shares
from seqlong.ffn.router import Router, chosen_by_experts
from seqlong.ffn.upcycle import partition, upcycle, upcycle_blocks
from seqlong.mixers import Bidirectional, Mamba2

KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "softmax": {"score": "softmax"},
    "mixtral": {"score": "softmax", "shared": 0, "bias_rate": 0.0},
    "raw": {"score": "softmax", "normalize": False, "scale": 2.5, "active": 3},
    "fine": {"experts": 12, "active": 5, "d_hidden": 8, "shared": 2},
    "idle": {"identity": 3, "active": 3},
    "losses": {"balance_loss": 0.5, "z_loss": 0.25, "score": "softmax"},
    "expert": {"choice": "expert", "score": "softmax", "z_loss": 0.5},
}
ENGINES = ["chunked", "grouped_mm", "reference", "triton"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN: an element that is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def build(kind: str, dtype: torch.dtype = torch.float64, **more: Any) -> MoE:
    moe = MoE(16, **{"experts": 6, **KINDS[kind], **more}).to(dtype)
    with torch.no_grad():
        moe.router.bias += torch.randn(moe.router.bias.shape) * 0.05
    return moe


def expert(moe: MoE, number: int, x: Tensor) -> Tensor:
    if number >= moe.experts.count:
        return x
    gate, up = (x @ moe.experts.gate_up_proj.weight[number]).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ moe.experts.down_proj.weight[number]


def dense(moe: MoE, hidden: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Position by position, as the papers say it: the result, the loss summed over positions, and the load."""
    router, rows = moe.router, []
    load, loss = torch.zeros(router.weight.shape[0], dtype=torch.int64), hidden.new_zeros(())
    for b in range(hidden.shape[0]):
        real = [t for t in range(hidden.shape[1]) if ids is None or ids[b, t] > 0]
        logits = hidden[b] @ router.weight.T
        scores = logits.softmax(-1) if router.score == "softmax" else logits.sigmoid()
        taken: list[list[int]] = [[] for _ in range(hidden.shape[1])]
        if moe.choice == "expert":
            of = torch.ones(hidden.shape[1]) if ids is None else ids[b]
            for segment in sorted({int(of[t]) for t in real}):
                inside = [t for t in real if int(of[t]) == segment]
                for e in range(moe.experts.count):
                    best = sorted(inside, key=lambda t: -scores[t, e].item())
                    for t in best[: len(inside) * router.active // moe.experts.count]:
                        taken[t].append(e)
        else:
            for t in real:
                taken[t] = (scores[t] + router.bias).argsort(descending=True)[: router.active].tolist()
        for t in range(hidden.shape[1]):
            total = sum(scores[t, e] for e in taken[t]) if router.normalize else 1.0
            row = sum((scores[t, e] / total * router.scale * expert(moe, e, hidden[b, t]) for e in taken[t]),
                      torch.zeros(hidden.shape[2], dtype=hidden.dtype))  # fmt: skip
            rows.append(row if moe.shared is None else row + moe.shared(hidden[b, t].view(1, 1, -1)).view(-1))
            for e in taken[t]:
                load[e] += 1
        if moe.z_loss and real:
            loss = loss + moe.z_loss * logits[real].logsumexp(-1).square().sum()
        if moe.balance_loss and real:
            share = F.one_hot(torch.tensor([e for t in real for e in taken[t]]), len(load)).double().mean(0)
            chance = (scores / scores.sum(-1, keepdim=True))[real].mean(0)
            loss = loss + moe.balance_loss * len(real) * len(load) * (share * chance).sum()
    return torch.stack(rows).view_as(hidden), loss, load


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_result_gradients_loss_and_load_are_those_of_a_loop_over_positions(kind: str, packed: bool) -> None:
    moe, ids = build(kind), PADDED if packed else None
    hidden = torch.randn(3, 15, 16, dtype=torch.float64, requires_grad=True)
    found, aux = moe(hidden, layout(ids))
    wanted, loss, load = dense(moe, hidden, ids)
    torch.testing.assert_close(found, wanted)
    assert aux["load"].tolist() == load.tolist()
    assert int(aux["positions"]) == (45 if ids is None else int((ids > 0).sum()))
    said = aux.get("router_loss_sum", torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(said, loss)
    incoming = torch.randn_like(found)
    inputs = [hidden, *moe.parameters()]
    ours = torch.autograd.grad((found * incoming).sum() + said, inputs, allow_unused=True)
    theirs = torch.autograd.grad((wanted * incoming).sum() + loss, inputs, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [(engine, torch.bfloat16) for engine in ENGINES] + [(engine, torch.float32) for engine in ENGINES[:-1]],
)
def test_every_engine_gives_that_and_twice_the_same(engine: str, dtype: torch.dtype) -> None:
    if engine == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        from seqlong.kernels.grouped_matmul import op

        small = {"rows": 16, "inner": 16, "columns": 16, "warps": 4, "stages": 1}
        patch = pytest.MonkeyPatch()
        patch.setattr(op, "DEFAULT", small)
    moe = build("idle", dtype, implementation=engine, d_hidden=8)
    hidden = torch.randn(3, 15, 16).to(dtype).requires_grad_()
    runs = []
    for _ in range(2):
        found, _aux = moe(hidden, layout())
        runs.append([found, *torch.autograd.grad(found.float().square().sum(), [hidden, *moe.parameters()])])
    if engine == "triton":
        patch.undo()
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    exact = build("idle", torch.float64, d_hidden=8)
    exact.load_state_dict(moe.state_dict())
    source = hidden.detach().double().requires_grad_()
    wanted = dense(exact, source, PADDED)[0]
    truth = [wanted, *torch.autograd.grad(wanted.square().sum(), [source, *exact.parameters()])]
    for one, other in zip(runs[0], truth, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < (2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_a_window_of_nothing_gives_nothing(kind: str, shape: tuple[int, int]) -> None:
    result, said = build(kind)(torch.zeros(*shape, 16, dtype=torch.float64), layout(None, *shape))
    assert result.shape == (*shape, 16) and said["positions"] == 0 and not said["load"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_and_is_nothing(kind: str) -> None:
    moe = build(kind)
    hidden = torch.randn(3, 15, 16, dtype=torch.float64)
    junk = torch.where((PADDED > 0)[..., None], hidden, 1e3)
    (one, said), (other, also) = moe(hidden, layout()), moe(junk, layout())
    assert torch.equal(one[PADDED > 0], other[PADDED > 0])
    assert all(torch.equal(said[name], also[name]) for name in said)
    alone, _ = moe(hidden[:1, 9:13], layout(None, 1, 4))
    torch.testing.assert_close(one[:1, 9:13], alone)


def test_the_choice_is_made_in_float32() -> None:
    moe = build("sigmoid", torch.float32)
    hidden = torch.randn(3, 15, 16)
    plain = moe.router(hidden.flatten(0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routed = moe.router(hidden.flatten(0, 1))
        output, _ = moe(hidden, layout())
    assert torch.equal(plain.weights, routed.weights) and torch.equal(plain.experts, routed.experts)
    assert routed.logits.dtype == torch.float32
    torch.testing.assert_close(output.float(), moe(hidden, layout())[0], rtol=0.05, atol=0.05)


def test_the_bias_chooses_and_never_weighs_and_stays_float32() -> None:
    router = Router(8, 4, 2, normalize=False)
    x = torch.randn(30, 8)
    router.bias[3] = 10.0
    routing = router(x)
    assert (routing.experts[:, 0] == 3).all()
    assert torch.equal(routing.weights, routing.scores.gather(1, routing.experts))
    router.bias.copy_(torch.tensor([0.25 + 2**-20, 0, 0, 0]))
    assert router.to(torch.bfloat16).bias[0].item() == 0.25 + 2**-20
    assert "bias" in router.state_dict() and not router.bias.requires_grad


def test_experts_take_their_share_of_each_segment() -> None:
    scores = torch.rand(3, 15, 4)
    lists = chosen_by_experts(scores, 0.5, PADDED)
    assert lists.shape == (4, 3 * 7)
    for chosen in lists:
        taken = chosen[chosen < 45].tolist()
        assert len(taken) == len(set(taken)) == 4 + 2 + 7 + 1
        of = [(place // 15, int(PADDED.flatten()[place])) for place in taken]
        assert {key: of.count(key) for key in of} == {(0, 1): 4, (0, 2): 2, (1, 1): 7, (2, 1): 1}


@pytest.mark.parametrize("engine", ["chunked", "grouped_mm"])
def test_the_result_is_that_of_mixtral(engine: str) -> None:
    transformers, mixtral = library(), library("models.mixtral.modeling_mixtral")
    theirs = mixtral.MixtralSparseMoeBlock(
        transformers.MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2)
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = build("mixtral", torch.float32, d_hidden=24, implementation=engine)
    ours.router.bias.zero_()
    with torch.no_grad():
        ours.router.weight.copy_(theirs.gate.weight)
        ours.experts.gate_up_proj.weight.copy_(theirs.experts.gate_up_proj.transpose(1, 2))
        ours.experts.down_proj.weight.copy_(theirs.experts.down_proj.transpose(1, 2))
    hidden = torch.randn(3, 15, 16, requires_grad=True)
    found, wanted = ours(hidden, layout(None))[0], theirs(hidden)
    torch.testing.assert_close(found, wanted)
    one, other = (torch.autograd.grad(result.square().sum(), hidden)[0] for result in (found, wanted))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# -- Balance ----------------------------------------------------------------------------------------------------------


def test_a_bias_moves_by_its_rate_against_its_load() -> None:
    step = step_of_bias(torch.tensor([10, 30, 20, 20]), wanted_shares(4, 0, None), 0.5)
    assert step.tolist() == [0.5, -0.5, 0.0, 0.0]
    assert step_of_bias(torch.tensor([7, 7, 7]), wanted_shares(3, 0, None), 0.5).tolist() == [0, 0, 0]
    shares = wanted_shares(2, 2, 0.5)
    assert shares.tolist() == [0.25] * 4 and wanted_shares(6, 2, 0.4)[6:].tolist() == [0.2, 0.2]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_an_uneven_load_becomes_even(score: Any) -> None:
    moe = MoE(8, experts=8, active=2, score=score, bias_rate=0.01, d_hidden=8)
    with torch.no_grad():
        moe.router.weight[0] += 0.5  # one that most prefer, as x has a positive mean
    seen = []
    for _ in range(200):
        _, aux = moe(torch.randn(1, 1024, 8) + 0.5, layout(None, 1, 1024))
        seen.append(violation(aux["load"]).item())
        moe.balance(aux["load"])
    assert seen[0] > 1.2 and sum(seen[-5:]) / 5 < 0.4, (seen[0], seen[-5:])


def test_experts_that_do_nothing_get_the_share_that_was_asked_for() -> None:
    moe = MoE(8, experts=6, identity=2, identity_share=0.5, active=3, bias_rate=0.02)
    for _ in range(200):
        _, aux = moe(torch.randn(1, 256, 8), layout(None, 1, 256))
        moe.balance(aux["load"])
    share = aux["load"][6:].sum() / aux["load"].sum()
    assert abs(share.item() - 0.5) < 0.06


# -- In a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["selective", "block", "tiled"])
def test_checkpointing_counts_once_and_changes_no_gradient(mode: Any) -> None:
    torch.manual_seed(1)
    plain = Backbone(config()).double()
    other = Backbone(config(checkpointing=mode, tile=5)).double()
    other.load_state_dict(plain.state_dict())
    given, results = batch(padded=True), []
    for model in (plain, other):
        output = model(given)
        loss = output.hidden.square().sum() + output.aux["router_loss_sum"]
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        results.append((output.aux, gradients))
    (aux, gradients), (also, theirs) = results
    assert (
        set(aux)
        == set(also)
        == {"router_loss_sum"} | {f"experts/{n}/{what}" for n in (1, 2) for what in ("load", "positions", "entropy")}
    )
    for name in aux:
        torch.testing.assert_close(aux[name], also[name])
    assert int(aux["experts/1/load"].sum()) == 2 * (48 - 7)
    for one, two in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_a_causal_model_refuses_experts_that_look_ahead_and_a_bidirectional_one_runs_them_whole() -> None:
    ahead = partial(MoE, experts=4, active=1, d_hidden=8, choice="expert")
    with pytest.raises(ConfigError, match=r"every mixer of pattern 'ma' is causal; set backbone.ffn"):
        Backbone(config(ffn=ahead))
    both = {"b": partial(Bidirectional, mixer=partial(Mamba2, d_state=8, head_dim=8))}
    model = Backbone(config(ffn=ahead, mixers=both, pattern="bb", checkpointing="tiled", tile=5))
    whole = Backbone(config(ffn=ahead, mixers=both, pattern="bb"))
    whole.load_state_dict(model.state_dict())
    given = batch()
    torch.testing.assert_close(model(given).hidden, whole(given).hidden)
    causal, given = Backbone(config()), batch(1)
    tokens = given.tokens.clone()  # type: ignore[union-attr]
    tokens[:, 7:] = 3
    a, b = causal(given).hidden, causal(SequenceBatch(tokens=tokens)).hidden
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=1e-5, atol=1e-6)  # products of other sizes may round otherwise


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"experts": 0}, "at least 1 expert"),
        ({"active": 9}, "active from 1 to experts"),
        ({"d_hidden": 0}, "widths and a scale above 0, found d_hidden 0"),
        ({"identity_share": 0.5}, "for identity experts; found 0.5 with identity 0"),
        ({"z_loss": -1.0}, "must be 0 or more"),
        ({"shared_gate": True, "shared": 0}, "there are none"),
        ({"choice": "expert", "balance_loss": 0.1}, "an even load by itself"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"backbone.ffn: .*{complaint}"):
        Backbone(config(ffn=partial(MoE, **settings)))


def test_the_defaults_use_as_many_parameters_at_a_position_as_a_dense_layer() -> None:
    moe, plain = MoE(768), SwiGLU(768)
    count = sum(p.numel() for p in moe.parameters()) - moe.idle_parameters - moe.router.weight.numel()
    assert abs(count / sum(p.numel() for p in plain.parameters()) - 1) < 0.01
    writers = Backbone(config()).blocks[0].residual_projections()  # type: ignore[operator]
    assert len(writers) == 3 and any(writer.weight.dim() == 3 for writer in writers)


# -- Upcycling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_dense_model_cut_into_experts_that_are_all_on_is_the_dense_model(shared: int, score: Any) -> None:
    ffn = SwiGLU(16, d_hidden=48).double()
    moe = upcycle(ffn, 6 - shared, 6 - shared, shared, router_std=0.0, score=score)
    hidden = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(moe(hidden, layout(None, 2, 7))[0], ffn(hidden))
    model = Backbone(config(ffn=partial(SwiGLU, d_hidden=48))).double()
    given = batch()
    wanted = model(given).hidden
    upcycle_blocks(model.blocks, 6 - shared, 6 - shared, shared, router_std=0.0)
    torch.testing.assert_close(model(given).hidden, wanted)
    assert model(given).aux["experts/2/load"].tolist() == [48] * (6 - shared)
    with pytest.raises(ValueError, match="block 1 has MoE for a feed-forward"):
        upcycle_blocks(model.blocks, 6, 2)


def test_neurons_are_dealt_out_once_and_evenly_and_the_best_are_shared() -> None:
    importance = torch.rand(48)
    parts, common = partition(importance, 5, 1)
    assert sorted([*parts.flatten().tolist(), *common.tolist()]) == list(range(48))
    assert set(common.tolist()) == set(importance.topk(8).indices.tolist())
    sums = importance[parts].sum(1)
    assert (sums / sums.mean() - 1).abs().max() < 0.05
    with pytest.raises(ValueError, match="48 neurons cannot be divided into 5 experts and 0 shared"):
        partition(importance, 5)
    dense_one = SwiGLU(16, d_hidden=48)
    few, every = (upcycle(dense_one, 6, active, importance=importance) for active in (2, 6))
    hidden = torch.randn(64, 4, 16)
    strengths = [moe(hidden, layout(None, 64, 4))[0].norm() / dense_one(hidden).norm() for moe in (few, every)]
    assert 0.8 < strengths[1] < 1.2 and 0.7 < strengths[0] < 3
