"""The mixers that must pass the contract in ``test_mixers.py``, and what its tests share.

A new mixer adds one line to MIXERS, another for each variant that takes another path.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from seqlong.layout import SequenceLayout
from seqlong.mixers import (
    GLA,
    HGRN2,
    KDA,
    MLSTM,
    RGLRU,
    RWKV6,
    RWKV7,
    S4D,
    SSE,
    Attention,
    Based,
    Bidirectional,
    Convolution,
    CosFormer2,
    DeltaNet,
    DifferentialAttention,
    GatedDeltaNet,
    Hedgehog,
    LatentAttention,
    LightningAttention,
    LinearAttention,
    LogLinearGatedDeltaNet,
    LogLinearMamba2,
    Mamba1,
    Mamba2,
    Mixer,
    MoBA,
    MoH,
    MoM,
    NativeSparseAttention,
    Parallel,
    PrefixAttention,
    PrefixMixer,
    Rat,
    RetNet,
    Scout,
    SimpleGLA,
    SwitchHead,
)

WIDTH = 16
MIXERS: dict[str, Callable[[int], Mixer]] = {
    "mamba2": partial(Mamba2, d_state=8, head_dim=8),
    "mamba2_groups": partial(Mamba2, d_state=6, head_dim=4, groups=4, expand=1, conv_width=3, conv_bias=False),
    "mamba2_recompute": partial(Mamba2, d_state=8, head_dim=8, groups=2, recompute=True),
    "attention_rope": partial(Attention, heads=4),
    "attention_gqa": partial(Attention, heads=4, kv_heads=2, head_dim=6, positions="none", bias=True),
    "attention_mqa_alibi": partial(Attention, heads=4, kv_heads=1, positions="alibi"),
    "attention_window": partial(Attention, heads=2, window=5),
    "attention_window_one": partial(Attention, heads=2, window=1),
    "attention_both_sides": partial(Attention, heads=4, causal=False),
    "attention_both_sides_window": partial(Attention, heads=4, kv_heads=2, causal=False, window=4, positions="none"),
    "attention_sinks": partial(Attention, heads=4, kv_heads=2, window=4, sinks=3),
    "attention_sinks_one": partial(Attention, heads=2, window=1, sinks=1, positions="none"),
    "attention_normed_together": partial(Attention, heads=4, kv_heads=2, qk_norm="row"),
    "attention_gated": partial(Attention, heads=2, gate=True, qk_norm=True, partial_rotary=0.5, rope_scale=4.0),
    "attention_gated_heads": partial(Attention, heads=4, kv_heads=2, gate="head", bias=True),
    "attention_axes": partial(Attention, heads=2, rope_axes=[2, 4]),
    "latent": partial(LatentAttention, heads=4),
    "latent_sizes": partial(LatentAttention, heads=2, head_dim=6, rope_dim=4, value_dim=5, kv_rank=7, q_rank=9),
    "latent_no_positions": partial(LatentAttention, heads=4, positions="none", kv_rank=3),
    "latent_both_sides": partial(LatentAttention, heads=2, causal=False),
    "differential": partial(DifferentialAttention, heads=4, kv_heads=2),
    "differential_window": partial(DifferentialAttention, heads=2, head_dim=3, window=5, positions="none"),
    "moba": partial(MoBA, heads=4, kv_heads=2, block=4, chosen=3),
    "native_sparse": partial(NativeSparseAttention, heads=4, kv_heads=2, block=4, chosen=2, window=3),
    "rat": partial(Rat, heads=2, chunk=4),
    "rat_one": partial(Rat, heads=4, chunk=1, positions="none"),
    "scout": partial(Scout, mixer=partial(Mamba2, d_state=6, head_dim=8), heads=4, kv_heads=2, every=4),
    "scout_window": partial(Scout, mixer=partial(Attention, heads=2, window=3), heads=2, every=3, positions="none"),
    "gla": partial(GLA, heads=2),
    "gla_conv": partial(GLA, heads=2, expand_k=1.0, conv_width=3, gate="none"),
    "gla_refined": partial(GLA, heads=2, refine=True, divisor=2.0),
    "hgrn2": partial(HGRN2, heads=2, expand_k=0.5),
    "linear_attention": partial(LinearAttention, heads=2),
    "linear_attention_softmax": partial(LinearAttention, heads=2, feature="softmax", conv_width=3, gate="silu"),
    "retnet": partial(RetNet, heads=2),
    "lightning": partial(LightningAttention, heads=2),
    "lightning_low_rank": partial(LightningAttention, heads=3, head_dim=6, gate_rank=4),
    "lightning_lrpe": partial(LightningAttention, heads=2, lrpe=True),
    "cosformer2": partial(CosFormer2, heads=2),
    "cosformer2_axes": partial(CosFormer2, heads=2, axes=[2, 6]),
    "simple_gla": partial(SimpleGLA, heads=2, expand_v=2.0),
    "deltanet": partial(DeltaNet, heads=2),
    "deltanet_negative": partial(DeltaNet, heads=4, expand_v=2.0, negative_eigenvalues=True, gate="silu"),
    "gated_deltanet": partial(GatedDeltaNet, heads=2, head_dim=6),
    "gated_deltanet_groups": partial(GatedDeltaNet, heads=4, groups=2, head_dim=4, negative_eigenvalues=True),
    "kda": partial(KDA, heads=2),
    "kda_safe": partial(KDA, heads=2, head_dim=6, safe=True, negative_eigenvalues=True),
    "rwkv6": partial(RWKV6, heads=2, mix_rank=4, decay_rank=4),
    "rwkv7": partial(RWKV7, heads=2, decay_rank=4, erase_rank=4, gate_rank=4),
    "log_linear_mamba2": partial(LogLinearMamba2, d_state=6, head_dim=8, groups=2, levels=6),
    "log_linear_gated_deltanet": partial(LogLinearGatedDeltaNet, heads=2, head_dim=6, groups=1, levels=8),
    "based": partial(Based, heads=2, feature_dim=4),
    "hedgehog": partial(Hedgehog, heads=2),
    "mlstm": partial(MLSTM, heads=2, input_bias=0.0),
    "mlstm_sigmoid": partial(MLSTM, heads=2, expand_k=1.0, input_gate="sigmoid"),
    "rglru": partial(RGLRU, width=12, heads=2),
    "mamba1": partial(Mamba1, d_state=4, dt_rank=3),
    "mamba1_norms": partial(Mamba1, d_state=3, expand=1, conv_width=3, conv_bias=False, inner_norm=True),
    "s4d": partial(S4D, d_state=6),
    "mom": partial(MoM, mixer=partial(GatedDeltaNet, heads=2, head_dim=4), memories=3),
    "mom_gla": partial(MoM, mixer=partial(GLA, heads=2), memories=3, active=1, shared_memory=False),
    "sse": partial(SSE, heads=2, parts=3, active=2, expand_k=0.5),
    "moh": partial(MoH, heads=4, shared=2, active=1, kv_heads=2),
    "moh_none_shared": partial(MoH, heads=4, shared=0, active=2, window=5, positions="none"),
    "switch_head": partial(SwitchHead, heads=2, experts=3, active=2),
    "switch_head_window": partial(SwitchHead, heads=3, head_dim=4, experts=4, active=1, window=5, positions="none"),
    "switch_head_both_sides": partial(SwitchHead, heads=2, experts=2, active=2, partial_rotary=1.0, causal=False),
    "parallel": partial(
        Parallel, mixers={"a": partial(Attention, heads=2, window=5), "m": partial(Mamba2, d_state=8, head_dim=8)}
    ),
    "parallel_sum": partial(
        Parallel,
        mixers={
            "a": partial(Attention, heads=4),
            "d": partial(GatedDeltaNet, heads=2, head_dim=6),
            "h": partial(MoH, heads=4, shared=2, active=1),
        },
        combine="sum",
        norm=False,
    ),
    "parallel_both_sides": partial(
        Parallel, mixers={"a": partial(Attention, heads=2, causal=False), "g": partial(GLA, heads=2)}
    ),
    "convolution": partial(Convolution, width=5, channels=6),
    "prefix_attention": partial(PrefixAttention, heads=4, kv_heads=2),
    "prefix_mamba2": partial(PrefixMixer, mixer=partial(Mamba2, d_state=8, head_dim=8)),
    "mamba2_both_sides": partial(Bidirectional, mixer=partial(Mamba2, d_state=8, head_dim=8)),
    "simple_gla_joined": partial(Bidirectional, mixer=partial(SimpleGLA, heads=2, conv_width=0), join="readings"),
    "gla_joined": partial(Bidirectional, mixer=partial(GLA, heads=2), join="readings"),
    "kda_joined": partial(Bidirectional, mixer=partial(KDA, heads=2, conv_width=0), join="readings"),
    "mamba2_both_sides_tied": partial(Bidirectional, mixer=partial(Mamba2, d_state=8, head_dim=8), tied=True),
}
CAUSAL = [name for name, make in MIXERS.items() if make(WIDTH).causal]
#: Two blocks that score nearly the same may change places where numbers are rounded.
CHOOSING = ("moba", "native_sparse")


def make(name: str, dtype: torch.dtype = torch.float64) -> Mixer:
    torch.manual_seed(1)
    mixer = MIXERS[name](WIDTH).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def rows(length: int, count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, length, WIDTH, dtype=dtype)


def plain(length: int, count: int = 2) -> SequenceLayout:
    return SequenceLayout.build(count, length)


def packed() -> tuple[SequenceLayout, list[list[tuple[int, int]]]]:
    """Rows of 23: segments of 5, 1, 12 and padding; 2, 2, 19; a row of padding alone."""
    ids = torch.tensor([[1] * 5 + [2] + [3] * 12 + [0] * 5, [1] * 2 + [2] * 2 + [3] * 19, [0] * 23], dtype=torch.int32)
    cuts = [[(0, 5), (5, 6), (6, 18)], [(0, 2), (2, 4), (4, 23)], []]
    return SequenceLayout.build(3, 23, ids), cuts


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
