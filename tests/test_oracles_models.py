"""Whole models against transformers' own: random tiny ones, their weights copied into a backbone and a head of ours.

A case is their model, our settings, and how the weights of a block of theirs are called in ours. What has no setting of
ours lies in the weights, where it makes the same function: a norm's ``1 + w``, factors of embeddings, residuals, scores
and logits. Every weight is moved away from its initial value first, because values such as D = 1 hide mistakes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from oracle import library

from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.ffn import GeGLU, MoE, SwiGLU
from seqlong.heads import LanguageHead
from seqlong.mixers import RGLRU, Attention, GatedDeltaNet, LightningAttention, Mamba2

transformers = library()

WIDTH, VOCABULARY = 32, 24
LENGTHS = [3, 77, 300]
SMALL = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "pad_token_id": None, "tie_word_embeddings": False}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {"mamba_d_state": 12, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_chunk_size": 64}

Weights = dict[str, Tensor]


class Layer(dict[str, Tensor]):
    """Weights of a block of theirs, by name."""

    def joined(self, *names: str, kind: str = "weight") -> Tensor:
        """Matrices one above the other."""
        return torch.cat([self[f"{name}.{kind}"] for name in names])

    def under(self, name: str) -> Weights:
        """All whose names begin with ``name.``, without it."""
        return {key.removeprefix(f"{name}."): value for key, value in self.items() if key.startswith(f"{name}.")}


@dataclass
class Case:
    """One model.

    Attributes:
        theirs: the model of transformers.
        ours: settings of the backbone.
        block: weights of a block of theirs, and the letter of the block in our pattern -> ours.
        norm: their name of the last norm.
        embedding: their name of the embedding.
        one: what is added to the weight of every norm of the residual stream.
        embeds: factor of the embedding.
        reads: factor of the last norm's weight, and so of logits.
        finish: what they do to logits.
    """

    theirs: Any
    ours: dict[str, Any]
    block: Callable[[Layer, str], Weights]
    norm: str = "model.norm"
    embedding: str = "model.embed_tokens"
    one: float = 0.0
    embeds: float = 1.0
    reads: float = 1.0
    finish: Callable[[Tensor], Tensor] = field(default=lambda logits: logits)


# --- parts that several models have -----------------------------------------------------------------------------------


def norms(layer: Layer, mixer: str = "input_layernorm", ffn: str = "post_attention_layernorm") -> Weights:
    return {"mixer_norm.weight": layer.joined(mixer), "ffn_norm.weight": layer.joined(ffn)}


def attention(layer: Layer, at: str = "self_attn", score: float = 1.0) -> Weights:
    """``score`` multiplies q·k."""
    q, k, v, out = (layer[f"{at}.{name}_proj.weight"] for name in "qkvo")
    return {"mixer.qkv_proj.weight": torch.cat([q * score, k, v]), "mixer.out_proj.weight": out}


def mamba(layer: Layer, at: str = "mamba") -> Weights:
    return {f"mixer.{name}": value for name, value in layer.under(at).items()}


def dense(layer: Layer, at: str) -> Weights:
    return {
        "ffn.gate_up_proj.weight": layer.joined(f"{at}.gate_proj", f"{at}.up_proj"),
        "ffn.down_proj.weight": layer.joined(f"{at}.down_proj"),
    }


def experts(layer: Layer, at: str = "mlp", router: str = "gate") -> Weights:
    """Their matrices are (out in), ours (in out); the router's bias balances, and is not theirs."""
    return {
        "ffn.router.weight": layer.joined(f"{at}.{router}"),
        "ffn.router.bias": torch.zeros(len(layer.joined(f"{at}.{router}"))),
        "ffn.experts.gate_up_proj.weight": layer[f"{at}.experts.gate_up_proj"].mT,
        "ffn.experts.down_proj.weight": layer[f"{at}.experts.down_proj"].mT,
    }


# --- models -----------------------------------------------------------------------------------------------------------


