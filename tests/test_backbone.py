"""The layout of rows, and the backbone: presets, patterns, streams of windows, initial weights, long rows."""

from __future__ import annotations

import importlib
import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.ffn import MoE, SwiGLU
from seqlong.layout import SequenceLayout
from seqlong.mixers import Attention, Bidirectional, Mamba2

MIXERS = {
    "m": partial(Mamba2, d_state=8, head_dim=8),
    "a": partial(Attention, heads=4),
    "w": partial(Attention, heads=4, window=6, positions="alibi"),
}
PRESETS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs" / "model").glob("*.yaml"))}
SIZES = {
    "hybrid_small": 0.8e6, "transformer_small": 0.8e6, "mamba2_small": 0.8e6, "hybrid_small_mlm": 0.8e6,
    "hybrid_medium": 25e6, "transformer_medium": 25e6, "mamba2_medium": 25e6,
    "hybridna_300m": 300e6, "transformer_300m": 300e6, "mamba2_300m": 300e6,
    "moe_small": 2.1e6, "recall_hybrid": 0.137e6, "hybridna_3b": 3e9, "hybridna_7b": 7e9,
    # Of published shapes; tests/test_show.py holds them against the published counts.
    "linear_moe_2b": 2.32e9, "linear_moe_7b": 7.02e9, "minimax_01": 454.9e9, "gdn_h1": 1.32e9, "gdn_h2": 1.35e9,
    "kimi_linear": 48.8e9, "samba_421m": 0.42e9, "ring_mini_linear": 16.1e9,
    "griffin": 2.68e9, "bamba_9b": 9.25e9, "hunyuan_turbos": 558e9, "hydra": 1.61e9,
    "sambay_3_8b": 3.85e9, "video_codes": 0.708e6, "video_small": 0.163e6, "video_small_masked": 0.163e6,
    "video_text": 0.193e6, "video_text_masked": 0.193e6, "motifs": 0.055e6,
}  # fmt: skip


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def test_layout_of_packed_rows() -> None:
    layout = SequenceLayout.build(2, 6, ids([1, 1, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1]))
    assert layout.positions.tolist() == [[0, 1, 0, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert layout.starts is not None and layout.starts.nonzero().tolist() == [[0, 2], [0, 3]]
    assert layout.lengths.tolist() == [5, 6]
    assert layout.boundaries == [[(0, 2), (2, 3), (3, 5)], [(0, 6)]]


def test_a_slice_knows_whether_it_begins_a_segment() -> None:
    layout = SequenceLayout.build(1, 6, ids([1, 1, 2, 2, 2, 0]))
    for start, begins in ((1, False), (2, True), (3, False), (5, False)):
        starts = layout.slice(start, 6).starts
        assert starts is not None and bool(starts[0, 0]) is begins
    assert layout.slice(2, 6).slice(0, 2).starts is not None
    assert bool(layout.slice(2, 6).slice(0, 2).starts[0, 0])  # type: ignore[index]


def test_positions_go_on_from_the_window_before_in_the_first_segment_only() -> None:
    layout = SequenceLayout.build(2, 4, ids([1, 1, 2, 2], [1, 1, 1, 0]), offset=torch.tensor([10, 0]))
    assert layout.positions.tolist() == [[10, 11, 0, 1], [0, 1, 2, 0]]
    far = SequenceLayout.build(1, 3, offset=torch.tensor([2**40]))
    assert far.positions.tolist() == [[2**40 + i for i in range(3)]]


def test_reversing_keeps_padding_at_the_end_and_is_its_own_inverse() -> None:
    layout = SequenceLayout.build(2, 5, ids([1, 2, 2, 0, 0], [1, 1, 1, 1, 1]))
    rows = torch.arange(20).view(2, 5, 2)
    assert layout.reverse(rows)[0, :, 0].tolist() == [4, 2, 0, 6, 8]
    assert torch.equal(layout.reverse(layout.reverse(rows)), rows)
    assert layout.reversed.boundaries == [[(0, 2), (2, 3)], [(0, 5)]]


def build(node: Any) -> Any:
    """What jsonargparse makes of class_path and init_args."""
    if isinstance(node, dict) and "class_path" in node:
        module, name = node["class_path"].rsplit(".", 1)
        arguments = {key: build(value) for key, value in node.get("init_args", {}).items()}
        return partial(getattr(importlib.import_module(module), name), **arguments)
    return {key: build(value) for key, value in node.items()} if isinstance(node, dict) else node


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_size_of_their_name(name: str) -> None:
    settings = yaml.safe_load(PRESETS[name].read_text())["backbone"]
    settings["mixers"] = {letter: build(mixer) for letter, mixer in settings["mixers"].items()}
    settings.update({key: build(settings[key]) for key in ("ffn", "ffns", "patches") if key in settings})
    with torch.device("meta"):
        backbone = Backbone(BackboneConfig(**settings))
    size = sum(parameter.numel() for parameter in backbone.parameters())
    assert abs(size - SIZES[name]) < 0.06 * SIZES[name]
    if name.startswith("hybridna"):
        assert set(backbone.letters[3::8]) == {"a"} and backbone.letters.count("m") == 7 * backbone.letters.count("a")


def test_every_preset_is_tested() -> None:
    assert set(PRESETS) == set(SIZES) | {"pretrain_cpu", "pretrain_gpu"}


def test_the_pattern_repeats_up_to_the_layers() -> None:
    assert BackboneConfig(pattern="mm a", mixers=MIXERS).letters() == "mma"
    assert BackboneConfig(pattern="mma", layers=7, mixers=MIXERS).letters() == "mmammam"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"pattern": "mmx"}, r"'mmx' has 'x' at block 3, but backbone\.mixers defines 'm', 'a', 'w'"),
        ({"pattern": "  "}, r"pattern is empty; give one letter a block"),
        ({"pattern": "m", "layers": 0}, r"layers must be at least 1, found 0"),
        ({"pattern": "m", "checkpointing": "tiled", "tile": 0}, r"tile must be at least 1 position, found 0"),
        ({"pattern": "m", "d_model": 30}, r"backbone\.mixers\.m: Mamba2 needs expand \* d_model divisible by head_dim"),
        ({"pattern": "a", "d_model": 30}, r"backbone\.mixers\.a: Attention needs d_model divisible by heads"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Backbone(BackboneConfig(**{"d_model": 16, "mixers": MIXERS, **settings}))


def test_a_letter_has_a_feed_forward_of_its_own() -> None:
    """A dense first block, experts in every other, none in the rest: two letters of one mixer differ in them."""
    moe = partial(MoE, experts=4, active=2, d_hidden=8)
    mixers: Any = {letter: partial(Attention, heads=2) for letter in "dem"}
    config = BackboneConfig(vocab_size=8, d_model=16, pattern="demem", mixers=mixers, ffns={"e": moe, "m": None})
    torch.manual_seed(0)
    backbone = Backbone(config)
    assert [type(block.ffn) for block in backbone.blocks] == [SwiGLU, MoE, type(None), MoE, type(None)]
    aux = backbone.train()(SequenceBatch(torch.randint(8, (2, 9)))).aux
    assert {name.split("/")[1] for name in aux if "/" in name} == {"2", "4"}
    writers = [block.residual_projections() for block in backbone.blocks]
    assert [len(found) for found in writers] == [2, 3, 1, 3, 1]  # experts write twice: chosen and shared


@pytest.mark.parametrize("checkpointing", ["none", "block", "tiled"])
def test_each_half_adds_to_its_input_or_to_the_norm_of_it(checkpointing: Any) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 16, (2, 11))
    for residual in ("input", "norm"):
        ffns: Any = {"w": partial(MoE, experts=4, active=2, d_hidden=8)}  # experts have a way of their own
        shape: Any = {"pattern": "mw", "mixers": MIXERS, "ffns": ffns, "residual": residual}
        model = Backbone(BackboneConfig(d_model=16, checkpointing=checkpointing, tile=4, **shape)).double()
        hidden, layout = model.embedding(tokens), SequenceLayout.build(2, 11)
        for block in model.blocks:
            normed = block.mixer_norm(hidden)
            hidden = (hidden if residual == "input" else normed) + block.mixer(normed, layout)[0]
            normed = block.ffn_norm(hidden)
            fed = block.ffn(normed, layout)[0] if block.routed else block.ffn(normed)
            hidden = (hidden if residual == "input" else normed) + fed
        found = model(SequenceBatch(tokens=tokens)).hidden
        torch.testing.assert_close(found, model.norm(hidden), rtol=1e-9, atol=1e-9)


