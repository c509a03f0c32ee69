"""The contract: every mixer passes this one set. The mixers themselves are listed in ``mixer_cases.py``.

Tests run in float64 where rounding must not hide a mistake. Every parameter is moved away from its initial value
first: defaults such as D = 1 hide bugs.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from mixer_cases import CAUSAL, CHOOSING, MIXERS, WIDTH, close, make, packed, plain, rows
from torch import Tensor

from seqlong import mixers
from seqlong.block import Block
from seqlong.cost import _tensors
from seqlong.ffn import SwiGLU
from seqlong.layout import SequenceLayout
from seqlong.mixers import HGRN2, Bidirectional, LightningAttention, Mamba2
from seqlong.norms import RMSNorm

LENGTHS = [1, 2, 3, 17, 67]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CAUSAL)
def test_no_token_sees_a_later_one(name: str, length: int) -> None:
    """Bit for bit, whatever the future holds. (NaN itself would spread inside one matrix product as 0 · NaN.) Experts
    take the rows that come to them in one product, which some processors round by how many there are."""
    slack = 1e-5 if name.startswith("switch_head") else 0.0
    mixer, hidden = make(name), rows(length)
    for cut in {1, length // 2, length - 1} - {0, length}:
        changed = hidden.clone()
        changed[:, cut:] = 1e3 * torch.randn_like(changed[:, cut:])
        before = mixer(hidden, plain(length))[0][:, :cut]
        after = mixer(changed, plain(length))[0][:, :cut]
        off = (before - after).abs().max() / before.abs().max()
        assert off <= slack, f"positions before {cut} changed by {off:.1e} with what follows"


@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_has_no_gradient_even_when_it_is_nan(name: str) -> None:
    mixer, hidden = make(name), rows(600, 1).requires_grad_()
    spoiled = hidden.detach().clone()
    spoiled[:, 520:] = torch.nan  # a chunk and a block of queries of its own
    first = mixer(spoiled, plain(600, 1))[0][:, :500]
    if not name.startswith("mom"):  # a memory's tokens stand side by side, so a later one may be of the same chunk
        assert first.isfinite().all(), "NaN in a later chunk reached earlier positions"
    (gradient,) = torch.autograd.grad(mixer(hidden, plain(600, 1))[0][:, :300].sum(), hidden)
    assert gradient[:, 300:].abs().max() == 0
    assert gradient[:, :300].abs().max() > 0


@pytest.mark.parametrize("name", sorted(set(MIXERS) - set(CAUSAL)))
def test_a_mixer_that_sees_both_sides_does(name: str) -> None:
    mixer, hidden = make(name), rows(9, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(hidden, plain(9, 1))[0][:, 4].sum(), hidden)
    assert gradient[:, 3].abs().max() > 0 and gradient[:, 5].abs().max() > 0


@pytest.mark.parametrize("length", [2, 17, 67])
@pytest.mark.parametrize("name", CAUSAL)
def test_split_anywhere_with_the_state_carried_is_the_whole(name: str, length: int) -> None:
    mixer, hidden, layout = make(name), rows(length), plain(length)
    whole = mixer(hidden, layout)[0]
    for cuts in ([0, 1, length], [0, length // 2, length], [0, length // 3, length // 2, length - 1, length]):
        cuts = sorted(set(cuts))
        state, outputs = mixer.initial_state(2, "cpu", torch.float64), []
        for a, z in itertools.pairwise(cuts):
            output, state = mixer(hidden[:, a:z], layout.slice(a, z), state)
            outputs.append(output)
        close(torch.cat(outputs, dim=1), whole)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
def test_one_token_at_a_time_is_the_whole(name: str, gradients: bool) -> None:
    """Decoding, where nothing is differentiated, may take another way."""
    mixer, hidden, layout = make(name), rows(23, 3), packed()[0]
    state, outputs = mixer.initial_state(3, "cpu", torch.float64), []
    with torch.set_grad_enabled(gradients):
        for step in range(23):
            output, state = mixer(hidden[:, step : step + 1], layout.slice(step, step + 1), state)
            outputs.append(output)
        real = (layout.segment_ids > 0)[..., None]
        close(torch.cat(outputs, dim=1).where(real, 0), mixer(hidden, layout)[0].where(real, 0))


@pytest.mark.parametrize("name", CAUSAL)
def test_gradients_flow_through_the_carried_state(name: str) -> None:
    mixer, hidden, layout = make(name), rows(15).requires_grad_(), plain(15)
    target = torch.randn(2, 15, WIDTH, dtype=torch.float64)
    (expected,) = torch.autograd.grad((mixer(hidden, layout)[0] * target).sum(), hidden)
    state = mixer.initial_state(2, "cpu", torch.float64)
    first, state = mixer(hidden[:, :6], layout.slice(0, 6), state)
    second, _ = mixer(hidden[:, 6:], layout.slice(6, 15), state)
    (found,) = torch.autograd.grad((torch.cat([first, second], dim=1) * target).sum(), hidden)
    close(found, expected)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_segments_are_as_if_separate(name: str) -> None:
    mixer, hidden = make(name), rows(23, 3)
    layout, cuts = packed()
    found = mixer(hidden, layout)[0]
    assert found.isfinite().all()
    for row, segments in enumerate(cuts):
        for a, z in segments:
            alone = mixer(hidden[row : row + 1, a:z], plain(z - a, 1))[0]
            close(found[row : row + 1, a:z], alone)


@pytest.mark.parametrize("name", MIXERS)
def test_what_stands_in_padding_changes_nothing(name: str) -> None:
    mixer, hidden = make(name), rows(23, 3)
    layout, _ = packed()
    spoiled = hidden.masked_fill(layout.segment_ids[..., None] == 0, torch.nan)
    real = (layout.segment_ids > 0)[..., None]
    close(mixer(spoiled, layout)[0].where(real, 0), mixer(hidden, layout)[0].where(real, 0))


@pytest.mark.parametrize("cuts", [[0, 7, 23], [0, 5, 6, 18, 23], list(range(24))])
@pytest.mark.parametrize("name", CAUSAL)
def test_packed_rows_split_anywhere_are_the_whole(name: str, cuts: list[int]) -> None:
    mixer, hidden = make(name), rows(23, 3)
    layout, _ = packed()
    state, outputs = mixer.initial_state(3, "cpu", torch.float64), []
    for a, z in itertools.pairwise(cuts):
        output, state = mixer(hidden[:, a:z], layout.slice(a, z), state)
        outputs.append(output)
    real = (layout.segment_ids > 0)[..., None]
    close(torch.cat(outputs, dim=1).where(real, 0), mixer(hidden, layout)[0].where(real, 0))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_row_goes_on_after_a_window_that_ended_in_padding(name: str) -> None:
    mixer, hidden = make(name), rows(14)
    first = SequenceLayout.build(2, 8, torch.tensor([[1] * 5 + [0] * 3, [1] * 8], dtype=torch.int32))
    _, state = mixer(hidden[:, :8], first, mixer.initial_state(2, "cpu", torch.float64))
    second = SequenceLayout.build(2, 6, torch.ones(2, 6, dtype=torch.int32), offset=torch.tensor([5, 8]))
    found = mixer(hidden[:, 8:], second, state)[0]
    for row, real in ((0, 5), (1, 8)):
        alone = torch.cat([hidden[row : row + 1, :real], hidden[row : row + 1, 8:]], dim=1)
        close(found[row], mixer(alone, plain(real + 6, 1))[0][0, real:])


@pytest.mark.parametrize("name", CAUSAL)
def test_a_row_that_is_not_kept_starts_afresh(name: str) -> None:
    mixer, hidden = make(name), rows(12)
    state = mixer.initial_state(2, "cpu", torch.float64)
    _, state = mixer(hidden[:, :7], plain(7), state)
    state = state.keep(torch.tensor([True, False]))
    found, _ = mixer(hidden[:, 7:], plain(12).slice(7, 12), state)
    close(found[0], mixer(hidden, plain(12))[0][0, 7:])
    close(found[1], mixer(hidden[:, 7:], plain(12).slice(7, 12), mixer.initial_state(2, "cpu", torch.float64))[0][1])


@pytest.mark.parametrize("name", ["mamba2_both_sides_tied", "attention_both_sides_window"])
def test_symmetric_mixers_commute_with_reading_backwards(name: str) -> None:
    mixer, hidden = make(name), rows(13)
    close(mixer(hidden.flip(1), plain(13))[0].flip(1), mixer(hidden, plain(13))[0])


def test_bidirectional_is_the_sum_of_two_readings() -> None:
    mixer, hidden = make("mamba2_both_sides"), rows(13)
    assert isinstance(mixer, Bidirectional) and mixer.backward_mixer is not None
    right = mixer.forward_mixer(hidden, plain(13))[0]
    left = mixer.backward_mixer(hidden.flip(1), plain(13))[0].flip(1)
    close(mixer(hidden, plain(13))[0], right + left)


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_agree_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast implementations against the float64 loops: outputs, input gradient, every parameter's gradient."""
    mixer, hidden = make(name), rows(21, 3).requires_grad_()
    ids = torch.tensor([[1] * 21, [1] * 4 + [2] * 11 + [0] * 6, [1] * 20 + [2]], dtype=torch.int32)
    target = torch.randn(3, 21, WIDTH, dtype=torch.float64) * (ids > 0)[..., None]
    wanted = [hidden, *mixer.parameters()]
    results = []
    for implementation in ("", "reference"):
        monkeypatch.setenv("SEQLONG_KERNELS", implementation)
        output = mixer(hidden, SequenceLayout.build(3, 21, ids))[0]
        loss = (output * target).sum()
        results.append([output.where((ids > 0)[..., None], 0), *torch.autograd.grad(loss, wanted)])
    for found, expected in zip(*results, strict=True):
        close(found, expected, 1e-9)


