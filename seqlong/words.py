"""``seqlong words``: our words, and what other libraries call the same thing.

What a mixer, a feed-forward or a setting is, its docstring says; what others call it stands here, in ``PEERS``.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from seqlong.errors import SeqlongError, nearest

HELP = """Our words for mixers, feed-forwards, ops, settings and ideas, and what fla, mamba-ssm, transformers and
Megatron (with Linear-MoE, which is built on it) call them. Classes of transformers are examples: each model has one."""
EXAMPLES = """examples:
  seqlong words                   all of them
  seqlong words swa               what is there of sliding-window attention
  seqlong words num_key_value     a name of another library, or a flag of Megatron, such as --moe-router-topk
  seqlong words decay gate        rows that have both
  seqlong words window --json -   for a program"""


@dataclass(frozen=True)
class Peers:
    """Names of one thing elsewhere; empty where a library does not have it, or not as a thing with a name.

    Attributes:
        fla: flash-linear-attention 0.6.
        mamba: mamba-ssm 2.3.
        transformers: 5.x.
        megatron: Megatron-LM and Linear-MoE, settings as flags.
        also: other words for it, in papers and in speech.
        what: a sentence; for ops and ideas, since the others have docstrings.
    """

    fla: str = ""
    mamba: str = ""
    transformers: str = ""
    megatron: str = ""
    also: str = ""
    what: str = ""


# fmt: off
PEERS: dict[str, dict[str, Peers]] = {
    "mixer": {
        "Attention": Peers("Attention", "MHA", "LlamaAttention", "SelfAttention",
            "softmax attention, MHA, GQA, MQA, SWA"),
        "Based": Peers("BasedLinearAttention", "", "", "based (Linear-MoE)", "Taylor feature map"),
        "Bidirectional": Peers(also="BiMamba, two directions, masked modelling"),
        "CosFormer2": Peers(also="LRPE, linear attention with cosine decay, xmixers"),
        "Convolution": Peers(also="CNN, motif, position weight matrix, convolution stem"),
        "DeltaNet": Peers("DeltaNet", "", "", "deltanet (Linear-MoE)", "delta rule, fast weights"),
        "DifferentialAttention": Peers("", "", "DiffLlamaAttention", "", "Diff Transformer, differential transformer"),
        "GLA": Peers("GatedLinearAttention", "", "", "gla (Linear-MoE)", "gated linear attention, ReGLA"),
        "GatedDeltaNet": Peers(
            "GatedDeltaNet", "", "Qwen3NextGatedDeltaNet", "GatedDeltaNet; gated_deltanet (Linear-MoE)", "GDN"
        ),
        "HGRN2": Peers("HGRN2Attention", "", "", "hgrn2 (Linear-MoE)", "hierarchically gated RNN"),
        "Hedgehog": Peers("HedgehogFeatureMap", also="LoLCATs, learnt feature map, linearisation"),
        "KDA": Peers(
            "KimiDeltaAttention", "", "KimiLinearDeltaAttention", "KimiDeltaAttention", "Kimi delta attention"
        ),
        "LatentAttention": Peers("MultiheadLatentAttention", "", "DeepseekV2Attention, DeepseekV3Attention",
            "MLASelfAttention", "MLA, multi-head latent attention, DeepSeek, Kimi"),
        "LightningAttention": Peers(
            "chunk_lightning_attn", "", "MiniMaxLightningAttention", "lightning_attention (Linear-MoE)",
            "TransNormerLLM, TNL, MiniMax-01, Ring-linear",
        ),
        "LinearAttention": Peers(
            "LinearAttention", "", "", "basic_linear_attention (Linear-MoE)", "BLA, kernel attention, TransNormer"
        ),
        "LogLinearGatedDeltaNet": Peers(also="log-linear attention, Fenwick tree"),
        "LogLinearMamba2": Peers("LogLinearMamba2", also="log-linear attention, Fenwick tree"),
        "Mamba1": Peers("Mamba", "Mamba", "MambaMixer, FalconMambaMixer, JambaMambaMixer", "", "S6, selective scan"),
        "Mamba2": Peers("Mamba2", "Mamba2", "Mamba2Mixer, BambaMixer", "MambaMixer", "SSD, SSM, state space duality"),
        "MLSTM": Peers(also="xLSTM, matrix LSTM, TFLA"),
        "MoBA": Peers("", also="mixture of block attention, Kimi, block selection"),
        "MoH": Peers(also="mixture of heads, heads as experts, attention MoE"),
        "MoM": Peers("MomAttention", "", "", "mom_linear_attention (Linear-MoE)", "mixture of memories"),
        "NativeSparseAttention": Peers("NativeSparseAttention", also="NSA, DeepSeek, block selection"),
        "GatedMemoryUnit": Peers(also="GMU, SambaY, memory sharing"),
        "Parallel": Peers("", "", "FalconH1DecoderLayer", "",
            "hybrid heads, parallel heads, Hymba, Falcon-H1, attention beside SSM"),
        "PrefixAttention": Peers(also="prefix-LM, prefix mask, UniLM, non-causal prefix"),
        "PrefixMixer": Peers(also="JRT-RNN, prefix linear attention, PLA, bidirectional prefix, Birdie"),
        "RGLRU": Peers("", "", "RecurrentGemmaRglru", "", "Griffin, RG-LRU, Hawk"),
        "RWKV6": Peers("RWKV6Attention", "", "", "rwkv6 (Linear-MoE)", "RWKV-6, Finch"),
        "RWKV7": Peers("RWKV7Attention", "", "", "rwkv7 (Linear-MoE)", "RWKV-7, Goose"),
        "Rat": Peers(also="RAT, recurrence and attention, chunked recurrence"),
        "RetNet": Peers("MultiScaleRetention", "", "", "retention (Linear-MoE)", "retention"),
        "Scout": Peers(also="SCOUT, checkpoint tokens, segment compression"),
        "S4D": Peers(also="S4, diagonal state space, S4D-Lin, LTI"),
        "SSE": Peers("SSEGLA", also="sparse state expansion, row-sparse update"),
        "SharedAttention": Peers("", "", "num_kv_shared_layers (Gemma3n)", "",
            "YOCO, SambaY, cross-decoder, cross-layer KV sharing, shared KV cache"),
        "SimpleGLA": Peers("SimpleGatedLinearAttention", also="scalar-gated linear attention, mLSTM without its norm"),
        "SwitchHead": Peers(also="MoE attention, attention-MoE, mixture of attention heads, SwitchAll"),
    },
    "feed-forward": {
        "GELU": Peers("", "", "GPT2MLP", "MLP", "plain MLP"),
        "GeGLU": Peers("", "", "GemmaMLP, RecurrentGemmaMlp", "", "gated MLP, GEGLU"),
        "MoE": Peers("", "", "MixtralSparseMoeBlock, DeepseekV3MoE", "MoELayer",
            "mixture of experts, sparse feed-forward"),
        "SwiGLU": Peers("GatedMLP", "GatedMLP", "LlamaMLP", "MLP with --swiglu", "gated MLP"),
    },
    "op": {
        "attention": Peers(
            "parallel_attn", "flash_attn_func", "scaled_dot_product_attention", "DotProductAttention",
            "flash attention",
            what="Softmax attention over segments, windows and a cache.",
        ),
        "block_attention": Peers("parallel_nsa", also="block-sparse attention, selected attention",
            what="Softmax attention of a query over its own block and a few that it chose."),
        "bidirectional_decay": Peers(what="scalar_decay from both ends at once.", also="LION"),
        "delta_rule": Peers(
            "chunk_delta_rule, chunk_gated_delta_rule, chunk_kda", "", "torch_chunk_gated_delta_rule", "",
            "WY representation, UT transform", "A token replaces what memory holds under its key.",
        ),
        "dplr": Peers("chunk_dplr_delta_rule, chunk_rwkv7",
            what="State times a diagonal plus a low-rank matrix (RWKV-7)."),
        "gated_rms_norm": Peers(
            "FusedRMSNormGated", "RMSNormGated", "MambaRMSNormGated", "", what="RMSNorm of x times SiLU of a gate."
        ),
        "grouped_matmul": Peers(
            "", "", "grouped_mm", "GroupedMLP, --moe-grouped-gemm", "grouped GEMM, MegaBlocks",
            "Each expert's rows times its matrix, in one call.",
        ),
        "linear_cross_entropy": Peers(
            "FusedLinearCrossEntropyLoss", "", "", "", "fused loss, Liger, cut cross-entropy",
            "The head and the loss, without holding all logits.",
        ),
        "log_linear": Peers(
            "chunk_log_linear_attn", also="Fenwick tree", what="A decayed state for each scale of distance."
        ),
        "rms_norm": Peers("RMSNorm", "RMSNorm", "LlamaRMSNorm", "--normalization RMSNorm",
            what="Divides by the root mean square."),
        "rotary": Peers("RotaryEmbedding", "RotaryEmbedding", "apply_rotary_pos_emb", "RotaryEmbedding", "RoPE",
            "Rotates q and k."),
        "scalar_decay": Peers(
            "chunk_simple_gla, chunk_retention, chunk_lightning_attn, chunk_linear_attn", "", "", "",
            "linear recurrence, gated linear attention", "A state that fades by a number a head.",
        ),
        "selective_scan": Peers("", "selective_scan_fn", "mamba_inner_fn", "", "S6, associative scan",
            "A state of n numbers a channel, each with its decay."),
        "short_conv": Peers(
            "causal_conv1d, ShortConvolution", "causal_conv1d_fn", "causal_conv1d_fn", "causal_conv1d",
            "depthwise convolution, token mixing",
            "A few taps over the last tokens, each channel by itself, then SiLU.",
        ),
        "ssd": Peers("", "mamba_chunk_scan_combined", "mamba2_chunk_scan", "mamba_chunk_scan_combined",
                     "state space duality", "The state space of Mamba2: scalar_decay with steps dt and a skip D."),
        "summary_attention": Peers("parallel_nsa_compression", also="compressed attention, checkpoints",
            what="Softmax attention over one key a stretch of tokens, and the query's own."),
        "vector_decay": Peers(
            "chunk_gla, chunk_rwkv6", also="diagonal decay", what="A state that fades by a number a channel of the key."
        ),
    },
    "setting": {
        "a_max": Peers("A_init_range", "A_init_range", also="decay rates"),
        "a_min": Peers("A_init_range", "A_init_range", also="decay rates"),
        "active": Peers("", "", "num_experts_per_tok", "--moe-router-topk", "top-k, k experts"),
        "balance_loss": Peers("", "", "router_aux_loss_coef", "--moe-aux-loss-coeff", "auxiliary loss, load balancing"),
        "axes": Peers(also="MD-LRPE, LRPE on several axes, multi-axis"),
        "base": Peers("rope_theta", also="theta"),
        "bias": Peers("qkv_bias", "", "attention_bias", "--add-qkv-bias, --disable-bias-linear"),
        "bias_rate": Peers("", "", "", "--moe-router-bias-update-rate", "aux-loss-free balancing, expert bias"),
        "causal": Peers("", "causal", "is_causal", "attn_mask_type"),
        "checkpointing": Peers(
            "", "", "gradient_checkpointing", "--recompute-granularity, --recompute-activations",
            "activation checkpointing, remat",
        ),
        "choice": Peers("", "", "", "", "expert choice, token choice"),
        "conv_bias": Peers("conv_bias, use_conv_bias", "conv_bias", "use_conv_bias", ""),
        "conv_width": Peers(
            "conv_size, use_short_conv, conv_kernel", "d_conv", "conv_kernel, linear_conv_kernel_dim", "", "kernel size"
        ),
        "d_hidden": Peers(
            "intermediate_size", "d_intermediate", "intermediate_size, moe_intermediate_size",
            "--ffn-hidden-size, --moe-ffn-hidden-size", "d_ff",
        ),
        "d_model": Peers("hidden_size", "d_model", "hidden_size", "--hidden-size", "width, n_embd"),
        "d_state": Peers("state_size", "d_state", "state_size, ssm_state_size", "--mamba-state-dim", "N"),
        "decay_rank": Peers("gate_low_rank_dim, decay_low_rank_dim", also="LoRA"),
        "divisor": Peers("gate_logit_normalizer"),
        "dt_floor": Peers("dt_init_floor", "dt_init_floor", "time_step_floor", ""),
        "dt_max": Peers("dt_max", "dt_max", "time_step_max", ""),
        "dt_rank": Peers("time_step_rank", "dt_rank", "time_step_rank, mamba_dt_rank", ""),
        "dt_min": Peers("dt_min", "dt_min", "time_step_min", ""),
        "expand": Peers("expand, hidden_ratio", "expand", "expand", ""),
        "expand_k": Peers("expand_k, expand_ratio", "", "linear_key_head_dim", ""),
        "expand_v": Peers("expand_v", "", "linear_value_head_dim", ""),
        "erase_rank": Peers("a_low_rank_dim", also="LoRA"),
        "experts": Peers("", "", "num_local_experts, num_experts, n_routed_experts", "--num-experts"),
        "feature": Peers("feature_map", "", "", "--la-feature-map (Linear-MoE)", "kernel function"),
        "ffn": Peers("", "mlp_cls", "mlp", "mlp", "feed-forward"),
        "gate": Peers("use_output_gate, use_gate, gate_fn", "", "",
            "--attention-output-gate; --la-gate-fn (Linear-MoE)", "output gate, gated attention"),
        "gate_rank": Peers("gate_low_rank_dim", also="low-rank gate, LoRA"),
        "groups": Peers("n_groups, num_heads beside num_v_heads", "ngroups", "n_groups, linear_num_key_heads",
            "--mamba-num-groups"),
        "head_dim": Peers("head_dim", "headdim, head_dim", "head_dim", "--kv-channels, --mamba-head-dim", "P"),
        "heads": Peers("num_heads", "num_heads", "num_attention_heads, linear_num_value_heads",
            "--num-attention-heads", "n_head"),
        "identity": Peers("", "", "zero_expert_num", "", "zero-computation experts, null experts"),
        "identity_share": Peers(also="zero-computation experts"),
        "implementation": Peers("mode, backend", "", "experts_implementation", "--la-mode (Linear-MoE)", "backend"),
        "kv_heads": Peers("num_kv_heads", "num_heads_kv", "num_key_value_heads", "--num-query-groups",
            "GQA, MQA, n_query_groups"),
        "layers": Peers("num_hidden_layers", "n_layer", "num_hidden_layers", "--num-layers", "depth, blocks"),
        "mix_rank": Peers("proj_low_rank_dim", also="LoRA"),
        "lrpe": Peers(also="LRPE, linearised relative positional encoding, linear_use_lrpe (TransNormerLLM)"),
        "memories": Peers("num_memories", also="mixture of memories"),
        "mixer": Peers("", "mixer_cls", "", "", "wrapped mixer"),
        "mixers": Peers("attn", "ssm_cfg, attn_cfg", "", "--la-module (Linear-MoE)"),
        "negative_eigenvalues": Peers("allow_neg_eigval", also="beta times two"),
        "norm": Peers("fuse_norm", "rms_norm", "", "--normalization", "LayerNorm, RMSNorm"),
        "norm_eps": Peers("norm_eps", "norm_epsilon", "rms_norm_eps, layer_norm_epsilon", "--norm-epsilon"),
        "normalize": Peers("", "", "norm_topk_prob", "", "renormalise"),
        "parts": Peers("num_sparse_partition", also="partitions of a state"),
        "partial_rotary": Peers("", "rotary_emb_dim", "partial_rotary_factor", "--rotary-percent", "partial RoPE"),
        "pattern": Peers(
            "attn: {layers: ...}", "attn_layer_idx", "layer_types, layers_block_type",
            "--hybrid-override-pattern; --layer-type-list (Linear-MoE)", "hybrid, layer pattern, attn_type_list",
        ),
        "positions": Peers("rope_theta: null for none", "", "rope_parameters", "--position-embedding-type",
            "RoPE, ALiBi, NoPE"),
        "qk_norm": Peers("qk_norm", "", "use_qk_norm", "--qk-layernorm", "query-key normalisation, QK-Norm"),
        "reads": Peers("", "", "num_kv_shared_layers", "", "YOCO, SambaY, KV sharing, memory sharing"),
        "rc": Peers(also="Caduceus, RCPS, reverse-complement equivariance"),
        "recompute": Peers("", "use_mem_eff_path", "", "--recompute-modules"),
        "refine": Peers(also="ReGLA, refining gate, refined gate"),
        "residual": Peers("", "", "linear_attn_alpha_factor (MiniMax)", "--apply-residual-connection-post-layernorm",
            "DeepNorm, post-norm"),
        "residual_in_fp32": Peers("", "residual_in_fp32", "residual_in_fp32", "--fp32-residual-connection"),
        "rope_base": Peers("rope_theta", "rotary_emb_base", "rope_theta", "--rotary-base", "theta"),
        "rope_axes": Peers("", "", "mrope_section", "--mrope-section",
            "M-RoPE, 3-D RoPE, axial RoPE, multi-axis"),
        "rope_scale": Peers("", "", "rope_type: linear, factor", "--rotary-seq-len-interpolation-factor",
            "position interpolation, linear scaling"),
        "safe": Peers("safe_gate, lower_bound", "", "kda_safe_gate, kda_lower_bound", ""),
        "scale": Peers("", "", "routed_scaling_factor", "--moe-router-topk-scaling-factor"),
        "score": Peers("", "", "scoring_func", "--moe-router-score-function"),
        "shared": Peers("", "", "n_shared_experts, shared_expert_intermediate_size",
            "--moe-shared-expert-intermediate-size"),
        "sinks": Peers(also="StreamingLLM, attention sinks, global tokens"),
        "shared_gate": Peers("", "", "shared_expert_gate", "--moe-shared-expert-gate"),
        "tied": Peers(also="shared weights"),
        "tile": Peers(also="chunked prefill, tiled MLP, ALST"),
        "vocab_size": Peers("vocab_size", "vocab_size", "vocab_size", "--vocab-size, --make-vocab-size-divisible-by"),
        "window": Peers(
            "window_size", "", "sliding_window", "--window-size",
            "SWA, sliding-window attention, local attention, local_window"
        ),
        "z_loss": Peers("", "", "router_z_loss_coef", "--moe-z-loss-coeff", "router z-loss"),
    },
    "idea": {
        "block": Peers("Block", "Block", "DecoderLayer", "TransformerLayer, MambaLayer", "layer",
            "A mixer, then a feed-forward."),
        "chunk": Peers("chunk_size, BT", "chunk_size", "chunk_size", "", "", "Consecutive positions inside a kernel."),
        "layout": Peers(
            "cu_seqlens, attention_mask", "cu_seqlens, seq_idx", "attention_mask, position_ids", "PackedSeqParams",
            "varlen, ragged, packing", "Where segments begin and end in packed rows.",
        ),
        "expand, oscillation, shrink": Peers(also="LCSM, EOS, linear complex sequence model",
            what="What a linear mixer writes, how it fades, how it is read: the table of docs/mixers.md."),
        "router": Peers("", "", "gate, router", "TopKRouter", "MoE gate",
            "Chooses experts: of a feed-forward, or heads, memories and parts of a state inside of a mixer."),
        "segment": Peers("", "seq_idx", "", "", "document, sequence, sample", "One document inside a packed row."),
        "state": Peers(
            "Cache, recurrent_state, conv_state", "InferenceParams, ssm_state, conv_state",
            "DynamicCache, past_key_values",
            "InferenceContext", "KV cache, memory, hidden state", "What a mixer carries from window to window.",
        ),
        "tie_embeddings": Peers(
            "tie_word_embeddings", "tie_embeddings", "tie_word_embeddings", "--untie-embeddings-and-output-weights", "",
            "The head's weight is the embedding's (task.tie_embeddings).",
        ),
        "upcycling": Peers(also="LLaMA-MoE, sparse upcycling, neuron partition",
            what="A dense feed-forward cut into experts (seqlong.ffn.upcycle)."),
        "window of a row": Peers("", "", "", "--seq-length", "block_size, context length, max_position_embeddings",
            "A row of data.length positions."),
    },
}
# fmt: on


@dataclass(frozen=True)
class Entry:
    """A row of the table: our word, its kind, what it is, where a setting is to be found, and its names elsewhere."""

    word: str
    kind: str
    what: str
    where: str
    peers: Peers

    def has(self, text: str) -> bool:
        """Whether ``text`` is in any column, whatever its case."""
        columns = (self.word, self.kind, self.what, self.where, *asdict(self.peers).values())
        return any(text.lower() in column.lower() for column in columns)

    def named(self, text: str) -> bool:
        """Whether ``text`` is in a name, ours or another's, rather than in a sentence."""
        names = (self.word, *(value for key, value in asdict(self.peers).items() if key != "what"))
        return any(text.lower() in name.lower() for name in names)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SeqlongError(f"seqlong words: {message}; `seqlong words --help` lists what it takes")


