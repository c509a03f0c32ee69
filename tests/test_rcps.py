"""Equivariant backbones: the reverse complement in, the model's answers turned around out; for any mixers."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.datamodules.dna.alphabet import COMPLEMENT_TABLE, DnaVocabulary
from seqlong.errors import ConfigError
from seqlong.ffn import MoE
from seqlong.heads import LanguageHead
from seqlong.layout import SequenceLayout
from seqlong.mixers import (
    GLA,
    Attention,
    Bidirectional,
    GatedDeltaNet,
    GatedMemoryUnit,
    Mamba2,
    MoH,
    Parallel,
    SharedAttention,
)
from seqlong.show import show
from seqlong.strands import Strands, fold
from seqlong.tasks import CausalLM, MaskedLM

WIDTH = 16
COMPLEMENT = torch.tensor([0, 1, 2, 3, 7, 6, 5, 4, 8])
MAMBA = partial(Mamba2, d_state=8, head_dim=8)
FULL = partial(Attention, heads=4, kv_heads=2)
#: Name -> pattern, mixers, and the rest of the settings.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mamba2 and attention": ("mma", {"m": MAMBA, "a": FULL}, {}),
    "attention to both sides": ("am", {"m": MAMBA, "a": partial(FULL, causal=False, window=4)}, {"norm": "layer"}),
    "gated delta rule": ("dw", {"d": partial(GatedDeltaNet, heads=2, head_dim=6), "w": partial(FULL, window=5)}, {}),
    "both directions": (
        "bj",
        {"b": partial(Bidirectional, mixer=MAMBA),
         "j": partial(Bidirectional, mixer=partial(GLA, heads=2), join="readings")},
        {},
    ),
    "side by side": ("p", {"p": partial(Parallel, mixers={"a": FULL, "m": MAMBA})}, {"layers": 2}),
    "shared memories": (
        "macg", {"m": MAMBA, "a": FULL, "c": partial(SharedAttention, heads=4), "g": GatedMemoryUnit},
        {"reads": {"c": "a", "g": "m"}},
    ),
    "experts": ("mh", {"m": MAMBA, "h": partial(MoH, heads=4, shared=1, active=2, balance_loss=0.5)},
                {"ffn": partial(MoE, experts=4, active=2, d_hidden=8, balance_loss=0.25)}),
    "experts that choose": ("m", {"m": MAMBA}, {"ffn": partial(MoE, experts=4, active=2, d_hidden=8, choice="expert")}),
}  # fmt: skip
SEGMENTS = torch.tensor([[1] * 9 + [2] * 14, [1] * 4 + [2] * 3 + [3] * 10 + [0] * 6, [0] * 23], dtype=torch.int32)


def build(name: str, rc: str = "equivariant", **more: Any) -> Backbone:
    torch.manual_seed(1)
    pattern, mixers, settings = MODELS[name]
    backbone = Backbone(BackboneConfig(16, WIDTH, pattern, mixers, **{"rc": rc, **settings, **more})).double()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return backbone.eval()


def batches(packed: bool) -> tuple[SequenceBatch, SequenceBatch, SequenceLayout]:
    """Rows, their reverse complements (padding stays at the end), and the layout that turns one to the other."""
    tokens = torch.randint(1, 9, (3, 23), generator=torch.Generator().manual_seed(5))
    if not packed:
        layout = SequenceLayout.build(3, 23)
        return SequenceBatch(tokens=tokens), SequenceBatch(tokens=COMPLEMENT[tokens.flip(1)]), layout
    layout = SequenceLayout.build(3, 23, SEGMENTS)
    tokens = tokens.where(SEGMENTS > 0, 0)
    other = COMPLEMENT[layout.reverse(tokens)]
    turned = layout.reverse(SEGMENTS)
    return SequenceBatch(tokens, segment_ids=SEGMENTS), SequenceBatch(other, segment_ids=turned), layout


def real(x: Tensor, packed: bool) -> Tensor:
    return x[SEGMENTS > 0] if packed else x


def near(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    assert b.abs().max() > 0.1
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_reverse_complement_turns_hidden_states_and_logits_around(name: str, packed: bool) -> None:
    backbone = build(name)
    given, other, layout = batches(packed)
    here, there = backbone(given).hidden, backbone(other).hidden
    assert here.shape == (3, 23, 2 * WIDTH) == (3, 23, backbone.width)
    swapped = torch.cat(there.chunk(2, dim=-1)[::-1], dim=-1)
    near(real(layout.reverse(swapped), packed), real(here, packed))
    head = LanguageHead(WIDTH, 16, backbone.embedding, backbone.strands).double()
    every = torch.cat([COMPLEMENT, torch.arange(9, 16)])
    here_logits, there_logits = head.logits(here), head.logits(there)
    near(real(layout.reverse(there_logits[..., every]), packed), real(here_logits, packed))
    assert (here_logits - there_logits).abs().max() > 0.1, "it does not see its input"
    near(real(layout.reverse(fold(there)), packed), real(fold(here), packed))
    kept = (SEGMENTS > 0 if packed else torch.ones(3, 23))[..., None]
    near((fold(there) * kept).sum(dim=1), (fold(here) * kept).sum(dim=1), 1e-11)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["mamba2 and attention", "both directions", "shared memories"])
def test_the_strands_are_two_runs_of_one_plain_backbone(name: str, packed: bool) -> None:
    backbone, plain = build(name), build(name, rc="none")
    plain.load_state_dict(backbone.state_dict(), strict=True)
    given, other, layout = batches(packed)
    expected = torch.cat([plain(given).hidden, layout.reverse(plain(other).hidden)], dim=-1)
    near(real(backbone(given).hidden, packed), real(expected, packed))
    assert plain.width == WIDTH


def test_packed_segments_are_as_if_separate() -> None:
    backbone, (batch, _, _) = build("mamba2 and attention"), batches(True)
    assert batch.tokens is not None
    whole = backbone(batch).hidden
    for row, a, z in ((0, 0, 9), (0, 9, 23), (1, 0, 4), (1, 4, 7), (1, 7, 17)):
        near(whole[row : row + 1, a:z], backbone(SequenceBatch(batch.tokens[row : row + 1, a:z])).hidden, 1e-11)


def test_every_position_sees_both_sides_of_its_segment() -> None:
    backbone, (batch, _, _) = build("mamba2 and attention"), batches(False)
    assert batch.tokens is not None
    hidden = backbone(batch).hidden
    for place, changed in ((0, slice(None, 11)), (1, slice(12, None))):  # of the given strand, and of the other
        tokens = batch.tokens.clone()
        tokens[:, changed] = COMPLEMENT[tokens[:, changed]].where(tokens[:, changed] > 3, 4)
        there = backbone(SequenceBatch(tokens)).hidden
        halves = (hidden - there)[:, 11].abs().amax(dim=0).chunk(2)
        assert halves[place].max() > 1e-3 and halves[1 - place].max() < 1e-12


def test_gradients_of_the_reverse_complement_are_the_same() -> None:
    given, other, layout = batches(True)
    targets = torch.randint(4, 8, (3, 23)).where(SEGMENTS > 0, -1)
    grads = []
    for batch, aim in ((given, targets), (other, COMPLEMENT[layout.reverse(targets)].where(SEGMENTS > 0, -1))):
        backbone = build("mamba2 and attention")
        head = LanguageHead(WIDTH, 16, backbone.embedding, backbone.strands).double()
        loss = head.loss(backbone(batch).hidden, aim).sum()
        grads.append([loss, *torch.autograd.grad(loss, list(backbone.parameters()))])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", ["selective", "block", "tiled"])
@pytest.mark.parametrize("name", ["mamba2 and attention", "shared memories"])
def test_checkpointing_changes_memory_only(name: str, mode: str) -> None:
    given, _, _ = batches(True)
    found = []
    for how in ("none", mode):
        backbone = build(name, checkpointing=how, tile=4)
        hidden = real(backbone(given).hidden, True)
        found.append([hidden, *torch.autograd.grad(hidden.square().sum(), list(backbone.parameters()))])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)


def test_losses_of_routers_are_for_each_position_once() -> None:
    backbone, plain = build("experts").train(), build("experts", rc="none").train()
    plain.load_state_dict(backbone.state_dict())
    given, other, _ = batches(False)
    found = backbone(given).aux
    one, two = plain(given).aux, plain(other).aux
    load = "experts/1/load"
    assert torch.equal(found[load], one[load] + two[load])
    # Shares of experts are those of both strands, so this is near the mean of the two, not it.
    mean = (one["router_loss_sum"] + two["router_loss_sum"]) / 2
    assert 0.8 * mean < found["router_loss_sum"] < 1.2 * mean


def test_an_untied_head_and_float32() -> None:
    backbone = build("gated delta rule").float()
    head = LanguageHead(WIDTH, 9, None, Strands([0, 1, 2, 3, 7, 6, 5, 4], 9))
    given, other, layout = batches(False)
    here, there = (head.logits(backbone(batch).hidden) for batch in (given, other))
    assert not head.tied and head.weight is not None and head.weight.shape == (9, WIDTH)
    torch.testing.assert_close(layout.reverse(there[..., COMPLEMENT]), here, rtol=1e-4, atol=1e-5)
    assert torch.equal(head.most_likely(backbone(given).hidden), here.argmax(dim=-1))


def test_the_default_complement_is_that_of_dna() -> None:
    vocabulary = DnaVocabulary()
    letters = list(vocabulary.letters)
    pairs = [letters.index(x.translate(COMPLEMENT_TABLE.decode("latin1")) if len(x) == 1 else x) for x in letters]
    backbone = build("mamba2 and attention")
    assert backbone.strands is not None and backbone.strands.complement.tolist() == pairs
    assert BackboneConfig().rc == "none"


def test_the_complement_survives_casts_and_the_meta_device() -> None:
    with torch.device("meta"):
        backbone = Backbone(BackboneConfig(16, WIDTH, "m", {"m": MAMBA}, rc="equivariant"))
    strands = backbone.to_empty(device="cpu").bfloat16().strands
    assert strands is not None and strands.complement.tolist() == [*COMPLEMENT.tolist(), *range(9, 16)]
    assert not any("complement" in key for key in backbone.state_dict())


@pytest.mark.parametrize(
    ("pairs", "size"), [([0, 2, 3, 1], 16), ([1, 1], 16), ([1], 16), ([0, 1, 2, 3, 7, 6, 5, 4], 7), ([-1, 0], 4)]
)
def test_what_is_no_pairing_of_tokens(pairs: list[int], size: int) -> None:
    with pytest.raises(ConfigError, match=rf"backbone\.complement must pair the tokens below vocab_size={size}"):
        Backbone(BackboneConfig(size, WIDTH, "m", {"m": MAMBA}, rc="equivariant", complement=pairs))
    Backbone(BackboneConfig(size, WIDTH, "m", {"m": MAMBA}, complement=pairs))


def test_what_has_no_other_strand_says_so() -> None:
    backbone = build("mamba2 and attention")
    with pytest.raises(ValueError, match="has no state: the other strand needs the whole row"):
        backbone.initial_state(1, "cpu", torch.float64)
    state = build("mamba2 and attention", rc="none").initial_state(3, "cpu", torch.float64)
    with pytest.raises(ValueError, match="carries no state"):
        backbone(batches(False)[0], state)
    places = torch.arange(23).expand(3, 23)
    with pytest.raises(ValueError, match=r"counts positions from either end .* set backbone\.rc=none"):
        backbone(SequenceBatch(batches(False)[0].tokens, positions=places))
    assert not any(block.causal for block in backbone.blocks)
    config = BackboneConfig(16, WIDTH, "m", {"m": MAMBA}, rc="equivariant")
    with pytest.raises(ConfigError, match=r"the other strand sees it; set model\.backbone\.rc=none, or use task=mask"):
        CausalLM(config)


def test_a_masked_model_gives_both_strands_the_same_bits(caplog: pytest.LogCaptureFixture) -> None:
    """Causal mixers are enough: what stands to the right is read by the other strand."""
    with caplog.at_level(logging.WARNING):
        task = MaskedLM(BackboneConfig(16, WIDTH, "ma", MODELS["mamba2 and attention"][1], rc="equivariant")).double()
    assert caplog.text == ""
    task.eval()
    given, _, _ = batches(False)
    targets = given.tokens
    assert targets is not None
    prepared = task.prepare(SequenceBatch(targets, targets=targets, index=torch.arange(3)))
    assert prepared.tokens is not None and prepared.targets is not None and (prepared.tokens == 1).any()
    here = task.head.loss(task.backbone(prepared).hidden, prepared.targets)
    turned = SequenceBatch(COMPLEMENT[prepared.tokens.flip(1)])
    aims = prepared.targets.flip(1)
    there = task.head.loss(task.backbone(turned).hidden, COMPLEMENT[aims].where(aims >= 0, -1))
    near(there.flip(1), here, 1e-11)


def test_both_strands_are_work_but_no_parameters() -> None:
    plain, both = show(["model=hybrid_small_mlm"]), show(["model=hybrid_small_mlm", "model.backbone.rc=equivariant"])
    assert both.parameters == plain.parameters and both.state is None
    assert both.flops == 2 * plain.flops and both.growing == 2 * plain.growing