@pytest.mark.parametrize("name", ["mamba2_groups", "attention_window", "mamba2_both_sides_tied"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    mixer = make(name)
    layout, _ = packed()
    layout = layout.slice(0, 8)

    def function(hidden: Tensor) -> Tensor:
        return mixer(hidden, layout)[0].where((layout.segment_ids > 0)[..., None], 0)

    assert torch.autograd.gradcheck(function, (rows(8, 3).requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_stays_near_float64(name: str) -> None:
    exact, hidden = make(name), rows(33)
    expected = exact(hidden, plain(33))[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = exact.float()(hidden.float(), plain(33))[0].double()
    error = ((found - expected).norm() / expected.norm()).item()
    limit = 0.2 if name in CHOOSING else 2e-2
    assert 0 < error < limit, f"relative error {error:.1e} under bfloat16 autocast"


@pytest.mark.parametrize("name", CAUSAL)
def test_no_state_in_none_out_and_zero_length_windows(name: str) -> None:
    mixer = make(name)
    assert mixer(rows(5), plain(5))[1] is None
    state = mixer.initial_state(2, "cpu", torch.float64)
    _, state = mixer(rows(5), plain(5), state)
    output, after = mixer(rows(5)[:, :0], plain(5).slice(5, 5), state)
    assert output.shape == (2, 0, WIDTH)
    for mine, before in zip(_tensors(after), _tensors(state), strict=True):
        close(mine.double(), before.double())


@pytest.mark.parametrize("name", MIXERS)
def test_state_dict_is_strict_and_complete(name: str) -> None:
    mixer, other = make(name), MIXERS[name](WIDTH).double()
    other.load_state_dict(mixer.state_dict(), strict=True)
    hidden = rows(9)
    assert torch.equal(mixer(hidden, plain(9))[0], other(hidden, plain(9))[0])


@pytest.mark.parametrize("checkpointing", ["selective", "block", "tiled"])
@pytest.mark.parametrize("name", MIXERS)
def test_checkpointing_changes_memory_only(name: str, checkpointing: str) -> None:
    block = Block(WIDTH, make(name), SwiGLU(WIDTH).double(), RMSNorm).double()
    layout, _ = packed()
    hidden = rows(23, 3)
    real = (layout.segment_ids > 0)[..., None]
    results = []
    for mode in ("none", checkpointing):
        source = hidden.clone().requires_grad_()
        output, state, _ = block(source, layout, checkpointing=mode, tile=4)
        assert state is None
        loss = output.where(real, 0).square().sum()
        results.append([output.where(real, 0), *torch.autograd.grad(loss, [source, *block.parameters()])])
    for found, expected in zip(*results, strict=True):
        close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recomputing_keeps_the_projection_and_the_scan(dtype: torch.dtype) -> None:
    """Same results and gradients, bit for bit, and far fewer bytes between the forward and the backward pass."""
    layout, hidden = plain(512, 1), torch.randn(1, 512, WIDTH, dtype=dtype, requires_grad=True)
    kept, results = [], []
    for recompute in (False, True):
        torch.manual_seed(1)
        mixer = Mamba2(WIDTH, d_state=32, head_dim=8, recompute=recompute).to(dtype)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            output, _ = mixer(hidden, layout)
        kept.append(sum(event.self_cpu_memory_usage for event in profile.key_averages()))
        results.append([output, *torch.autograd.grad(output.square().sum(), [hidden, *mixer.parameters()])])
    assert all(map(torch.equal, *results))
    projected = mixer.in_proj.out_features + mixer.d_inner + WIDTH  # and this mixer's own result
    states = 32 * 8 * mixer.heads / 512  # one, for a block of tokens on a CPU
    few = 512 * hidden.element_size() * (projected + states)
    assert kept[1] < 1.1 * few < 0.6 * kept[0], f"kept {kept} bytes, the projection and the scan are {few:.0f}"


@pytest.mark.parametrize("name", ["mamba2", "attention_rope", "attention_window"])
def test_tiles_serve_evaluation_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(WIDTH, make(name), SwiGLU(WIDTH).double(), RMSNorm).double()
    lengths: list[int] = []
    monkeypatch.setattr(block.ffn, "forward", lambda x, run=block.ffn.forward: lengths.append(x.shape[1]) or run(x))
    hidden = rows(23)
    with torch.no_grad():
        close(block(hidden, plain(23), checkpointing="tiled", tile=4)[0], block(hidden, plain(23))[0])
    assert lengths[:-1] == [4, 4, 4, 4, 4, 3], "the row was not run in tiles"


def compiled_here() -> list[str]:
    """One of each class; SEQLONG_EVERY_VARIANT=1 asks for all, which takes minutes more (bench contract does)."""
    if os.environ.get("SEQLONG_EVERY_VARIANT"):
        return list(MIXERS)
    first: dict[object, str] = {}
    for name, mixer in MIXERS.items():
        first.setdefault(getattr(mixer, "func", mixer), name)
    return list(first.values())


def compile_every_mixer() -> None:
    """Traced whole (no graph break), forward and backward, with torch's own operators as the back end."""
    for name in compiled_here():
        torch.compiler.reset()
        block = Block(WIDTH, make(name, torch.float32), SwiGLU(WIDTH), RMSNorm)
        hidden = rows(9, dtype=torch.float32).requires_grad_()
        results = []
        for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
            output = run(hidden, plain(9))[0]
            results.append([output, *torch.autograd.grad(output.square().sum(), [hidden, *block.parameters()])])
        for found, expected in zip(*results, strict=True):
            close(found, expected, 1e-4)
        print(f"compiled {name}")


def test_every_block_compiles(record_property: Callable[[str, object], None]) -> None:
    """In a process of its own: shapes checked at run time cannot be traced."""
    code = "import test_mixers; test_mixers.compile_every_mixer()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=600
    )
    for line in done.stdout.splitlines():
        if line.startswith("compiled "):  # benchmarks/contract.py reads these
            record_property("compiled", line.removeprefix("compiled "))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled ") == len(compiled_here())


def test_constants_are_rounded_by_no_cast_and_survive_the_meta_device() -> None:
    for name in ("retnet", "lightning", "cosformer2"):
        plain_one, cast = MIXERS[name](WIDTH), MIXERS[name](WIDTH).bfloat16()
        with torch.device("meta"):
            empty = MIXERS[name](WIDTH)
        for other in (cast, empty.to_empty(device="cpu")):
            for mine, theirs in zip(plain_one.buffers(), other.buffers(), strict=True):
                assert mine.dtype == theirs.dtype == torch.float64 and torch.equal(mine, theirs)
        assert not any("numbers" in key for key in plain_one.state_dict())


WRAPPED = {"Bidirectional": Mamba2, "PrefixMixer": Mamba2}


@pytest.mark.parametrize("name", [x for x in mixers.__all__ if x not in ("Mixer", "MixerFactory", "MixerState")])
def test_numbers_that_make_no_mixer_are_told(name: str) -> None:
    build = partial(getattr(mixers, name), 64, **({"mixer": WRAPPED[name]} if name in WRAPPED else {}))
    for setting, parameter in inspect.signature(getattr(mixers, name)).parameters.items():
        kinds = parameter.annotation.split(" | ")
        if setting != "d_model" and "int" in kinds:
            with pytest.raises(ValueError, match=r"found .*-"):
                build(**{setting: -1})
            with contextlib.suppress(ValueError):  # none of something, or told
                build(**{setting: 0})
        if setting in ("rope_base", "base", "divisor", "a_min"):
            with pytest.raises(ValueError, match=f"found .*{setting}"):
                build(**{setting: 0.0})


def test_depth_sets_decays() -> None:
    """Lightning's last block hardly forgets; HGRN2's bounds rise from none."""
    first, last = LightningAttention(WIDTH, heads=2), LightningAttention(WIDTH, heads=2)
    first.place(0, 5), last.place(4, 5)
    torch.testing.assert_close(first.decay.numbers, torch.tensor([-(2.0**-4), -(2.0**-8)]).double() * (1 + 1e-5))
    assert last.decay.numbers.abs().max() < 1e-6
    bounds = []
    for layer in range(4):
        mixer = HGRN2(WIDTH, heads=2)
        mixer.place(layer, 4)
        bounds.append(torch.sigmoid(mixer.bound).mean().item() if mixer.bounded else 0.0)
        assert mixer(torch.randn(1, 5, WIDTH), plain(5, 1))[0].isfinite().all()
    assert bounds == pytest.approx([0, 0.25, 0.5, 0.75])