def mamba2() -> Case:
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            **SMALL, state_size=12, num_heads=8, head_dim=8, n_groups=2, num_hidden_layers=3, chunk_size=64,
        )
    )  # fmt: skip
    return Case(
        theirs,
        {"pattern": "mmm", "mixers": {"m": partial(Mamba2, d_state=12, head_dim=8, groups=2)}, "ffn": None},
        lambda layer, _: {"mixer_norm.weight": layer.joined("norm"), **mamba(layer, "mixer")},
        norm="backbone.norm_f",
        embedding="backbone.embeddings",
    )


def bamba() -> Case:
    """Mamba2 and attention that rotates half of a head, SwiGLU after each."""
    theirs = transformers.BambaForCausalLM(
        transformers.BambaConfig(
            **SMALL, **HEADS, **MAMBA, intermediate_size=48, num_hidden_layers=4, attn_layer_indices=[1]
        )
    )
    mixers = {
        "m": partial(Mamba2, d_state=12, head_dim=8, groups=2),
        "a": partial(Attention, heads=4, kv_heads=2, partial_rotary=0.5),
    }
    return Case(
        theirs,
        {"pattern": "mamm", "mixers": mixers, "ffn": partial(SwiGLU, d_hidden=48)},
        lambda layer, letter: {
            **norms(layer, ffn="pre_ff_layernorm"),
            **dense(layer, "feed_forward"),
            **(attention(layer) if letter == "a" else mamba(layer)),
        },
        norm="model.final_layernorm",
    )


def minimax() -> Case:
    """Lightning attention, softmax attention, experts; the residual stream is what was normed, times α.

    A norm does not see a factor of its whole input, so that only β/α is left, in the last matrices of each half. (It is
    added to a larger eps than theirs, which is as if eps were larger by α²: less than one in 10⁵.)
    """
    alpha, beta = 3.5, 0.8
    names = [f"{part}_{x}_factor" for part in ("full_attn", "linear_attn", "mlp") for x in ("alpha", "beta")]
    theirs = transformers.MiniMaxForCausalLM(
        transformers.MiniMaxConfig(
            **SMALL, **HEADS, head_dim=8, intermediate_size=20, num_hidden_layers=4, num_local_experts=6, block_size=32,
            layer_types=[f"{kind}_attention" for kind in ("linear", "full", "linear", "full")],
            **dict(zip(names, [alpha, beta] * 3, strict=True)),
        )
    )  # fmt: skip

    def block(layer: Layer, letter: str) -> Weights:
        found = {**norms(layer), **experts(layer), **(attention(layer) if letter == "a" else lightning(layer))}
        for name in ("mixer.out_proj.weight", "ffn.experts.down_proj.weight"):
            found[name] = found[name] * (beta / alpha)
        return found

    def lightning(layer: Layer) -> Weights:
        by_head = layer.joined("self_attn.qkv_proj").view(4, 3, 8, WIDTH)
        return {
            "mixer.qkv_proj.weight": by_head.transpose(0, 1).reshape(-1, WIDTH),
            "mixer.gate_proj.weight": layer.joined("self_attn.output_gate"),
            "mixer.norm.weight": layer.joined("self_attn.norm"),
            "mixer.out_proj.weight": layer.joined("self_attn.out_proj"),
        }

    mixers = {
        "l": partial(LightningAttention, heads=4, norm_eps=1e-6),
        "a": partial(Attention, heads=4, kv_heads=2, rope_base=1e6),
    }
    ffn = partial(MoE, experts=6, active=2, shared=0, d_hidden=20, score="softmax")
    return Case(theirs, {"pattern": "la", "layers": 4, "mixers": mixers, "ffn": ffn, "residual": "norm"}, block)


