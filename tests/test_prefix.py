"""Prefixes read in both directions: what sees what, against the definition."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from seqlong.layout import SequenceLayout
from seqlong.mixers import GLA, Attention, Bidirectional, Mamba2, Mixer, PrefixAttention, PrefixMixer
from seqlong.mixers.prefix import divided

WIDTH, LENGTH = 16, 24
KINDS = {
    "attention": partial(PrefixAttention, heads=4, kv_heads=2),
    "window": partial(PrefixAttention, heads=2, window=6),
    "mamba2": partial(PrefixMixer, mixer=partial(Mamba2, d_state=8, head_dim=8)),
    "gla": partial(PrefixMixer, mixer=partial(GLA, heads=2)),
}


def made(kind: str) -> Mixer:
    torch.manual_seed(0)
    mixer = KINDS[kind](WIDTH).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def packed() -> tuple[SequenceLayout, list[tuple[int, int, int, int]]]:
    """Two rows: segments ``(row, start, stop, prefix)``, and padding in the second."""
    cuts = [(0, 0, 10, 4), (0, 10, 24, 14), (1, 0, 7, 0), (1, 7, 20, 5)]
    ids, prefix = torch.zeros(2, LENGTH, dtype=torch.int32), torch.zeros(2, LENGTH, dtype=torch.bool)
    for number, (row, start, stop, size) in enumerate(cuts):
        ids[row, start:stop] = number + 1
        prefix[row, start : start + size] = True
    return replace(SequenceLayout.build(2, LENGTH, ids), prefix=prefix), cuts


def seen(mixer: Mixer, hidden: Tensor, layout: SequenceLayout, row: int) -> Tensor:
    """``(t t)`` which position's result depends on which input."""
    hidden = hidden.clone().requires_grad_()
    out = mixer(hidden, layout)[0]
    return torch.stack(
        [
            torch.autograd.grad(out[row, t].sum(), hidden, retain_graph=True)[0][row].abs().sum(-1) > 1e-13
            for t in range(LENGTH)
        ]
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_prefix_sees_itself_whole_and_nothing_else_sees_what_comes(kind: str) -> None:
    mixer, (layout, cuts) = made(kind), packed()
    hidden = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    near = 6 if kind == "window" else LENGTH
    for row in (0, 1):
        wanted = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
        for here, start, stop, size in cuts:
            if here == row:
                wanted[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
                wanted[start : start + size, start : start + size] = True
        distance = torch.arange(LENGTH)
        wanted &= (distance[:, None] - distance).abs() < near
        held = layout.segment_ids[row] != 0
        assert torch.equal(seen(mixer, hidden, layout, row)[held], wanted[held])


@pytest.mark.parametrize("kind", list(KINDS))
def test_packed_prefixes_are_those_of_each_segment_alone(kind: str) -> None:
    mixer, (layout, cuts) = made(kind), packed()
    hidden = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    together = mixer(hidden, layout)[0]
    for row, start, stop, size in cuts:
        alone = SequenceLayout.build(1, stop - start)
        alone = replace(alone, prefix=torch.arange(stop - start)[None] < size)
        part = mixer(hidden[row : row + 1, start:stop], alone)[0][0]
        assert (together[row, start:stop] - part).abs().max() < 1e-10


def test_a_row_that_is_all_prefix_is_a_model_of_both_sides() -> None:
    hidden = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    layout = SequenceLayout.build(2, LENGTH)
    whole = replace(layout, prefix=torch.ones(2, LENGTH, dtype=torch.bool))
    for kind, peer in (
        ("attention", Attention(WIDTH, heads=4, kv_heads=2, causal=False)),
        ("gla", Bidirectional(WIDTH, partial(GLA, heads=2), tied=True)),
    ):
        mixer, peer = made(kind), peer.double()
        values = {name.replace("mixer.", "forward_mixer."): value for name, value in mixer.state_dict().items()}
        peer.load_state_dict(values)
        assert (mixer(hidden, whole)[0] - peer(hidden, layout)[0]).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["attention", "mamba2"])
def test_a_prompt_is_prefilled_both_ways_and_continued(kind: str) -> None:
    """The state after a prompt that was read both ways is that of the causal reading of it: what follows goes on."""
    mixer = made(kind)
    hidden = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    prefix = torch.arange(LENGTH)[None] < 9
    whole = mixer(hidden, replace(SequenceLayout.build(1, LENGTH), prefix=prefix))[0]
    first = replace(SequenceLayout.build(1, 9), prefix=prefix[:, :9])
    head, state = mixer(hidden[:, :9], first, mixer.initial_state(1, "cpu", torch.float64))
    after = SequenceLayout.build(1, LENGTH - 9, offset=torch.tensor([9]))
    tail, _ = mixer(hidden[:, 9:], after, state)
    assert (torch.cat([head, tail], dim=1) - whole).abs().max() < 1e-10


def test_a_prefix_behind_a_cache_is_refused() -> None:
    mixer = made("attention")
    hidden = torch.randn(1, 4, WIDTH, dtype=torch.float64)
    _, state = mixer(hidden, SequenceLayout.build(1, 4), mixer.initial_state(1, "cpu", torch.float64))
    layout = SequenceLayout.build(1, 4, offset=torch.tensor([4]))
    with pytest.raises(ValueError, match="one window"):
        mixer(hidden, replace(layout, prefix=torch.ones(1, 4, dtype=torch.bool)), state)


def test_segments_are_cut_behind_their_prefix() -> None:
    layout, _ = packed()
    parts = divided(layout, layout.prefix)
    assert parts.boundaries == [[(0, 4), (4, 10), (10, 24)], [(0, 7), (7, 12), (12, 20)]]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (partial(PrefixMixer, mixer=partial(Attention, heads=2)), "take PrefixAttention"),
        (partial(PrefixMixer, mixer=partial(Bidirectional, mixer=partial(GLA, heads=2))), "already sees both"),
    ],
    ids=["attention", "both"],
)
def test_mixers_that_need_no_wrapping(make: partial, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make(WIDTH)
