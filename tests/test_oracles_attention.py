"""Attention variants against transformers' own layers, with random weights copied into ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from oracle import library

from seqlong.layout import SequenceLayout
from seqlong.mixers import Attention, DifferentialAttention

transformers = library()
LENGTHS = [3, 77, 300]


def run(model: Any, layer: Any, hidden: Tensor) -> Tensor:
    """A layer of a model by itself."""
    length = hidden.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    turns = model.rotary_emb(hidden, torch.arange(length)[None].expand(len(hidden), -1))
    result: Tensor = layer(hidden, position_embeddings=turns, attention_mask=mask)[0]
    return result


def compare(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1, "the oracle is too quiet to tell anything"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
def test_differential_attention_is_that_of_diff_llama(length: int) -> None:
    modeling = pytest.importorskip("transformers.models.diffllama.modeling_diffllama")
    config = transformers.DiffLlamaConfig(
        vocab_size=10, hidden_size=32, intermediate_size=8, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, attn_implementation="eager", rms_norm_eps=1e-5,
    )  # fmt: skip
    model = modeling.DiffLlamaModel(config).eval()
    theirs, ours = model.layers[2].self_attn, DifferentialAttention(32, heads=4, kv_heads=2)
    ours.place(2, 3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        values = theirs.v_proj.weight.view(2, 2, 4, 32).transpose(0, 1)  # the halves of a value lie apart, there
        ours.qkv_proj.weight.copy_(torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, values.reshape(16, 32)]))
        ours.out_proj.weight.copy_(theirs.o_proj.weight)
        ours.lambda_q.copy_(torch.stack([theirs.lambda_q1, theirs.lambda_q2]))
        ours.lambda_k.copy_(torch.stack([theirs.lambda_k1, theirs.lambda_k2]))
    hidden = torch.randn(2, length, 32)
    compare(ours(hidden, SequenceLayout.build(2, length))[0], run(model, theirs, hidden))


@pytest.mark.parametrize("length", LENGTHS)
def test_gated_attention_is_that_of_qwen3_next(length: int) -> None:
    """Gate, norms of queries and keys, and a rotation of a quarter of each head."""
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = transformers.Qwen3NextConfig(
        vocab_size=10, hidden_size=32, intermediate_size=8, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attn_implementation="eager", num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=8, shared_expert_intermediate_size=8, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    model = modeling.Qwen3NextModel(config).eval()
    theirs = model.layers[3].self_attn
    ours = Attention(
        32, heads=4, kv_heads=2, head_dim=16, gate=True, qk_norm=True, partial_rotary=0.25,
        norm_eps=config.rms_norm_eps,
    )  # fmt: skip
    assert ours.gate_proj is not None and ours.q_norm is not None and ours.k_norm is not None
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        query, gate = theirs.q_proj.weight.view(4, 2, 16, 32).unbind(1)  # a head's query, then its gate
        ours.qkv_proj.weight.copy_(torch.cat([query.reshape(64, 32), theirs.k_proj.weight, theirs.v_proj.weight]))
        ours.gate_proj.weight.copy_(gate.reshape(64, 32))
        ours.q_norm.weight.copy_(1 + theirs.q_norm.weight)  # counted from 1, there
        ours.k_norm.weight.copy_(1 + theirs.k_norm.weight)
        ours.out_proj.weight.copy_(theirs.o_proj.weight)
    hidden = torch.randn(2, length, 32)
    compare(ours(hidden, SequenceLayout.build(2, length))[0], run(model, theirs, hidden))