def qwen3_next() -> Case:
    """Gated DeltaNet with values in more heads than keys, gated attention, experts with a gated shared one."""
    theirs = transformers.Qwen3NextForCausalLM(
        transformers.Qwen3NextConfig(
            **SMALL, **HEADS, head_dim=16, intermediate_size=48, num_hidden_layers=4, linear_key_head_dim=8,
            linear_value_head_dim=12, linear_num_key_heads=2, linear_num_value_heads=6, moe_intermediate_size=20,
            shared_expert_intermediate_size=20, num_experts=6, num_experts_per_tok=3, mlp_only_layers=[0],
        )
    )  # fmt: skip

    def block(layer: Layer, letter: str) -> Weights:
        found = {**norms(layer), **(gated_attention(layer) if letter == "a" else delta(layer))}
        if letter == "f":
            return found | dense(layer, "mlp")
        shared = dense(layer, "mlp.shared_expert")
        return {
            **found,
            **experts(layer),
            **{name.replace("ffn.", "ffn.shared."): value for name, value in shared.items()},
            "ffn.shared_gate.weight": layer.joined("mlp.shared_expert_gate"),
        }

    def delta(layer: Layer) -> Weights:
        """A group of theirs has a query, a key, three values and their gates; another matrix has β and the decays."""
        at = layer.under("linear_attn")
        qkvz = at["in_proj_qkvz.weight"].view(2, 8 + 8 + 36 + 36, WIDTH).split([8, 8, 36, 36], dim=1)
        q, k, v, gate = (x.reshape(-1, WIDTH) for x in qkvz)
        step, decay = (x.reshape(-1, WIDTH) for x in at["in_proj_ba.weight"].view(2, 6, WIDTH).split(3, dim=1))
        kept = ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")
        return {
            "mixer.qkv_proj.weight": torch.cat([q, k, v]),
            "mixer.gate_proj.weight": gate,
            "mixer.beta_proj.weight": step,
            "mixer.decay_proj.weight": decay,
            **{f"mixer.{name}": at[name] for name in kept},
        }

    def gated_attention(layer: Layer) -> Weights:
        """A head of theirs has its query, then its gate."""
        query, gate = layer.joined("self_attn.q_proj").view(4, 2, 16, WIDTH).unbind(1)
        return {
            "mixer.qkv_proj.weight": torch.cat(
                [query.reshape(64, WIDTH), layer.joined("self_attn.k_proj", "self_attn.v_proj")]
            ),
            "mixer.gate_proj.weight": gate.reshape(64, WIDTH),
            "mixer.q_norm.weight": 1 + layer.joined("self_attn.q_norm"),
            "mixer.k_norm.weight": 1 + layer.joined("self_attn.k_norm"),
            "mixer.out_proj.weight": layer.joined("self_attn.o_proj"),
        }

    net = partial(GatedDeltaNet, heads=6, groups=2, head_dim=8, expand_v=1.5, norm_eps=1e-6)
    mixers = {
        "f": net,
        "d": net,
        "a": partial(
            Attention, heads=4, kv_heads=2, head_dim=16, gate=True, qk_norm=True, partial_rotary=0.25, norm_eps=1e-6
        ),
    }
    ffn = partial(MoE, experts=6, active=3, shared=1, shared_gate=True, d_hidden=20, score="softmax")
    ffns = {"f": partial(SwiGLU, d_hidden=48)}
    ours = {"pattern": "fdda", "mixers": mixers, "ffn": ffn, "ffns": ffns, "norm_eps": 1e-6}
    return Case(theirs, ours, block, one=1.0)


