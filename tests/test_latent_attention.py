"""LatentAttention: against its formula, DeepSeek-V3's code, and itself in its other way; its cache and costs."""

from __future__ import annotations

from functools import partial

import oracle
import pytest
import torch
from torch import Tensor

from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.cost import mixer_cost
from seqlong.errors import ConfigError
from seqlong.ffn import SwiGLU
from seqlong.layout import SequenceLayout
from seqlong.mixers import LatentAttention

WIDTH = 16
SIZES = {"heads": 2, "head_dim": 6, "rope_dim": 4, "value_dim": 5, "kv_rank": 7}


def make(**settings: int | str | bool | None) -> LatentAttention:
    torch.manual_seed(0)
    mixer = LatentAttention(WIDTH, **{**SIZES, **settings}).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, place: int) -> Tensor:
    """One vector at ``place``: its two halves are the two parts of complex numbers."""
    half = x.shape[-1] // 2
    angle = place * 10000.0 ** (-torch.arange(half).double() / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(half).double(), angle)
    return torch.cat([z.real, z.imag], dim=-1)


@pytest.mark.parametrize("q_rank", [None, 9])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_its_formula(q_rank: int | None, causal: bool) -> None:
    mixer = make(q_rank=q_rank, causal=causal)
    x = torch.randn(11, WIDTH).double()
    latent, placed = (x @ mixer.kv_down.weight.T).split([7, 4], dim=-1)
    latent = normed(latent, mixer.kv_norm.weight)
    source = x
    if mixer.q_down is not None and mixer.q_norm is not None:
        source = normed(x @ mixer.q_down.weight.T, mixer.q_norm.weight)
    output = torch.zeros(11, 2, 5).double()
    for head in range(2):
        plain_q, placed_q = (source @ mixer.q_proj.weight[10 * head : 10 * head + 10].T).split([6, 4], dim=-1)
        k, v = (latent @ mixer.kv_up.weight[11 * head : 11 * head + 11].T).split([6, 5], dim=-1)
        for t in range(11):
            last = t + 1 if causal else 11
            scores = [plain_q[t] @ k[s] + turned(placed_q[t], t) @ turned(placed[s], s) for s in range(last)]
            output[t, head] = (torch.stack(scores) / 10**0.5).softmax(0) @ v[:last]
    expected = output.flatten(1) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x[None], SequenceLayout.build(1, 11))[0][0], expected, rtol=1e-9, atol=1e-9)


def test_both_ways_are_the_same_and_products_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, hidden = make(), torch.randn(2, 40, WIDTH).double()
    ids = torch.tensor([[1] * 20 + [2] * 20, [1] * 33 + [0] * 7], dtype=torch.int32)
    layout = SequenceLayout.build(2, 40, ids)
    _, state = mixer(hidden[:, :13], layout.slice(0, 13), mixer.initial_state(2, "cpu", torch.float64))
    found = []
    for choice in (True, False):
        monkeypatch.setattr(mixer, "absorbs", lambda queries, choice=choice: choice)
        found.append(mixer(hidden[:, 13:], layout.slice(13, 40), state)[0][ids[:, 13:] > 0])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)
    deepseek = LatentAttention(64, heads=2, head_dim=128, rope_dim=64, kv_rank=512)
    assert deepseek.absorbs(1) and deepseek.absorbs(170) and not deepseek.absorbs(171)
    assert make(kv_rank=5).absorbs(10**6)  # latents narrower than one head's keys and values


def test_the_cache_is_the_latent_and_one_key() -> None:
    mixer, hidden = make(), torch.randn(1, 9, WIDTH).double()
    _, state = mixer(hidden, SequenceLayout.build(1, 9), mixer.initial_state(1, "cpu", torch.float64))
    assert state is not None and state.keys.shape == (1, 9, 1, 11) and state.values.numel() == 0
    cost = mixer_cost(mixer, 9, torch.float64)
    assert cost.state == 9 * 11 * 8 and cost.growth == "88 B a token"
    assert next(t.flops for t in cost.terms if t.what == "attention") == 2 * 2 * (10 + 5) * 5
    assert mixer_cost(make(causal=False), 9).state is None


def agree(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1, "the oracle is too quiet to tell anything"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_it_is_deepseek_v3s() -> None:
    """Dense blocks of transformers' model with copied weights, whole and token by token."""
    transformers = oracle.library()
    config = transformers.DeepseekV3Config(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, first_k_dense_replace=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=20, qk_nope_head_dim=8,
        qk_rope_head_dim=6, v_head_dim=10, rope_interleave=False, max_position_embeddings=512, rms_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.DeepseekV3Model(config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    mixer = partial(LatentAttention, heads=4, head_dim=8, rope_dim=6, value_dim=10, kv_rank=20, q_rank=12)
    ffn = partial(SwiGLU, d_hidden=48)
    ours = Backbone(BackboneConfig(16, 32, "l", {"l": mixer}, layers=2, ffn=ffn, norm_eps=1e-6))
    given = theirs.state_dict()
    weights = {"embedding.weight": given["embed_tokens.weight"], "norm.weight": given["norm.weight"]}
    names = {
        "q_a_proj": "q_down", "q_a_layernorm": "q_norm", "q_b_proj": "q_proj", "kv_a_proj_with_mqa": "kv_down",
        "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_up", "o_proj": "out_proj",
    }  # fmt: skip
    for number in range(2):
        old, new = f"layers.{number}", f"blocks.{number}"
        for a, b in names.items():
            weights[f"{new}.mixer.{b}.weight"] = given[f"{old}.self_attn.{a}.weight"]
        weights[f"{new}.ffn.gate_up_proj.weight"] = torch.cat(
            [given[f"{old}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        )
        weights[f"{new}.ffn.down_proj.weight"] = given[f"{old}.mlp.down_proj.weight"]
        weights[f"{new}.mixer_norm.weight"] = given[f"{old}.input_layernorm.weight"]
        weights[f"{new}.ffn_norm.weight"] = given[f"{old}.post_attention_layernorm.weight"]
    ours.load_state_dict(weights, strict=True)
    for length in (3, 77):
        tokens = torch.randint(0, 16, (2, length))
        expected = theirs(tokens).last_hidden_state
        agree(ours(SequenceBatch(tokens=tokens)).hidden, expected)
    state, steps = ours.initial_state(2, "cpu", torch.float32), []
    with torch.no_grad():
        for step in range(77):
            output = ours(SequenceBatch(tokens=tokens[:, step : step + 1]), state)
            assert output.state is not None
            state = output.state
            steps.append(output.hidden)
    agree(torch.cat(steps, dim=1), expected)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"heads": 3}, r"LatentAttention needs d_model divisible by heads, found 16 and 3"),
        ({"kv_rank": 0}, r"LatentAttention needs positive sizes, .* kv_rank=0"),
        ({"rope_dim": 3}, r"rope_dim needs an even number of channels"),
    ],
)
def test_mistakes_are_told(settings: dict[str, int], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Backbone(BackboneConfig(8, WIDTH, "l", {"l": partial(LatentAttention, **settings)}))


def test_one_that_sees_both_sides_carries_nothing() -> None:
    mixer = make(causal=False)
    with pytest.raises(ValueError, match="cannot carry a state"):
        mixer(
            torch.randn(1, 3, WIDTH).double(), SequenceLayout.build(1, 3), make().initial_state(1, "cpu", torch.float64)
        )
