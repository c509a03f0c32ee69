"""Which positions are hidden is a pure function of (seed, sample, position), with the rates and lengths asked for."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from seqlong.backbone import BackboneConfig
from seqlong.errors import ConfigError
from seqlong.mixers import Attention, Bidirectional, Mamba2
from seqlong.tasks import MaskedLM
from seqlong.tasks.masking import choose, corrupt, draw

INDEX = torch.arange(64)
SYMBOLS = torch.tensor([4, 5, 6, 7])
TINY = BackboneConfig(
    vocab_size=16,
    d_model=8,
    pattern="ba",
    mixers={
        "b": partial(Bidirectional, mixer=partial(Mamba2, d_state=4, head_dim=4)),
        "a": partial(Attention, heads=2, window=5),
    },
)


def test_a_draw_is_splitmix64_of_the_counters() -> None:
    """Against numpy's unsigned arithmetic, written out."""

    def finalise(value: np.ndarray) -> np.ndarray:
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))

    golden = 0x9E3779B97F4A7C15
    word = lambda value: np.array([value % 2**64], dtype=np.uint64)  # noqa: E731
    for seed, stream, sample, position in ((0, 0, 0, 0), (-3, 2, 2**40, 10**6), (7, 1, -1, 5)):
        with np.errstate(over="ignore"):
            row = finalise(
                (finalise(word(seed + golden)) ^ finalise(word(sample + golden * (stream + 2)))) + word(golden)
            )
            expected = finalise((row ^ finalise(word(position + golden))) + word(golden)) >> np.uint64(11)
        found = draw(seed, stream, torch.tensor([sample]), torch.tensor([position]))
        assert found.item() == int(expected[0])


@pytest.mark.parametrize("span", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_rate_and_span_are_what_was_asked_for(rate: float, span: float) -> None:
    chosen, decided = choose(INDEX, 4096, rate, span)
    count = chosen.numel()
    edges = (chosen[:, 1:] & ~chosen[:, :-1]).sum().item() + chosen[:, 0].sum().item()
    length = chosen.sum().item() / edges
    expected = max(span, 1 / (1 - rate))
    assert chosen.float().mean().item() == pytest.approx(rate, abs=5 * (rate * expected * 2 / count) ** 0.5)
    assert length == pytest.approx(expected, rel=0.05)
    assert chosen[:, 0].sum().item() == pytest.approx(64 * rate, abs=15)
    assert bool((chosen.gather(1, decided) == chosen).all()) and bool((decided <= torch.arange(4096)).all())
    if span == 1.0:
        assert bool((decided == torch.arange(4096)).all())  # each position by itself


def test_neighbours_samples_and_seeds_are_unrelated() -> None:
    one = choose(INDEX, 4096, 0.5)[0].float() - 0.5
    for other in (
        one.roll(1, dims=1),
        one.roll(1, dims=0),
        choose(INDEX, 4096, 0.5, seed=1)[0].float() - 0.5,
        choose(INDEX + 2**33, 4096, 0.5)[0].float() - 0.5,
    ):
        assert abs((one * other).mean().item() * 4) < 0.01


def test_the_same_however_the_rows_are_split_and_however_long_they_are() -> None:
    whole, decided = choose(INDEX, 512, 0.15, 4.0, seed=3)
    for rank in range(3):
        part, part_decided = choose(INDEX[rank::3], 512, 0.15, 4.0, seed=3)
        assert torch.equal(part, whole[rank::3]) and torch.equal(part_decided, decided[rank::3])
    assert torch.equal(choose(INDEX, 100, 0.15, 4.0, seed=3)[0], whole[:, :100])
    assert choose(INDEX, 0, 0.15)[0].shape == (64, 0)


@pytest.mark.parametrize("span", [1.0, 6.0])
def test_eighty_ten_ten_and_only_real_symbols(span: float) -> None:
    tokens = SYMBOLS[torch.randint(4, (64, 4096))]
    chosen, decided = choose(INDEX, 4096, 0.15, span)
    seen = corrupt(tokens, chosen, decided, INDEX, 1, SYMBOLS)
    assert torch.equal(seen[~chosen], tokens[~chosen])
    hidden, truth = seen[chosen], tokens[chosen]
    assert set(hidden.tolist()) == {1, 4, 5, 6, 7}
    tolerance = 0.01 * span**0.5
    assert (hidden == 1).float().mean().item() == pytest.approx(0.8, abs=tolerance)
    assert ((hidden != 1) & (hidden != truth)).float().mean().item() == pytest.approx(0.1 * 3 / 4, abs=tolerance)
    for symbol in SYMBOLS:  # each as likely
        share = (hidden[(hidden != 1) & (hidden != truth)] == symbol).float().mean().item()
        assert share == pytest.approx(0.25, abs=0.03)
    if span > 1:  # a span is hidden in one way; a new one may begin right behind it
        same = chosen[:, 1:] & (decided[:, 1:] == decided[:, :-1])
        masked = seen == 1
        assert bool((masked[:, 1:] == masked[:, :-1])[same].all()) and same.sum() > 10000


def test_shares_are_obeyed_at_their_ends() -> None:
    tokens = SYMBOLS[torch.randint(4, (64, 256))]
    chosen, decided = choose(INDEX, 256, 0.3)
    assert bool((corrupt(tokens, chosen, decided, INDEX, 1, SYMBOLS, 1.0, 0.0)[chosen] == 1).all())
    assert torch.equal(corrupt(tokens, chosen, decided, INDEX, 1, SYMBOLS, 0.0, 0.0), tokens)
    assert not bool((corrupt(tokens, chosen, decided, INDEX, 1, SYMBOLS, 0.0, 1.0) == 1).any())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rate": 1.0}, r"rate 1\.0 must lie between 0 and 1"),
        ({"span": 0.5}, r"span 0\.5 must be 1 or more"),
        ({"mask_share": 0.8, "random_share": 0.3}, "at most 1 together"),
        ({"replacements": (4, 16)}, "below the vocabulary size 16"),
        ({"replacements": (1, 4)}, "mask_token 1 must, which is not one of them"),
        ({"replacements": ()}, "must name tokens"),
    ],
)
def test_masked_settings_out_of_range(settings: dict, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        MaskedLM(TINY, **settings)


def test_description() -> None:
    found = MaskedLM(TINY).describe()
    assert found["pattern"] == ["b", "a"] and found["name"] == "MaskedLM"
    assert [block["mixer"] for block in found["blocks"]] == ["Bidirectional(Mamba2)", "Attention"]
    assert [block["ffn"] for block in found["blocks"]] == ["SwiGLU"] * 2
    rest = 16 * 8 + 8  # embedding, last norm
    assert found["parameters"] == sum(block["parameters"] for block in found["blocks"]) + rest
    assert found["d_model"] == 8 and found["vocab_size"] == 16 and found["head"]["name"] == "tied"