def test_a_feed_forward_for_a_letter_that_is_not_there() -> None:
    mixers: Any = {"a": partial(Attention, heads=2)}
    with pytest.raises(ConfigError, match=r"backbone\.ffns\.b is for no block: backbone\.mixers defines 'a'"):
        Backbone(BackboneConfig(d_model=16, pattern="a", mixers=mixers, ffns={"b": None}))
    chosen: Any = {"a": partial(MoE, choice="expert")}
    with pytest.raises(ConfigError, match=r"set backbone\.ffns\.a\.init_args\.choice=token"):
        Backbone(BackboneConfig(d_model=16, pattern="a", mixers=mixers, ffns=chosen))


def test_a_stream_of_windows_is_the_whole_row_and_a_row_that_does_not_continue_starts_afresh() -> None:
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(d_model=16, pattern="maw", mixers=MIXERS)).double()
    tokens = torch.randint(0, 16, (2, 30))
    whole = model(SequenceBatch(tokens=tokens)).hidden
    assert model(SequenceBatch(tokens=tokens)).state is None
    state, outputs = model.initial_state(2, "cpu", torch.float64), []
    for a, z in itertools.pairwise([0, 11, 12, 30]):
        result = model(SequenceBatch(tokens=tokens[:, a:z]), state)
        state = result.state
        outputs.append(result.hidden)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-10, atol=1e-10)
    assert state is not None and state.position.tolist() == [30, 30]
    mixed = model(SequenceBatch(tokens=tokens, continues=torch.tensor([False, True])), state.detach())
    torch.testing.assert_close(mixed.hidden[0], whole[0], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(mixed.hidden[1], whole[1])
    assert mixed.state is not None and mixed.state.position.tolist() == [30, 60]


def test_bidirectional_mixers_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="already sees both sides"):
        Bidirectional(16, partial(Attention, heads=4, causal=False))
    model = Backbone(BackboneConfig(d_model=16, pattern="b", mixers={"b": partial(Bidirectional, mixer=MIXERS["m"])}))
    with pytest.raises(ValueError, match="needs the whole row"):
        model.initial_state(1, "cpu", torch.float32)