def command(arguments: Sequence[str]) -> int:
    """``seqlong words``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the arguments, or a word that is nowhere.
    """
    parser = _Parser(
        prog="seqlong words", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("search", nargs="*", metavar="WORD", help="only rows with these words, in any column")
    parser.add_argument("--json", metavar="PATH", help="write the rows as JSON; - for the terminal, alone")
    given, flags = parser.parse_known_args(list(arguments))  # a flag that is not ours is a name to look up
    rows = find(vocabulary(), [*given.search, *flags])
    if given.json:
        _write_json(given.json, rows)
    if given.json != "-":
        _print(rows)
    return 0


def vocabulary() -> list[Entry]:
    """Every word: mixers and feed-forwards there are, ops, settings, ideas."""
    import seqlong.ffn
    import seqlong.mixers
    from seqlong.backbone import BackboneConfig
    from seqlong.kernels.probes import PROBES
    from seqlong.mixers import Mixer

    mixers = {n: c for n, c in _classes(seqlong.mixers).items() if issubclass(c, Mixer) and c is not Mixer}
    feeds = _classes(seqlong.ffn)
    entries = []
    for kind, classes in (("mixer", mixers), ("feed-forward", feeds)):
        for name, target in sorted(classes.items()):
            what = (inspect.getdoc(target) or "").split("\n\n")[0]
            entries.append(Entry(name, kind, " ".join(what.split()), "", PEERS[kind].get(name, Peers())))
    for name in sorted(PROBES):
        peers = PEERS["op"].get(name, Peers())
        entries.append(Entry(name, "op", peers.what, "", peers))
    owners = {**mixers, **feeds, "model.backbone": BackboneConfig}
    for name, (what, where) in sorted(_settings(owners).items()):
        entries.append(Entry(name, "setting", what, where, PEERS["setting"].get(name, Peers())))
    return entries + [Entry(name, "idea", peers.what, "", peers) for name, peers in PEERS["idea"].items()]


def find(entries: Sequence[Entry], search: Sequence[str]) -> list[Entry]:
    """Rows with all words of ``search``: in their names if any have them there, else in any column.

    Raises:
        SeqlongError: there are none.
    """
    for matches in (Entry.named, Entry.has):
        rows = [entry for entry in entries if all(matches(entry, word) for word in search)]
        if rows:
            return rows
    near = nearest(search[0], _names(entries))
    raise SeqlongError(f"no word has '{' '.join(search)}'{near or '; seqlong words lists them all'}")


def _classes(module: Any) -> dict[str, Any]:
    return {name: target for name in module.__all__ if inspect.isclass(target := getattr(module, name))}


def _settings(owners: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Setting -> (what it is, the classes that have it)."""
    from docstring_parser import parse  # comes with jsonargparse[signatures]

    texts: dict[str, str] = {}
    places: dict[str, list[str]] = {}
    for owner, target in owners.items():
        said = {p.arg_name: " ".join((p.description or "").split()) for p in parse(inspect.getdoc(target) or "").params}
        names: Iterable[str] = inspect.signature(target).parameters
        if dataclasses.is_dataclass(target):
            names = [field.name for field in dataclasses.fields(target)]
        for name in names:
            places.setdefault(name, []).append(owner)
            texts[name] = texts.get(name) or said.get(name, "")
    return {name: (texts.get(name, ""), ", ".join(where)) for name, where in places.items()}


def _names(entries: Sequence[Entry]) -> list[str]:
    """All names, ours and the others', one by one."""
    found = [entry.word for entry in entries]
    for entry in entries:
        for column in (entry.peers.fla, entry.peers.mamba, entry.peers.transformers, entry.peers.megatron):
            found += [name.strip() for name in column.replace(";", ",").split(",") if name.strip()]
    return found


def _write_json(path: str, rows: Sequence[Entry]) -> None:
    from pathlib import Path

    text = json.dumps([asdict(row) for row in rows], indent=1)
    if path == "-":
        print(text)
        return
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        raise SeqlongError(f"--json {path}: {error.strerror}") from error


def _print(rows: Sequence[Entry]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title, width in (
        ("seqlong", 20),
        ("what", 40),
        ("fla", 18),
        ("mamba-ssm", 14),
        ("transformers", 18),
        ("Megatron", 18),
    ):
        table.add_column(title, overflow="fold", max_width=width if title != "what" else None)
    kind = None
    for row in rows:
        if row.kind != kind:
            kind = row.kind
            table.add_row(f"[bold]{kind}[/bold]")
        peers = (row.peers.fla, row.peers.mamba, row.peers.transformers, row.peers.megatron)
        what = _short(row.what) + (f" [dim]({escape(_listed(row.where))})[/dim]" if row.where else "")
        table.add_row(escape(row.word), what, *map(escape, peers))
    console.print(table)


def _short(text: str, most: int = 90) -> str:
    """The first sentence, cut if it is long, for the terminal; JSON has all."""
    from rich.markup import escape

    sentence = text.split(". ")[0].rstrip(".").replace("``", "")
    return escape(sentence if len(sentence) <= most else sentence[: most - 3] + "...")


def _listed(where: str, most: int = 3) -> str:
    names = where.split(", ")
    return where if len(names) <= most else ", ".join(names[:most]) + f" and {len(names) - most} more"
