"""Parallel: against its formula and Falcon-H1, what it passes on to its branches, its costs, its mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import oracle
import pytest
import torch

from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.block import Block
from seqlong.cost import mixer_cost
from seqlong.errors import ConfigError
from seqlong.ffn import SwiGLU
from seqlong.layout import SequenceLayout
from seqlong.mixers import (
    Attention,
    Bidirectional,
    GatedMemoryUnit,
    LightningAttention,
    Mamba2,
    Mixer,
    MoH,
    MoM,
    Parallel,
)
from seqlong.norms import RMSNorm
from seqlong.show import _named

WIDTH = 16
ATTENTION = partial(Attention, heads=4, kv_heads=2)
MAMBA = partial(Mamba2, d_state=8, head_dim=8)


def shaken(mixer: Mixer) -> Mixer:
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer.double()


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("norm", [True, False])
def test_it_is_its_formula(combine: str, norm: bool) -> None:
    torch.manual_seed(0)
    mixer = shaken(Parallel(WIDTH, {"a": ATTENTION, "m": MAMBA, "b": MAMBA}, combine, norm))  # type: ignore[arg-type]
    assert isinstance(mixer, Parallel)
    hidden, layout = torch.randn(2, 19, WIDTH).double(), SequenceLayout.build(2, 19)
    expected = torch.zeros_like(hidden)
    for name in "amb":
        branch = mixer.branches[name](hidden, layout)[0]
        if norm:
            branch = branch / (branch.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected += mixer.scales[name] * branch
    torch.testing.assert_close(mixer(hidden, layout)[0], expected / (3 if combine == "mean" else 1))


def test_it_is_falcon_h1s_block() -> None:
    """A sum without norms, the multipliers as scales: hidden states of transformers' model with copied weights."""
    transformers = oracle.library()
    config = transformers.FalconH1Config(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=12,
        mamba_rms_norm=True, mamba_norm_before_gate=False, mamba_chunk_size=64, rms_norm_eps=1e-5,
        ssm_out_multiplier=0.7, attention_out_multiplier=1.3, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = transformers.FalconH1Model(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    mamba = partial(Mamba2, d_state=12, head_dim=8, groups=2)
    attention = partial(ATTENTION, rope_base=config.rope_parameters["rope_theta"])
    mixer = partial(Parallel, mixers={"ssm": mamba, "attention": attention}, combine="sum", norm=False)
    ffn = partial(SwiGLU, d_hidden=48)
    ours = Backbone(BackboneConfig(vocab_size=16, d_model=32, pattern="p", layers=2, mixers={"p": mixer}, ffn=ffn))
    given = theirs.state_dict()
    weights = {"embedding.weight": given["embed_tokens.weight"], "norm.weight": given["final_layernorm.weight"]}
    for number in range(2):
        old, new = f"layers.{number}", f"blocks.{number}"
        branches = f"{new}.mixer.branches"
        for name in [name for name in given if name.startswith(f"{old}.mamba.")]:
            if not name.endswith("mup_vector"):
                weights[name.replace(f"{old}.mamba", f"{branches}.ssm")] = given[name]
        qkv = [given[f"{old}.self_attn.{x}_proj.weight"] for x in "qkv"]
        weights[f"{branches}.attention.qkv_proj.weight"] = torch.cat(qkv)
        weights[f"{branches}.attention.out_proj.weight"] = given[f"{old}.self_attn.o_proj.weight"]
        weights[f"{new}.mixer.scales.ssm"] = torch.full((32,), config.ssm_out_multiplier)
        weights[f"{new}.mixer.scales.attention"] = torch.full((32,), config.attention_out_multiplier)
        gate_up = [given[f"{old}.feed_forward.{x}_proj.weight"] for x in ("gate", "up")]
        weights[f"{new}.ffn.gate_up_proj.weight"] = torch.cat(gate_up)
        weights[f"{new}.ffn.down_proj.weight"] = given[f"{old}.feed_forward.down_proj.weight"]
        weights[f"{new}.mixer_norm.weight"] = given[f"{old}.input_layernorm.weight"]
        weights[f"{new}.ffn_norm.weight"] = given[f"{old}.pre_ff_layernorm.weight"]
    ours.load_state_dict(weights, strict=True)
    for length in (3, 77, 300):
        tokens = torch.randint(0, 16, (2, length))
        expected = theirs(tokens).last_hidden_state
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(SequenceBatch(tokens=tokens)).hidden, expected, rtol=1e-4, atol=1e-4)


def test_branches_are_told_their_place_and_scales_stand_in_for_depth() -> None:
    mixers = {"l": partial(LightningAttention, heads=2), "m": MAMBA}
    for norm, first in ((True, 1 / math.sqrt(10)), (False, 1.0)):
        config = BackboneConfig(8, WIDTH, "p", {"p": partial(Parallel, mixers=mixers, norm=norm)}, layers=5)
        blocks = Backbone(config).blocks
        alone = LightningAttention(WIDTH, heads=2)
        alone.place(3, 5)
        assert torch.equal(blocks[3].mixer.branches["l"].decay.numbers, alone.decay.numbers)
        assert not torch.equal(blocks[2].mixer.branches["l"].decay.numbers, alone.decay.numbers)
        torch.testing.assert_close(blocks[3].mixer.scales["m"].detach(), torch.full((WIDTH,), first))


def test_projections_of_the_branches_are_scaled_with_depth() -> None:
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(8, 64, "p", {"p": Parallel}, layers=4))
    writers = backbone.blocks[1].residual_projections()
    assert [tuple(layer.weight.shape) for layer in writers] == [(64, 64), (64, 128), (64, 192)]
    for layer in writers[:2]:  # torch's first values are uniform, up to one over the root of the inputs
        assert layer.weight.abs().max() <= 1 / math.sqrt(layer.in_features * 3 * 4)


