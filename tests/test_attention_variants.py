"""Attention variants against dense definitions in float64, and positions on several axes."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqlong.kernels import runtime
from seqlong.kernels.attention import attention, summary_attention
from seqlong.kernels.attention import op as attention_op
from seqlong.kernels.block_attention import block_attention, choose_blocks, gathered
from seqlong.layout import SequenceLayout
from seqlong.mixers import (
    Attention,
    Bidirectional,
    CosFormer2,
    DifferentialAttention,
    GatedMemoryUnit,
    Mixer,
    MoBA,
    NativeSparseAttention,
    Rat,
    Scout,
)
from seqlong.positions import lrpe, rotary, rotary_axes

WIDTH = 16
IDS = torch.tensor([[1] * 9 + [2] + [3] * 31 + [0] * 6, [1] * 3 + [2] * 44], dtype=torch.int32)


def shaken(mixer: Mixer) -> Mixer:
    """In float64, its parameters away from their initial values."""
    mixer = mixer.double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def places(ids: Tensor) -> Tensor:
    """Each token's place in its segment, by a loop."""
    found = torch.zeros(ids.shape, dtype=torch.int64)
    for row, step in itertools.product(range(ids.shape[0]), range(1, ids.shape[1])):
        found[row, step] = found[row, step - 1] + 1 if ids[row, step] == ids[row, step - 1] else 0
    return found


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs (i, i + k/2) of x ``(b t h k)`` as complex numbers, turned by angles ``(b t k/2)``."""
    first, second = x.chunk(2, dim=-1)
    result = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    return torch.cat([result.real, result.imag], dim=-1)


def frequencies(width: int, base: float = 10000.0) -> Tensor:
    return base ** (-2 * torch.arange(width // 2).double() / width)


def softmax_over(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Dense attention, ``seen`` (b h i j); k and v shared by groups of heads; a query that sees nothing gets 0."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhij,bjhv->bihv", scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0), v)


def in_windows(mixer: Mixer, hidden: Tensor, layout: SequenceLayout, cuts: list[int]) -> tuple[Tensor, Any]:
    state, outputs = mixer.initial_state(hidden.shape[0], "cpu", hidden.dtype), []
    for a, z in itertools.pairwise(cuts):
        output, state = mixer(hidden[:, a:z], layout.slice(a, z), state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


# --- Attention's options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [5, 512])
@pytest.mark.parametrize(("window", "sinks"), [(4, 1), (1, 3), (7, 9), (60, 2)])
def test_sinks_stay_visible_in_every_segment(window: int, sinks: int, block: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(attention_op, "BLOCK", block)
    torch.manual_seed(0)
    mixer, hidden = shaken(Attention(WIDTH, heads=4, kv_heads=2, window=window, sinks=sinks, positions="none")), None
    hidden = torch.randn(2, 47, WIDTH, dtype=torch.float64)
    place, real = places(IDS), (IDS > 0)[..., None]
    seen = torch.zeros(2, 47, 47, dtype=torch.bool)
    for row, i in itertools.product(range(2), range(47)):
        for j in range(i + 1):
            same = IDS[row, i] == IDS[row, j]
            seen[row, i, j] = bool(same) and (i - j < window or int(place[row, j]) < sinks)
    assert isinstance(mixer, Attention)
    q, k, v = mixer.qkv_proj(hidden).unflatten(2, (-1, 4)).split([4, 2, 2], dim=2)
    expected = mixer.out_proj(softmax_over(q, k, v, seen[:, None]).flatten(2)).where(real, 0)
    layout = SequenceLayout.build(2, 47, IDS)
    close(mixer(hidden, layout)[0].where(real, 0), expected)
    for cuts in ([0, 47], [0, 2, 11, 30, 47], list(range(48))):
        found, state = in_windows(mixer, hidden, layout, cuts)
        close(found.where(real, 0), expected)
        assert state.keys.shape[1] <= window - 1 and state.sink_keys.shape[1] == sinks
    # The op finds the sinks of packed rows by itself too, and has their gradients.
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    target, results = torch.randn(2, 47, 4, 4, dtype=torch.float64) * (IDS > 0)[..., None, None], []
    for implementation, boundaries in (("reference", None), ("blocks", None), ("segments", layout.boundaries)):
        out = attention(
            *leaves, window=window, sinks=sinks, query_ids=IDS, key_ids=IDS, boundaries=boundaries,
            implementation=implementation,
        )  # fmt: skip
        results.append(torch.autograd.grad((out * target).sum(), leaves))
    for found, expected in itertools.product(results[1:], results[:1]):
        for mine, theirs in zip(found, expected, strict=True):
            close(mine, theirs)


def test_sinks_without_segments_are_the_first_tokens_of_the_row() -> None:
    q, k, v = torch.randn(3, 1, 1300, 2, 8, dtype=torch.float64)
    found = attention(q, k, v, window=5, sinks=3)
    steps = torch.arange(1300)
    distance = steps[:, None] - steps
    close(found, softmax_over(q, k, v, ((distance >= 0) & ((distance < 5) | (steps < 3)))[None, None]))


@pytest.mark.parametrize("options", [{"window": None}, {"causal": False, "window": 4}, {"positions": "alibi"}])
def test_sinks_go_with_a_causal_window_only(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sinks"):
        Attention(WIDTH, heads=4, sinks=2, **{"window": 3, **options})
    with pytest.raises(ValueError, match="sinks"):
        attention(*torch.randn(3, 1, 4, 1, 4), sinks=1)


def test_gate_norms_interpolation_and_partial_rotation_by_hand() -> None:
    torch.manual_seed(0)
    mixer = shaken(Attention(WIDTH, heads=2, gate=True, qk_norm=True, partial_rotary=0.75, rope_scale=8.0))
    hidden = torch.randn(2, 19, WIDTH, dtype=torch.float64)
    assert isinstance(mixer, Attention) and mixer.q_norm is not None and mixer.k_norm is not None
    assert isinstance(mixer.gate_proj, nn.Linear)
    q, k, v = mixer.qkv_proj(hidden).unflatten(2, (3, 2, 8)).unbind(2)
    angles = (torch.arange(19).double()[None, :, None] / 8 * frequencies(6)).expand(2, -1, -1)
    q, k = (
        x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        for x, norm in ((q, mixer.q_norm), (k, mixer.k_norm))
    )
    q, k = (torch.cat([turned(x[..., :6], angles), x[..., 6:]], dim=-1) for x in (q, k))
    mixed = softmax_over(q, k, v, torch.ones(19, 19, dtype=torch.bool).tril()[None, None]).flatten(2)
    expected = mixer.out_proj(mixed * torch.sigmoid(mixer.gate_proj(hidden)))
    close(mixer(hidden, SequenceLayout.build(2, 19))[0], expected)


def test_a_gate_of_one_number_a_head_by_hand() -> None:
    torch.manual_seed(0)
    mixer = shaken(Attention(WIDTH, heads=2, gate="head"))
    without = Attention(WIDTH, heads=2).double()
    without.load_state_dict({name: x for name, x in mixer.state_dict().items() if "gate" not in name})
    hidden, layout = torch.randn(2, 19, WIDTH, dtype=torch.float64), SequenceLayout.build(2, 19)
    assert isinstance(mixer, Attention) and isinstance(mixer.gate_proj, nn.Linear)
    assert mixer.gate_proj.out_features == 2
    heads = []
    for head in range(2):
        only = torch.zeros(WIDTH, dtype=torch.float64)
        only[head * WIDTH // 2 : (head + 1) * WIDTH // 2] = 1
        with torch.no_grad():
            weight = without.out_proj.weight.clone()
            without.out_proj.weight *= only
            heads.append(without(hidden, layout)[0] * torch.sigmoid(mixer.gate_proj(hidden))[..., [head]])
            without.out_proj.weight.copy_(weight)
    close(mixer(hidden, layout)[0], heads[0] + heads[1])


@pytest.mark.parametrize("width", [3, 12])
@pytest.mark.parametrize("way", [{}, {"window": 4}, {"causal": False}])
def test_values_of_another_width_than_keys(width: int, way: dict[str, Any]) -> None:
    q, k = torch.randn(2, 2, 21, 2, 8, dtype=torch.float64)
    v = torch.randn(2, 21, 1, width, dtype=torch.float64)
    found = attention(q, k[:, :, :1], v, **way)
    close(found, attention(q, k[:, :, :1], v, **way, implementation="reference"))


# --- positions -------------------------------------------------------------------------------------------------------


def grid(frames: int, height: int, width: int) -> Tensor:
    """Positions of a video, (1 t 3)."""
    axes = (torch.arange(n) for n in (frames, height, width))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)[None]


@pytest.mark.parametrize("code", ["rotary", "lrpe"])
def test_products_depend_on_differences_along_each_axis(code: str) -> None:
    axes, positions = [4, 6, 2], grid(3, 2, 4)
    q, k = torch.randn(2, 1, 24, 2, 12, dtype=torch.float64)

    def products(shift: list[int]) -> Tensor:
        moved = positions + torch.tensor(shift)
        mapped = [rotary_axes(x, moved, axes) if code == "rotary" else lrpe(x, moved, axes) for x in (q, k)]
        return torch.einsum("bihk,bjhk->bhij", *mapped)

    still = products([0, 0, 0])
    for shift in ([7, 0, 0], [0, 100_000, 0], [0, 0, 3], [5, 1_000, 2**31]):
        close(products(shift), still, 1e-8)
    for axis in range(3):  # but one of two tokens that moves alone changes them
        moved = positions.clone()
        moved[:, 5, axis] += 1
        alone = [rotary_axes(x, moved, axes) if code == "rotary" else lrpe(x, moved, axes) for x in (q, k)]
        assert not torch.allclose(torch.einsum("bihk,bjhk->bhij", *alone)[:, :, 5, :5], still[:, :, 5, :5])


def test_one_frame_is_an_image_and_one_pixel_a_text() -> None:
    x = torch.randn(1, 6, 2, 12, dtype=torch.float64)
    image = rotary_axes(x[..., 4:], grid(1, 2, 3)[..., 1:], [4, 4])
    close(rotary_axes(x, grid(1, 2, 3), [4, 4, 4]), torch.cat([x[..., :4], image], dim=-1))
    text = rotary_axes(x, torch.arange(6)[None], [4])
    close(rotary_axes(x, grid(6, 1, 1), [4, 4, 4]), text)
    close(rotary_axes(x, torch.arange(6)[None], [12]), rotary(x, torch.arange(6)[None]))
    same = torch.arange(6)[None, :, None].expand(1, 6, 3)  # a token of text stands at its number on every axis
    close(rotary_axes(x, torch.arange(6)[None], [4, 4, 4]), rotary_axes(x, same, [4, 4, 4]))
    angles = torch.arange(6).double()[None, :, None] * frequencies(4)
    close(rotary_axes(x, same, [4, 4, 4])[..., 8:], turned(x[..., 8:], angles))


def test_places_between_tokens_in_triton() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    reason = runtime.triton_runs_on(torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    positions, results = (torch.arange(5).expand(2, 5) + 1_000_003) / torch.tensor(3.0, dtype=torch.float64), []
    for implementation in ("triton", "reference"):
        out = rotary(x, positions, implementation=implementation)
        results.append([out, *torch.autograd.grad(out.square().cumsum(1).sum(), x)])
    for mine, theirs in zip(*results, strict=True):
        close(mine, theirs, 1e-5)


def test_lrpe_is_a_sum_of_cosines() -> None:
    q, k = torch.rand(2, 1, 24, 1, 8, dtype=torch.float64)
    positions, axes = grid(2, 3, 4), [2, 4, 2]
    mapped = [lrpe(x, positions, axes, turning=0.5) for x in (q, k)]
    assert mapped[0].shape[-1] == 8 + 4
    expected = torch.zeros(24, 24, dtype=torch.float64)
    channel = 0
    for axis, size in enumerate(axes):
        for i in range(size):
            rate = 10000.0 ** (-2 * i / size) if i < size // 2 else 0.0
            away = (positions[0, :, None, axis] - positions[0, None, :, axis]).double()
            expected += q[0, :, None, 0, channel] * k[0, None, :, 0, channel] * (away * rate).cos()
            channel += 1
    close(torch.einsum("ik,jk->ij", mapped[0][0, :, 0], mapped[1][0, :, 0]), expected)
    with pytest.raises(ValueError, match="lrpe needs axes that share the 8 channels"):
        lrpe(q, positions, [4, 2, 4])


@pytest.mark.parametrize(
    "build",
    [
        partial(Attention, heads=2, rope_axes=[4, 4, 2], causal=False),
        partial(Bidirectional, mixer=partial(CosFormer2, heads=2, axes=[4, 4, 4])),
    ],
)
def test_a_mixer_over_a_video_does_not_see_where_it_stands(build: Any) -> None:
    torch.manual_seed(0)
    mixer = shaken(build(24))
    hidden = torch.randn(1, 24, 24, dtype=torch.float64)
    found = [mixer(hidden, SequenceLayout(None, grid(2, 3, 4) + torch.tensor(s)))[0] for s in ([0, 0, 0], [3, 50, 9])]
    close(found[0], found[1])
    other = mixer(hidden, SequenceLayout(None, grid(4, 3, 2)))[0]
    assert not torch.allclose(found[0], other)


def test_reading_backwards_keeps_the_axes() -> None:
    mixer = shaken(Bidirectional(24, mixer=partial(Attention, heads=2, rope_axes=[4, 4, 2]), tied=True))
    hidden, positions = torch.randn(1, 24, 24, dtype=torch.float64), grid(2, 3, 4)
    one = Attention(24, heads=2, rope_axes=[4, 4, 2]).double()
    one.load_state_dict({name.removeprefix("forward_mixer."): x for name, x in mixer.state_dict().items()})
    left = one(hidden.flip(1), SequenceLayout(None, 5 - positions.flip(1)))[0].flip(1)
    close(mixer(hidden, SequenceLayout(None, positions))[0], one(hidden, SequenceLayout(None, positions))[0] + left)
    ids = torch.tensor([[1] * 9 + [2] * 11 + [0] * 4], dtype=torch.int32)
    found = SequenceLayout(ids, positions).reversed.positions
    assert torch.equal(found[0, :20], -positions[0, :20].flip(0)) and torch.equal(found[0, 20:], -positions[0, 20:])


def test_axes_that_do_not_fit_are_refused() -> None:
    for axes in ([3, 4], [8, 6], [0, 2], []):
        with pytest.raises(ValueError, match="even number of channels for each axis"):
            Attention(24, heads=2, rope_axes=axes)
    with pytest.raises(ValueError, match="partial_rotary"):
        Attention(24, heads=2, rope_axes=[4], partial_rotary=0.5)
    assert Attention(24, heads=2, partial_rotary=0.6).axes == [6]
    with pytest.raises(ValueError, match="share the 12 channels"):
        CosFormer2(24, heads=2, axes=[4, 4])


# --- other forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "window"), [(0, None), (5, 4)])
def test_differential_attention_by_hand(layer: int, window: int | None) -> None:
    torch.manual_seed(0)
    mixer = shaken(DifferentialAttention(24, heads=2, kv_heads=1, window=window))
    mixer.place(layer, 9)
    assert isinstance(mixer, DifferentialAttention) and mixer.head_dim == 6
    hidden = torch.randn(2, 17, 24, dtype=torch.float64)
    q, k, v = mixer.qkv_proj(hidden).split([24, 12, 12], dim=-1)
    angles = (torch.arange(17).double()[None, :, None] * frequencies(6)).expand(2, -1, -1)
    steps = torch.arange(17)
    distance = steps[:, None] - steps
    seen = (distance >= 0) & (distance < (window or 99))
    start = 0.8 - 0.6 * math.exp(-0.3 * layer)
    q1, k1, q2, k2 = *mixer.lambda_q, *mixer.lambda_k
    share = torch.exp((q1 * q2).sum()) - torch.exp((k1 * k2).sum()) + start
    heads = []
    for head in range(2):
        maps = []
        for one in range(2):
            query, key = q[..., one * 12 + head * 6 :][..., :6], k[..., one * 6 :][..., :6]
            query, key = (turned(x[:, :, None], angles)[:, :, 0] for x in (query, key))
            maps.append((query @ key.mT / 6**0.5).masked_fill(~seen, -torch.inf).softmax(-1))
        mixed = (maps[0] - share * maps[1]) @ v
        mixed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
        heads.append((1 - start) * mixed)
    close(mixer(hidden, SequenceLayout.build(2, 17))[0], mixer.out_proj(torch.cat(heads, dim=-1)))


def queries_keys_values(mixer: MoBA | NativeSparseAttention, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one segment, rotated."""
    heads, shared, width = mixer.heads, mixer.kv_heads, mixer.head_dim
    q, k, v = mixer.qkv_proj(hidden).unflatten(2, (-1, width)).split([heads, shared, shared], dim=2)
    angles = torch.arange(hidden.shape[1]).double()[None, :, None] * frequencies(width)
    return turned(q, angles.expand(len(q), -1, -1)), turned(k, angles.expand(len(q), -1, -1)), v


