"""Against implementations that we did not write: transformers' models, with random weights copied into ours.

Every weight is moved away from its initial value first, because initial values such as D = 1 hide mistakes.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from oracle import library

from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.ffn import SwiGLU
from seqlong.mixers import Attention, Mamba2

transformers = library()


def perturb(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def agree(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1, "the oracle is too quiet to tell anything"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups: int) -> None:
    """Mamba2Model with two blocks, 300 tokens: hidden states, and the gradient of every parameter."""
    oracle = transformers.Mamba2Model(
        transformers.Mamba2Config(
            vocab_size=16, hidden_size=32, state_size=12, num_heads=8, head_dim=8, expand=2, n_groups=groups,
            num_hidden_layers=2, chunk_size=64, use_bias=False, use_conv_bias=True, residual_in_fp32=True,
        )
    )  # fmt: skip
    mixer = partial(Mamba2, d_state=12, head_dim=8, groups=groups)
    ours = Backbone(BackboneConfig(vocab_size=16, d_model=32, pattern="mm", mixers={"m": mixer}, ffn=None))
    perturb(oracle)
    renamed = {"embeddings.weight": "embedding.weight", "norm_f.weight": "norm.weight"}
    weights = {}
    for name, value in oracle.state_dict().items():
        new = renamed.get(name, name.replace("layers.", "blocks."))
        weights[new.replace(".norm.weight", ".mixer_norm.weight") if ".mixer." not in new else new] = value
    ours.load_state_dict(weights, strict=True)
    tokens = torch.randint(0, 16, (2, 300))
    expected = oracle(tokens).last_hidden_state
    found = ours(SequenceBatch(tokens=tokens)).hidden
    agree(found, expected)
    weigh = torch.randn_like(expected)
    theirs = dict(zip(weights, torch.autograd.grad((expected * weigh).mean(), list(oracle.parameters())), strict=True))
    mine = torch.autograd.grad((found * weigh).mean(), list(ours.parameters()))
    for (name, _), gradient in zip(ours.named_parameters(), mine, strict=True):
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-5, msg=f"gradient of {name}")


def _llama(window: int | None) -> tuple[nn.Module, Backbone]:
    settings = {
        "vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
    }  # fmt: skip
    if window is None:
        oracle = transformers.LlamaModel(transformers.LlamaConfig(**settings))
    else:
        oracle = transformers.MistralModel(transformers.MistralConfig(**settings, sliding_window=window))
    perturb(oracle)
    mixer = partial(Attention, heads=4, kv_heads=2, window=window)
    ffn = partial(SwiGLU, d_hidden=48)
    ours = Backbone(BackboneConfig(vocab_size=16, d_model=32, pattern="a", layers=2, mixers={"a": mixer}, ffn=ffn))
    theirs = oracle.state_dict()
    weights = {"embedding.weight": theirs["embed_tokens.weight"], "norm.weight": theirs["norm.weight"]}
    for number in range(2):
        old, new = f"layers.{number}", f"blocks.{number}"
        weights[f"{new}.mixer.qkv_proj.weight"] = torch.cat([theirs[f"{old}.self_attn.{x}_proj.weight"] for x in "qkv"])
        weights[f"{new}.mixer.out_proj.weight"] = theirs[f"{old}.self_attn.o_proj.weight"]
        weights[f"{new}.ffn.gate_up_proj.weight"] = torch.cat(
            [theirs[f"{old}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        )
        weights[f"{new}.ffn.down_proj.weight"] = theirs[f"{old}.mlp.down_proj.weight"]
        weights[f"{new}.mixer_norm.weight"] = theirs[f"{old}.input_layernorm.weight"]
        weights[f"{new}.ffn_norm.weight"] = theirs[f"{old}.post_attention_layernorm.weight"]
    ours.load_state_dict(weights, strict=True)
    return oracle, ours


@pytest.mark.parametrize("window", [None, 37])
def test_grouped_attention_with_rope_and_swiglu(window: int | None) -> None:
    """LlamaModel, and MistralModel for the sliding window."""
    oracle, ours = _llama(window)
    tokens = torch.randint(0, 16, (2, 301))
    agree(ours(SequenceBatch(tokens=tokens)).hidden, oracle(tokens).last_hidden_state)


def test_decoding_with_state_agrees_with_their_whole_forward() -> None:
    oracle, ours = _llama(None)
    tokens = torch.randint(0, 16, (1, 40))
    state = ours.initial_state(1, "cpu", torch.float32)
    outputs = []
    with torch.no_grad():
        for a, z in [(0, 30), *((step, step + 1) for step in range(30, 40))]:
            result = ours(SequenceBatch(tokens=tokens[:, a:z]), state)
            state = result.state
            outputs.append(result.hidden)
        agree(torch.cat(outputs, dim=1), oracle(tokens).last_hidden_state)