@pytest.mark.parametrize("mode", ["none", "block", "tiled"])
def test_losses_of_the_branches_routers_are_added(mode: str) -> None:
    torch.manual_seed(0)
    mixers = {
        "h": partial(MoH, heads=4, shared=1, active=2, window=5, balance_loss=0.5),
        "m": MAMBA,
        "s": partial(MoM, mixer=partial(LightningAttention, heads=2), memories=3, balance_loss=0.25),
    }
    block = Block(WIDTH, shaken(Parallel(WIDTH, mixers)), None, RMSNorm).double()
    assert isinstance(block.mixer, Parallel) and block.mixer.routed
    hidden, layout = torch.randn(2, 23, WIDTH).double(), SequenceLayout.build(2, 23)
    normed = block.mixer_norm(hidden)
    branches = [block.mixer.branches[name] for name in "hs"]
    expected = sum(branch.router_sums(normed, layout)["router_loss_sum"] for branch in branches)  # type: ignore[operator]
    said = block(hidden, layout, checkpointing=mode, tile=23)[2]
    torch.testing.assert_close(said["router_loss_sum"], expected)
    routers = [branch.router.weight for branch in branches]
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(said["router_loss_sum"], routers))
    plain = Parallel(WIDTH, {"m": MAMBA, "a": ATTENTION})
    assert not plain.routed
    assert plain.router_sums(torch.randn(1, 2, WIDTH), SequenceLayout.build(1, 2)) == {}
    with pytest.raises(NotImplementedError, match="has no router"):
        MAMBA(WIDTH).router_sums(torch.randn(1, 2, WIDTH), SequenceLayout.build(1, 2))


def test_it_is_causal_and_bounded_if_all_branches_are() -> None:
    both, near = partial(Bidirectional, mixer=MAMBA), partial(ATTENTION, window=3)

    def law(*mixers: Callable[[int], Mixer]) -> tuple[bool, bool]:
        mixer = Parallel(WIDTH, {f"x{n}": make for n, make in enumerate(mixers)})
        return mixer.causal, mixer.bounded_state

    assert law(MAMBA, near) == (True, True)
    assert law(MAMBA, ATTENTION) == (True, False)
    assert law(MAMBA, both)[0] is False
    with pytest.raises(ValueError, match="needs the whole row"):
        Parallel(WIDTH, {"a": MAMBA, "b": both}).initial_state(1, "cpu", torch.float32)


def test_it_costs_what_its_branches_cost() -> None:
    attention, mamba = ATTENTION(WIDTH), MAMBA(WIDTH)
    for other, more in ((mamba, MAMBA), (attention, ATTENTION)):
        cost = mixer_cost(Parallel(WIDTH, {"a": ATTENTION, "m": more}), 50)
        parts = [mixer_cost(x, 50) for x in (attention, other)]
        assert cost.flops == sum(part.flops for part in parts)
        assert cost.state == sum(part.state or 0 for part in parts)
        assert len({(term.what, term.formula) for term in cost.terms}) == len(cost.terms)
        assert cost.growth == "32 B a token" and any(term.grows for term in cost.terms)
    assert mixer_cost(Parallel(WIDTH, {"a": MAMBA, "m": MAMBA}), 50).growth == "constant"
    both = mixer_cost(Parallel(WIDTH, {"a": ATTENTION, "m": partial(Bidirectional, mixer=MAMBA)}), 50)
    assert both.state is None and "needs the whole row" in both.growth


def test_show_names_its_branches_and_their_settings() -> None:
    node = {"class_path": "seqlong.mixers.Parallel", "init_args": {"combine": "sum", "mixers": {
        "a": {"class_path": "seqlong.mixers.Attention", "init_args": {"heads": 4}},
        "m": {"class_path": "seqlong.mixers.Mamba2"}}}}  # fmt: skip
    assert _named(node) == ("Parallel(Attention + Mamba2)", {"a.heads": 4, "combine": "sum"})


@pytest.mark.parametrize(
    ("mixers", "complaint"),
    [
        ({"a": MAMBA}, r"mixers\.p: Parallel needs two mixers or more, found a$"),
        ({}, r"Parallel needs two mixers or more, found none"),
        ({"a.b": MAMBA, "m": MAMBA}, r"names of letters, digits and _ .*: found 'a\.b'"),
        ({"keys": MAMBA, "m": MAMBA}, r"not a method's: found 'keys'"),
        ({"a": partial(Attention, heads=3), "m": MAMBA}, r"mixers\.p: mixers\.a: Attention needs d_model divisible"),
        ({"g": GatedMemoryUnit, "m": MAMBA}, r"mixers\.g: GatedMemoryUnit reads another block's memory"),
    ],
)
def test_mistakes_are_told(mixers: dict[str, Callable[[int], Mixer]], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Backbone(BackboneConfig(8, WIDTH, "p", {"p": partial(Parallel, mixers=mixers)}))