def test_initial_weights_are_those_of_the_sources() -> None:
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(d_model=256, pattern="m", layers=8, mixers={"m": Mamba2}))
    assert abs(model.embedding.weight.std().item() - 0.02) < 0.002
    mixer = model.blocks[0].mixer
    rate, step = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert rate.min() >= 1 and rate.max() <= 16 and torch.equal(mixer.D, torch.ones_like(mixer.D))
    assert step.min() >= 1e-4 * 0.999 and step.max() <= 0.1 * 1.001
    usual = 1 / math.sqrt(3 * 512)  # deviation of torch's own initial weights for 512 inputs
    assert abs(mixer.out_proj.weight.std().item() - usual / math.sqrt(2 * 8)) < 0.05 * usual


def test_a_row_of_131072_tokens_goes_forward_and_backward_in_tiles() -> None:
    mixers = {"m": partial(Mamba2, d_state=4, head_dim=8, expand=1), "w": MIXERS["w"]}
    model = Backbone(BackboneConfig(d_model=8, pattern="mw", mixers=mixers, checkpointing="tiled", tile=16384))
    model.blocks[1].mixer.window = 64
    tokens = torch.randint(0, 16, (1, 131072))
    hidden = model(SequenceBatch(tokens=tokens)).hidden
    hidden[:, -1].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    near = model(SequenceBatch(tokens=tokens[:, -3000:])).hidden  # Mamba2 at its initial rates has forgotten the rest
    torch.testing.assert_close(hidden[:, -50:], near[:, -50:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("checkpointing", ["none", "block", "tiled"])
def test_a_residual_stream_in_half_precision(checkpointing: str) -> None:
    """Every block sees bfloat16 under autocast, and the same weights give nearly the same; else nothing changes."""
    outputs = {}
    for whole in (True, False):
        torch.manual_seed(0)
        config = BackboneConfig(vocab_size=16, d_model=32, pattern="mma", mixers=MIXERS, tile=8,
                                checkpointing=checkpointing, residual_in_fp32=whole)  # type: ignore[arg-type] # fmt: skip
        backbone = Backbone(config)
        seen: list[torch.dtype] = []
        for block in backbone._blocks():
            block.mixer_norm.register_forward_hook(lambda _module, given, _out, seen=seen: seen.append(given[0].dtype))
        batch = SequenceBatch(tokens=torch.randint(0, 16, (2, 20), generator=torch.Generator().manual_seed(1)))
        with torch.autocast("cpu", torch.bfloat16):
            outputs[whole] = backbone(batch).hidden
        assert set(seen) == {torch.float32 if whole else torch.bfloat16}
        outputs[whole].float().square().sum().backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in backbone.parameters())
        assert backbone(batch).hidden.dtype == torch.float32
    difference = (outputs[True].float() - outputs[False].float()).norm() / outputs[True].float().norm()
    assert 0 < difference < 2e-2