def granite() -> Case:
    """Mamba2 and attention without positions, experts and two shared ones; factors nearly everywhere."""
    embeds, residual, score, logits = 3.0, 0.6, 0.25, 0.4
    theirs = transformers.GraniteMoeHybridForCausalLM(
        transformers.GraniteMoeHybridConfig(
            **SMALL, **HEADS, **MAMBA, intermediate_size=16, shared_intermediate_size=32, num_hidden_layers=4,
            num_local_experts=6, num_experts_per_tok=3, layer_types=["mamba", "attention", "mamba", "attention"],
            embedding_multiplier=embeds, residual_multiplier=residual, attention_multiplier=score,
            logits_scaling=logits,
        )
    )  # fmt: skip

    def block(layer: Layer, letter: str) -> Weights:
        mixer = mamba(layer) if letter == "m" else attention(layer, score=score * 8**0.5)  # ours divides by √8
        found = {
            **norms(layer),
            **mixer,
            **experts(layer, "block_sparse_moe", "router"),
            "ffn.shared.gate_up_proj.weight": layer.joined("shared_mlp.input_linear"),
            "ffn.shared.down_proj.weight": layer.joined("shared_mlp.output_linear"),
        }
        for name in ("mixer.out_proj.weight", "ffn.experts.down_proj.weight", "ffn.shared.down_proj.weight"):
            found[name] = found[name] * residual
        return found

    mixers = {
        "m": partial(Mamba2, d_state=12, head_dim=8, groups=2, norm_eps=1e-6),
        "a": partial(Attention, heads=4, kv_heads=2, positions="none"),
    }
    ffn = partial(MoE, experts=6, active=3, shared=2, d_hidden=16, score="softmax")
    ours = {"pattern": "ma", "layers": 4, "mixers": mixers, "ffn": ffn, "norm_eps": 1e-6}
    return Case(theirs, ours, block, embeds=embeds, reads=1 / logits)


def recurrent_gemma() -> Case:
    """Griffin: RG-LRU and attention to a window, GeGLU; embeddings times the root of the width, capped logits."""
    theirs = transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(
            **{**SMALL, "tie_word_embeddings": True}, num_attention_heads=4, num_key_value_heads=1, lru_width=WIDTH,
            intermediate_size=96, num_hidden_layers=4, attention_window_size=40, logits_soft_cap=5.0,
        )
    )  # fmt: skip

    def block(layer: Layer, letter: str) -> Weights:
        found = norms(layer, "temporal_pre_norm", "channel_pre_norm") | dense(layer, "mlp_block")
        found["ffn.gate_up_proj.bias"] = layer.joined("mlp_block.gate_proj", "mlp_block.up_proj", kind="bias")
        found["ffn.down_proj.bias"] = layer.joined("mlp_block.down_proj", kind="bias")
        if letter == "a":  # with a bias in the last matrix only
            found["mixer.qkv_proj.bias"] = torch.zeros(48)
            found["mixer.out_proj.bias"] = layer.joined("temporal_block.o_proj", kind="bias")
            return found | attention(layer, "temporal_block")
        at = layer.under("temporal_block")
        for theirs, ours in (("x", "in"), ("y", "gate"), ("out", "out")):
            for kind in ("weight", "bias"):
                found[f"mixer.{ours}_proj.{kind}"] = at[f"linear_{theirs}.{kind}"]
        for kind in ("weight", "bias"):
            found[f"mixer.conv1d.{kind}"] = at[f"conv_1d.{kind}"]
            gates = [at[f"rg_lru.{gate}_gate_{kind}"] for gate in ("recurrent", "input")]
            found[f"mixer.gates_{kind}"] = torch.stack(gates) if kind == "weight" else torch.stack(gates).flatten(1)
        return found | {"mixer.rate": at["rg_lru.recurrent_param"]}

    mixers = {
        "r": partial(RGLRU, heads=4),
        "a": partial(Attention, heads=4, kv_heads=1, window=40, partial_rotary=0.5, bias=True),
    }
    ffn = partial(GeGLU, d_hidden=48, bias=True)
    ours = {"pattern": "rra", "layers": 4, "mixers": mixers, "ffn": ffn, "norm_eps": 1e-6}
    root = theirs.model.normalizer.item()  # of the width, rounded to bfloat16
    return Case(
        theirs, ours, block, norm="model.final_norm", one=1.0, embeds=root, finish=lambda x: 5 * torch.tanh(x / 5)
    )


def mixtral() -> Case:
    """Attention to a window, experts."""
    theirs = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **SMALL, **HEADS, intermediate_size=20, num_hidden_layers=2, num_local_experts=6, num_experts_per_tok=2,
            sliding_window=50,
        )
    )  # fmt: skip
    mixers = {"a": partial(Attention, heads=4, kv_heads=2, window=50, rope_base=1e6)}
    ffn = partial(MoE, experts=6, active=2, shared=0, d_hidden=20, score="softmax")
    return Case(
        theirs,
        {"pattern": "aa", "mixers": mixers, "ffn": ffn},
        lambda layer, _: norms(layer) | attention(layer) | experts(layer),
    )


