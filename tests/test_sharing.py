"""Blocks that read what an earlier block publishes: against definitions, by the mixers' laws, through checkpointing."""

from __future__ import annotations

import inspect
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import seqlong.mixers
from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.block import Block
from seqlong.cost import _tensors, mixer_cost, products
from seqlong.errors import ConfigError
from seqlong.layout import SequenceLayout
from seqlong.mixers import (
    GLA,
    Attention,
    Bidirectional,
    GatedDeltaNet,
    GatedMemoryUnit,
    LogLinearMamba2,
    Mamba1,
    Mamba2,
    Mixer,
    PrefixMixer,
    SharedAttention,
)

WIDTH = 16
MAMBA = partial(Mamba1, d_state=4, dt_rank=3)
FULL = partial(Attention, heads=4, kv_heads=2)
SHARED = partial(SharedAttention, heads=4)
#: Name -> pattern, mixers, reads.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "yoco": ("wacc", {"w": partial(Attention, heads=2, window=4), "a": FULL, "c": SHARED}, {"c": "a"}),
    "yoco_nope": (
        "mac",
        {"m": MAMBA, "a": partial(FULL, positions="none", qk_norm=True, gate=True),
         "c": partial(SharedAttention, heads=2, head_dim=4, bias=True)},
        {"c": "a"},
    ),
    "sambay": ("mwmagcgc", {"m": MAMBA, "w": partial(Attention, heads=2, window=3, positions="none"), "a": FULL,
                            "g": GatedMemoryUnit, "c": SHARED}, {"g": "m", "c": "a"}),
    "mamba2": ("mgg", {"m": partial(Mamba2, d_state=4, head_dim=8), "g": GatedMemoryUnit}, {"g": "m"}),
    "mamba2_recompute": (
        "mg", {"m": partial(Mamba2, d_state=4, head_dim=8, recompute=True), "g": GatedMemoryUnit}, {"g": "m"}
    ),
    "gla": ("lgm", {"l": partial(GLA, heads=2), "m": MAMBA, "g": partial(GatedMemoryUnit, width=16, bias=True)},
            {"g": "l"}),
    "gated_deltanet": (
        "dg", {"d": partial(GatedDeltaNet, heads=2, head_dim=6), "g": partial(GatedMemoryUnit, width=24)}, {"g": "d"}
    ),
}  # fmt: skip


def build(name: str, **more: Any) -> Backbone:
    torch.manual_seed(1)
    pattern, mixers, reads = MODELS[name]
    backbone = Backbone(BackboneConfig(8, WIDTH, pattern, mixers, reads=reads, **more)).double()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return backbone


def tokens(length: int, rows: int = 2) -> Tensor:
    return torch.randint(0, 8, (rows, length), generator=torch.Generator().manual_seed(length))