def best(scores: list[float], count: int) -> list[int]:
    """Places of the largest scores, the earlier of equal ones."""
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]


@pytest.mark.parametrize(("block", "chosen"), [(4, 3), (5, 1), (3, 99)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_moba_is_a_mask_made_by_a_loop(block: int, chosen: int, kv_heads: int) -> None:
    mixer = shaken(MoBA(WIDTH, heads=4, kv_heads=kv_heads, block=block, chosen=chosen))
    hidden = torch.randn(1, 27, WIDTH, dtype=torch.float64)
    assert isinstance(mixer, MoBA)
    q, k, v = queries_keys_values(mixer, hidden)
    seen = torch.zeros(1, 4, 27, 27, dtype=torch.bool)
    for head, i in itertools.product(range(4), range(27)):
        own = i // block
        keys = k[0, :, head // (4 // kv_heads)]
        scores = [(q[0, i, head] @ keys[m * block : (m + 1) * block].mean(0)).item() for m in range(own)]
        for m in [*best(scores, chosen - 1), own]:
            seen[0, head, i, m * block : min((m + 1) * block, i + 1)] = True
    close(mixer(hidden, SequenceLayout.build(1, 27))[0], mixer.out_proj(softmax_over(q, k, v, seen).flatten(2)))


def test_native_sparse_attention_is_three_masks_made_by_loops() -> None:
    block, chosen, window, length = 4, 3, 6, 31
    mixer = shaken(
        NativeSparseAttention(WIDTH, heads=4, kv_heads=2, block=block, chosen=chosen, window=window)
    )  # fmt: skip
    hidden = torch.randn(1, length, WIDTH, dtype=torch.float64)
    assert isinstance(mixer, NativeSparseAttention)
    q, k, v = queries_keys_values(mixer, hidden)
    means = [torch.stack([x[:, m : m + block].mean(1) for m in range(0, length - block + 1, block)], 1) for x in (k, v)]
    ended = torch.zeros(length, length // block, dtype=torch.bool)
    selected, local = torch.zeros(1, 4, length, length, dtype=torch.bool), torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        ended[i, : (i + 1) // block] = True
        local[i, max(0, i - window + 1) : i + 1] = True
        for group in range(2):
            importance = torch.zeros(length // block, dtype=torch.float64)
            for head in (2 * group, 2 * group + 1):
                scores = means[0][0, : (i + 1) // block, group] @ q[0, i, head] / 2
                importance[: (i + 1) // block] += scores.softmax(0)
            own = i // block
            for m in [*best(importance[:own].tolist(), chosen - 1), own]:
                selected[0, 2 * group : 2 * group + 2, i, m * block : min((m + 1) * block, i + 1)] = True
    gates = torch.sigmoid(mixer.gate_proj(hidden)).unflatten(2, (4, 3))
    branches = (
        softmax_over(q, *means, ended[None, None]),
        softmax_over(q, k, v, selected),
        softmax_over(q, k, v, local[None, None]),
    )
    mixed = sum(gates[..., [c]] * branch for c, branch in enumerate(branches))
    assert isinstance(mixed, Tensor)
    close(mixer(hidden, SequenceLayout.build(1, length))[0], mixer.out_proj(mixed.flatten(2)))


def test_the_earlier_of_equal_blocks_is_chosen() -> None:
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, 3.0, -torch.inf], [-torch.inf] * 6, [0.0] * 6])
    assert choose_blocks(scores, 3).tolist() == [[1, 3, 4], [-1, -1, -1], [0, 1, 2]]
    assert choose_blocks(scores, 4)[0].tolist() == [1, 3, 4, 0] and choose_blocks(scores, 6)[0, 5] == -1
    mixer = MoBA(WIDTH, heads=2, block=2, chosen=3)
    chosen = mixer.choose(torch.randn(1, 9, 2, 8), torch.zeros(1, 4, 2, 8), 0, together=False)
    assert chosen[0, :, 0].tolist() == [[-1, -1]] * 2 + [[0, -1]] * 2 + [[0, 1]] * 5


@pytest.mark.parametrize("budget", [1 << 22, 60])
@pytest.mark.parametrize(
    ("length", "keys", "groups", "shared", "count"),
    [(13, 13, 2, 2, 2), (5, 19, 4, 1, 3), (1, 9, 2, 1, 1), (20, 20, 1, 1, 0)],
)
def test_gathered_blocks_are_the_reference(
    length: int, keys: int, groups: int, shared: int, count: int, budget: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(gathered, "BUDGET", budget)
    own = (torch.arange(length) + keys - length) // 4
    scores = torch.randn(2, length, groups, 5).masked_fill(torch.arange(5) >= own[:, None, None], -torch.inf)
    shapes = ((2, length, 4, 3), (2, keys, shared, 3), (2, keys, shared, 5))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    target, results = torch.randn(2, length, 4, 5, dtype=torch.float64), []
    for implementation in ("gathered", "reference"):
        out = block_attention(*leaves, choose_blocks(scores, count), 4, implementation=implementation)
        results.append([out, *torch.autograd.grad((out * target).sum(), leaves)])
    for mine, theirs in zip(*results, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("length", "offset", "every"), [(17, 0, 4), (17, 6, 5), (1, 8, 4), (3, 0, 9), (1030, 1, 300)])
def test_summaries_are_the_reference(length: int, offset: int, every: int, alone: bool) -> None:
    number = (length + offset) // every
    leaves = [torch.randn(2, n, g, 4, dtype=torch.float64, requires_grad=True)
              for n, g in ((length, 4), (number, 2), (number, 2), (length, 2), (length, 2))]  # fmt: skip
    used, results = leaves[:3] if alone else leaves, []
    target = torch.randn(2, length, 4, 4, dtype=torch.float64)
    for implementation in ("blocks", "reference"):
        out = summary_attention(*used[:3], every, offset, *used[3:], implementation=implementation)
        results.append([out, *torch.autograd.grad((out * target).sum(), used, materialize_grads=True)])
    for mine, theirs in zip(*results, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize(("chunk", "length"), [(4, 27), (1, 9), (5, 5), (40, 27)])
def test_rat_is_a_recurrence_and_a_mask_made_by_a_loop(chunk: int, length: int) -> None:
    mixer = shaken(Rat(WIDTH, heads=2, chunk=chunk))
    hidden = torch.randn(2, length, WIDTH, dtype=torch.float64)
    assert isinstance(mixer, Rat)
    q, k, v = mixer.qkv_proj(hidden).chunk(3, dim=-1)
    forget = torch.sigmoid(mixer.forget_proj(hidden) + mixer.forget_bias)
    steps: list[list[Tensor]] = [[], []]
    for past, x in zip(steps, (k, v), strict=True):
        for t in range(length):
            before = torch.zeros(2, WIDTH, dtype=torch.float64) if t % chunk == 0 else past[-1]
            past.append(forget[:, t] * before + (1 - forget[:, t]) * x[:, t])
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        seen[i, i] = True
        for last in range(chunk - 1, i // chunk * chunk, chunk):
            seen[i, last] = True
    q, k, v = (x.unflatten(2, (2, 8)) for x in (q, *(torch.stack(past, dim=1) for past in steps)))
    angles = (torch.arange(length) // chunk).double()[None, :, None] * frequencies(8)
    q, k = (turned(x, angles.expand(2, -1, -1)) for x in (q, k))
    mixed = softmax_over(q, k, v, seen[None, None]).flatten(2) * torch.sigmoid(mixer.gate_proj(hidden))
    close(mixer(hidden, SequenceLayout.build(2, length))[0], mixer.out_proj(mixed))


def test_rat_starts_with_means_over_up_to_a_chunk() -> None:
    forget = torch.sigmoid(Rat(256, chunk=16).forget_bias)
    assert 0.5 <= forget.min() < 0.6 and 0.93 < forget.max() < 15 / 16
    assert torch.equal(torch.sigmoid(Rat(16, chunk=1).forget_bias), torch.full((16,), 0.5))


def test_scout_is_a_mixer_and_a_mask_made_by_a_loop() -> None:
    mixer = shaken(Scout(WIDTH, mixer=partial(Attention, heads=2, window=3), heads=4, kv_heads=2, every=4))
    hidden = torch.randn(2, 27, WIDTH, dtype=torch.float64)
    assert isinstance(mixer, Scout)
    layout = SequenceLayout.build(2, 27)
    near = mixer.mixer(hidden, layout)[0]
    x = hidden + near
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    q, k, v = mixer.qkv_proj(x).unflatten(2, (-1, 4)).split([4, 2, 2], dim=2)
    angles = (torch.arange(27).double()[None, :, None] * frequencies(4)).expand(2, -1, -1)
    seen = torch.eye(27, dtype=torch.bool)
    for i in range(27):
        seen[i, 3:i:4] = True
    far = softmax_over(turned(q, angles), turned(k, angles), v, seen[None, None])
    close(mixer(hidden, layout)[0], near + mixer.out_proj(far.flatten(2)))
    _, state = mixer(hidden, layout, mixer.initial_state(2, "cpu", torch.float64))
    assert state.checkpoints.keys.shape[1] == 6 and state.local.keys.shape[1] == 2


def test_wrapped_mixers_are_told_their_place() -> None:
    mixer = Scout(WIDTH, mixer=partial(DifferentialAttention, heads=2), heads=2)
    mixer.place(3, 4)
    assert isinstance(mixer.mixer, DifferentialAttention)
    assert mixer.mixer.lambda_start == pytest.approx(0.8 - 0.6 * math.exp(-0.9))
    with pytest.raises(ValueError, match="sees both sides"):
        Scout(WIDTH, mixer=partial(Attention, heads=2, causal=False), heads=2)
    with pytest.raises(ValueError, match="reads another block's memory"):
        Scout(WIDTH, mixer=GatedMemoryUnit, heads=2)