def olmoe() -> Case:
    """Queries and keys normed over all heads together; weights of experts that do not add up to one."""
    theirs = transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(
            **SMALL, **HEADS, intermediate_size=20, num_hidden_layers=2, num_experts=8, num_experts_per_tok=3
        )
    )
    mixers = {"a": partial(Attention, heads=4, kv_heads=2, qk_norm="row", norm_eps=1e-5)}
    ffn = partial(MoE, experts=8, active=3, shared=0, d_hidden=20, score="softmax", normalize=False)
    return Case(
        theirs,
        {"pattern": "aa", "mixers": mixers, "ffn": ffn},
        lambda layer, _: {
            **norms(layer),
            **attention(layer),
            **experts(layer),
            **{f"mixer.{x}_norm.weight": layer.joined(f"self_attn.{x}_norm") for x in "qk"},
        },
    )


CASES = {case.__name__: case for case in (mamba2, bamba, minimax, qwen3_next, granite, recurrent_gemma, mixtral, olmoe)}


# --- what is compared -------------------------------------------------------------------------------------------------


@cache
def pair(name: str) -> tuple[Case, Backbone, LanguageHead]:
    """Their model with weights that are no initial values, and ours with the same."""
    torch.manual_seed(3)
    case = CASES[name]()
    case.theirs.eval()
    with torch.no_grad():
        for parameter in case.theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours = Backbone(BackboneConfig(vocab_size=VOCABULARY, d_model=WIDTH, **case.ours)).eval()
    state = case.theirs.state_dict()
    weights = {
        "embedding.weight": state[f"{case.embedding}.weight"] * case.embeds,
        "norm.weight": (case.one + state[f"{case.norm}.weight"]) * case.reads,
    }
    blocks = f"{case.norm.split('.')[0]}.layers"
    for number, letter in enumerate(ours.letters):
        start = f"{blocks}.{number}."
        layer = Layer({key.removeprefix(start): value for key, value in state.items() if key.startswith(start)})
        for key, value in case.block(layer, letter).items():
            ours_norm = key in ("mixer_norm.weight", "ffn_norm.weight")
            weights[f"blocks.{number}.{key}"] = value + case.one if ours_norm else value
    ours.load_state_dict(weights, strict=True)
    head = LanguageHead(WIDTH, VOCABULARY)
    head.load_state_dict({"weight": state["lm_head.weight"]}, strict=True)
    return case, ours, head


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, length: int) -> None:
    """At once, and in windows with the state carried."""
    case, ours, head = pair(name)
    tokens = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = case.theirs(tokens, use_cache=False).logits
        assert 0.5 < expected.std() < 5, "logits too small or too large to compare"
        found = case.finish(head.logits(ours(SequenceBatch(tokens=tokens)).hidden))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        state, parts = ours.initial_state(2, "cpu", torch.float32), []
        for window in tokens.split([1, 1, length - 2], dim=1):
            result = ours(SequenceBatch(tokens=window), state)
            state = result.state
            parts.append(case.finish(head.logits(result.hidden)))
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_in_any_weight_would_be_seen(name: str) -> None:
    """A fifth more or less in any one of them moves logits by more than ten times what the comparison allows."""
    _, ours, head = pair(name)
    tokens = torch.randint(0, VOCABULARY, (1, 40))
    unfelt = []
    with torch.no_grad():
        before = head.logits(ours(SequenceBatch(tokens=tokens)).hidden)
        for where, weight in [*ours.named_parameters(), ("head", head.matrix)]:
            kept = weight.clone()
            weight += 0.2 * (float(weight.abs().mean()) or 1.0) * torch.randn_like(weight)
            moved = (head.logits(ours(SequenceBatch(tokens=tokens)).hidden) - before).abs().max()
            weight.copy_(kept)
            if moved < 1e-3:
                unfelt.append(f"{where}: {float(moved):.1e}")
    assert unfelt == []