def begin(backbone: Backbone, rows: int = 2) -> Any:
    return backbone.initial_state(rows, "cpu", torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def spied(backbone: Backbone, batch: SequenceBatch) -> tuple[list[Tensor], dict[int, Tensor]]:
    """What every mixer was given, and what those that read a memory gave."""
    given: list[Tensor] = []
    gave: dict[int, Tensor] = {}
    hooks = []
    for number, block in enumerate(backbone.blocks):
        assert isinstance(block, Block)
        hooks.append(block.mixer_norm.register_forward_hook(lambda _, __, out: given.append(out)))
        hooks.append(block.mixer.register_forward_hook(lambda _, __, out, n=number: gave.update({n: out[0]})))
    backbone(batch)
    for hook in hooks:
        hook.remove()
    return given, gave


# --- definitions -----------------------------------------------------------------------------------------------------


def rotated(x: Tensor, place: int) -> Tensor:
    """One head's vector at ``place``, its two halves being the two parts of complex numbers."""
    half = len(x) // 2
    turn = torch.polar(torch.ones(half).double(), place * 10000.0 ** (-torch.arange(half).double() / half))
    turned = torch.complex(x[:half], x[half:]) * turn
    return torch.cat([turned.real, turned.imag])


@pytest.mark.parametrize(("name", "source", "reader"), [("yoco", 1, 3), ("sambay", 3, 5), ("sambay", 3, 7)])
def test_shared_attention_is_its_definition(name: str, source: int, reader: int) -> None:
    backbone = build(name)
    given, gave = spied(backbone, SequenceBatch(tokens=tokens(9, 1)))
    publisher, mixer = (backbone.blocks[n].mixer for n in (source, reader))
    assert isinstance(publisher, Attention) and isinstance(mixer, SharedAttention)
    _, k, v = publisher.qkv_proj(given[source][0]).split([16, 8, 8], dim=-1)
    q = mixer.q_proj(given[reader][0])
    for t in range(9):
        heads = []
        for head in range(4):
            mine, theirs = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
            query = rotated(q[t, mine], t)
            scores = torch.stack([query @ rotated(k[j, theirs], j) / 2 for j in range(t + 1)]).softmax(0)
            heads.append(scores @ v[: t + 1, theirs])
        close(gave[reader][0, t], mixer.out_proj(torch.cat(heads)))


def test_a_gated_memory_unit_reads_what_stands_before_the_gate() -> None:
    for name, source, reader in (("sambay", 2, 4), ("sambay", 2, 6), ("mamba2", 0, 2), ("gla", 0, 1)):
        backbone = build(name)
        given, gave = spied(backbone, SequenceBatch(tokens=tokens(11)))
        publisher, mixer = (backbone.blocks[n].mixer for n in (source, reader))
        assert isinstance(publisher, Mixer) and isinstance(mixer, GatedMemoryUnit)
        layout = SequenceLayout.build(2, 11)
        output, _, memory = publisher.publish(given[source], layout)
        close(publisher(given[source], layout)[0], output)
        if isinstance(publisher, Mamba1):
            rest = memory * F.silu(publisher.in_proj(given[source]).chunk(2, dim=-1)[1])
        elif isinstance(publisher, Mamba2):
            z = publisher.in_proj(given[source])[..., : publisher.d_inner]
            rest = publisher.norm(memory * F.silu(z))
        else:
            assert isinstance(publisher, GLA)
            rest = publisher.norm(memory.unflatten(2, (2, -1))).flatten(2) * F.silu(publisher.gate_proj(given[source]))
        close(publisher.out_proj(rest), output)
        gate = given[reader] @ mixer.in_proj.weight.T + (0 if mixer.in_proj.bias is None else mixer.in_proj.bias)
        close(gave[reader], mixer.out_proj(memory * gate * torch.sigmoid(gate)))


# --- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cuts", [[1] * 23, [7, 16], [0, 1, 11, 11]])
def test_split_anywhere_is_the_whole_and_so_is_token_by_token(name: str, cuts: list[int]) -> None:
    backbone, x = build(name), tokens(23)
    whole, state, parts, start = backbone(SequenceBatch(tokens=x)).hidden, begin(backbone), [], 0
    with torch.no_grad():
        for size in cuts:
            output = backbone(SequenceBatch(tokens=x[:, start : start + size]), state)
            state, start = output.state, start + size
            parts.append(output.hidden)
    close(torch.cat(parts, dim=1), whole)
    for reader in backbone.sources:
        assert list(_tensors(state.blocks[reader])) == [], "the cache is carried once"


SEGMENTS = torch.tensor([[1] * 9 + [2] * 14, [1] * 4 + [2] * 3 + [3] * 10 + [0] * 6], dtype=torch.int32)


@pytest.mark.parametrize("name", MODELS)
def test_packed_segments_are_as_if_separate_and_padding_changes_nothing(name: str) -> None:
    backbone, x = build(name), tokens(23)
    whole = backbone(SequenceBatch(tokens=x, segment_ids=SEGMENTS)).hidden
    for row, (a, z) in [(0, (0, 9)), (0, (9, 23)), (1, (0, 4)), (1, (4, 7)), (1, (7, 17))]:
        close(whole[row : row + 1, a:z], backbone(SequenceBatch(tokens=x[row : row + 1, a:z])).hidden)
    other = x.clone()
    other[1, 17:] = (other[1, 17:] + 1) % 8
    again = backbone(SequenceBatch(tokens=other, segment_ids=SEGMENTS)).hidden
    close(again[SEGMENTS > 0], whole[SEGMENTS > 0])
    for cuts in ([5, 18], [1] * 23):
        state, parts, start = begin(backbone), [], 0
        for size in cuts:
            stop = start + size
            ids = SEGMENTS[:, start:stop]
            continues = torch.ones(2, dtype=torch.bool) if start == 0 else SEGMENTS[:, start] == SEGMENTS[:, start - 1]
            output = backbone(SequenceBatch(x[:, start:stop], segment_ids=ids, continues=continues), state)
            state, start = output.state, stop
            parts.append(output.hidden)
        close(torch.cat(parts, dim=1)[SEGMENTS > 0], whole[SEGMENTS > 0])


@pytest.mark.parametrize("name", MODELS)
def test_no_token_sees_a_later_one(name: str) -> None:
    backbone, x = build(name), tokens(13)
    other = x.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 8
    a, b = (backbone(SequenceBatch(tokens=y)).hidden for y in (x, other))
    close(a[:, :8], b[:, :8])
    assert (a[:, 8:] != b[:, 8:]).any(dim=-1).all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_checkpointing_changes_memory_only(name: str, packed: bool, carried: bool) -> None:
    expected = None
    for mode in ("none", "selective", "block", "tiled"):
        backbone = build(name, checkpointing=mode, tile=4)
        batch = SequenceBatch(tokens=tokens(23), segment_ids=SEGMENTS if packed else None)
        state = backbone(SequenceBatch(tokens=tokens(5)), begin(backbone)).state if carried else None
        hidden = backbone(batch, state).hidden
        hidden = hidden[SEGMENTS > 0] if packed else hidden
        (hidden.square() * torch.linspace(0, 1, hidden.numel()).view_as(hidden)).sum().backward()
        found = {"hidden": hidden.detach(), **{n: p.grad for n, p in backbone.named_parameters()}}
        assert all(value is not None for value in found.values())
        expected = expected or found
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-7, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
        with torch.no_grad():
            again = backbone(batch, state).hidden
            close(again[SEGMENTS > 0] if packed else again, expected["hidden"])


@pytest.mark.parametrize("name", ["yoco", "sambay"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    backbone = build(name, ffn=None)

    def run(weight: Tensor) -> Tensor:
        swapped = {"embedding.weight": weight}
        return torch.func.functional_call(backbone, swapped, (SequenceBatch(tokens=tokens(5, 1)),)).hidden

    weight = backbone.embedding.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (weight,), fast_mode=True)


def test_the_publisher_learns_from_its_readers() -> None:
    """Keys and values of a publisher whose own output is switched off."""
    backbone = build("yoco")
    publisher = backbone.blocks[1].mixer
    assert isinstance(publisher, Attention)
    torch.nn.init.zeros_(publisher.out_proj.weight)
    backbone(SequenceBatch(tokens=tokens(7))).hidden.square().sum().backward()
    assert publisher.qkv_proj.weight.grad is not None
    by_part = publisher.qkv_proj.weight.grad.split([16, 8, 8])
    assert not by_part[0].any() and by_part[1].any() and by_part[2].any()


@pytest.mark.parametrize("training", [True, False])
def test_memories_are_cut_with_the_tiles(training: bool) -> None:
    backbone = build("sambay", checkpointing="tiled", tile=4)
    seen: dict[str, set[int]] = {"GatedMemoryUnit": set(), "SharedAttention": set()}
    for block in backbone.blocks:
        assert isinstance(block, Block)
        if block.mixer.reads_memory:
            block.mixer.register_forward_hook(lambda m, args, _: seen[type(m).__name__].add(args[0].shape[1]))
    with torch.set_grad_enabled(training):
        backbone(SequenceBatch(tokens=tokens(10)))
    assert seen == {"GatedMemoryUnit": {4, 2}, "SharedAttention": {10}}


def test_mixed_precision_runs_and_stays_near() -> None:
    backbone = build("sambay").float()
    batch = SequenceBatch(tokens=tokens(23))
    exact = backbone(batch).hidden
    with torch.autocast("cpu", torch.bfloat16):
        rough = backbone(batch).hidden
        state = backbone(batch, backbone.initial_state(2, "cpu", torch.bfloat16)).state
        assert backbone(SequenceBatch(tokens=tokens(1)), state).hidden.isfinite().all()
    assert 0 < (rough - exact).abs().mean() < 0.05 * exact.abs().mean()


# --- who reads whom, and at what cost --------------------------------------------------------------------------------


def test_a_block_reads_the_last_of_a_letter_before_it_and_nobody_else_publishes() -> None:
    backbone = build("sambay")
    assert backbone.sources == {4: 2, 6: 2, 5: 3, 7: 3}
    assert [number for number, block in enumerate(backbone.blocks) if block.publishes] == [2, 3]
    mixers: dict[str, Any] = {"m": MAMBA, "g": GatedMemoryUnit}
    assert Backbone(BackboneConfig(8, WIDTH, "mg", mixers, layers=4, reads={"g": "m"})).sources == {1: 0, 3: 2}


def test_costs_are_those_of_running_mixers() -> None:
    backbone = build("sambay")
    state = backbone(SequenceBatch(tokens=tokens(23)), begin(backbone)).state
    layout = SequenceLayout.build(1, 24)
    publisher, unit, shared = (backbone.blocks[number].mixer for number in (3, 4, 5))
    assert isinstance(publisher, Mixer) and isinstance(unit, Mixer) and isinstance(shared, Mixer)
    _, _, keys = publisher.publish(torch.randn(1, 24, WIDTH).double(), layout)
    for number, mixer, memory in ((4, unit, torch.randn(1, 24, 32).double()), (5, shared, keys)):
        cost = mixer_cost(mixer, 24)
        assert cost.state == sum(x.numel() for x in _tensors(state.blocks[number])) == 0
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            mixer(torch.randn(1, 24, WIDTH).double(), layout, None, memory)
        counts = counter.get_flop_counts()["Global"]
        linear = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
        assert linear == 24 * products(mixer)[0].flops
    attention = [term for term in mixer_cost(shared, 24).terms if term.what == "attention"]
    assert attention[0].flops == 4 * WIDTH * 12.5 and attention[0].grows
    assert [term.what for term in mixer_cost(unit, 24).terms] == ["products"]


@pytest.mark.parametrize(
    ("pattern", "mixers", "reads", "complaint"),
    [
        ("mg", {}, {}, r"mixers\.g: block 2 is GatedMemoryUnit, .*; set backbone\.reads\.g to that block's letter"),
        ("gm", {}, {"g": "m"}, r"reads\.g: block 1 reads 'm', but no block before it is one; put a 'm' earlier"),
        ("mg", {}, {"g": "x"}, r"reads has 'x', but backbone\.mixers defines 'm'"),
        ("mg", {}, {"x": "m"}, r"reads has 'x'"),
        ("mm", {}, {"m": "m"}, r"reads\.m: block 1 is Mamba1, which reads no other block's memory; take reads\.m out"),
        ("ag", {}, {"g": "a"}, r"block 2 reads block 1: GatedMemoryUnit reads the output of a recurrence, which Att"),
        ("mg", {"g": partial(GatedMemoryUnit, width=9)}, {"g": "m"}, r"publishes 32; set width=32"),
        ("mg", {"m": partial(LogLinearMamba2, d_state=4, head_dim=8)}, {"g": "m"}, "LogLinearMamba2 does not publish"),
        ("mg", {"m": partial(Bidirectional, mixer=MAMBA)}, {"g": "m"}, "Bidirectional does not publish"),
        ("mc", {}, {"c": "m"}, r"SharedAttention reads keys and values of Attention, found Mamba1"),
        ("ac", {"a": partial(Attention, window=4)}, {"c": "a"}, "window=null"),
        ("ac", {"a": partial(Attention, positions="alibi")}, {"c": "a"}, "positions=alibi"),
        ("ac", {"a": partial(Attention, causal=False)}, {"c": "a"}, "causal=False"),
        ("ac", {"c": partial(SharedAttention, heads=8)}, {"c": "a"}, r"8 heads of 2, but reads 2 of 4; set head_dim=4"),
        ("ac", {"c": partial(SharedAttention, heads=3, head_dim=4)}, {"c": "a"}, "heads to a multiple of 2"),
        ("ac", {"c": partial(SharedAttention, heads=3)}, {"c": "a"}, r"mixers\.c: SharedAttention needs d_model"),
        ("mg", {"g": partial(GatedMemoryUnit, width=0)}, {"g": "m"}, r"mixers\.g: GatedMemoryUnit needs a width"),
    ],
)
def test_mistakes_are_told(pattern: str, mixers: dict[str, Any], reads: dict[str, str], complaint: str) -> None:
    known = {"m": MAMBA, "a": FULL, "g": GatedMemoryUnit, "c": SHARED, **mixers}
    with pytest.raises(ConfigError, match=complaint):
        Backbone(BackboneConfig(8, WIDTH, pattern, known, reads=reads))


@pytest.mark.parametrize("reader", [GatedMemoryUnit, SHARED])
def test_a_reader_alone_says_what_it_lacks(reader: Any) -> None:
    with pytest.raises(ValueError, match=r"backbone\.reads"):
        reader(WIDTH)(torch.randn(1, 3, WIDTH), SequenceLayout.build(1, 3))
    with pytest.raises(NotImplementedError, match="publishes no memory"):
        reader(WIDTH).publish(torch.randn(1, 3, WIDTH), SequenceLayout.build(1, 3))


@pytest.mark.parametrize("name", sorted(seqlong.mixers.__all__))
def test_every_mixer_that_has_a_width_of_memory_publishes_it(name: str) -> None:
    kind = getattr(seqlong.mixers, name)
    if not inspect.isclass(kind) or not issubclass(kind, Mixer) or kind in (Mixer, Bidirectional, PrefixMixer):
        return
    mixer, layout = kind(64), SequenceLayout.build(2, 5)
    hidden = torch.randn(2, 5, 64)
    if mixer.memory_width is not None:
        output, state, memory = mixer.publish(hidden, layout)
        assert memory.shape == (2, 5, mixer.memory_width) and state is None
        torch.testing.assert_close(output, mixer(hidden, layout)[0])
    else:
        with pytest.raises(ValueError, match=f"which {name} does not publish"):
            GatedMemoryUnit(64).bind(mixer)


def compile_blocks() -> None:
    """Each traced whole, forward and backward."""
    results = []
    for compiled in (False, True):
        backbone = build("sambay")
        for block in backbone.blocks if compiled else ():
            block.compile(backend="aot_eager", fullgraph=True)
        hidden = backbone(SequenceBatch(tokens=tokens(9))).hidden
        results.append([hidden, *torch.autograd.grad(hidden.square().sum(), list(backbone.parameters()))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    print("compiled")


def test_blocks_that_publish_and_read_compile() -> None:
    """In a process of its own: shapes checked at run time cannot be traced."""
    code = f"import runpy; runpy.run_path({str(Path(__file__))!r})['compile_blocks']()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "compiled\n", done.stderr[-3000:]
