"""``seqlong show`` and ``words``: costs against counters and running models, presets against published sizes."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import seqlong.ffn
import seqlong.mixers
from seqlong.cli import main
from seqlong.compose import compose, dump
from seqlong.config_files import options
from seqlong.cost import OPERATIONS, Cost, Term, _tensors, buckets_in_use, feed_forward_cost, mixer_cost, products, seen
from seqlong.kernels.delta_rule.reference import delta_rule_reference
from seqlong.kernels.dplr.reference import dplr_reference
from seqlong.kernels.probes import PROBES
from seqlong.kernels.scalar_decay.reference import scalar_decay_reference
from seqlong.kernels.vector_decay.reference import vector_decay_reference
from seqlong.layout import SequenceLayout
from seqlong.mixers import (
    Attention,
    Bidirectional,
    Convolution,
    Mamba2,
    Mixer,
    MoBA,
    NativeSparseAttention,
    PrefixMixer,
)
from seqlong.show import repeated, show
from seqlong.words import PEERS, vocabulary

WIDTH = 64
MIXERS = {
    name: target
    for name in seqlong.mixers.__all__
    if inspect.isclass(target := getattr(seqlong.mixers, name))
    and issubclass(target, Mixer)
    and target not in (Mixer, Bidirectional, Convolution, PrefixMixer)
}
VARIANTS: dict[str, Any] = {
    **{name: mixer for name, mixer in MIXERS.items() if not mixer.reads_memory},  # those: tests/test_sharing.py
    "window": lambda d: Attention(d, heads=4, kv_heads=2, window=9),
    "short window": lambda d: Attention(d, heads=4, window=99),
    "gate, norms and sinks": lambda d: Attention(d, heads=4, window=9, gate=True, qk_norm=True, sinks=3),
    "grouped Mamba2": lambda d: Mamba2(d, d_state=16, head_dim=16, groups=2),
}
#: Mixers, as they come, that do more for a token the longer the row is.
GROWING = (
    "Attention",
    "DifferentialAttention",
    "LatentAttention",
    "MoH",
    "Parallel",
    "PrefixAttention",
    "Rat",
    "Scout",
    "SwitchHead",
)
GROWING_SLOWLY = ("MoBA", "NativeSparseAttention")


# --- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"MoM", "MoH", "SwitchHead"}))  # tests/test_routed_mixers.py
def test_matrix_products_are_those_that_torch_counts(name: str) -> None:
    mixer = VARIANTS[name](WIDTH)
    hidden = torch.randn(1, 24, WIDTH)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(hidden, SequenceLayout.build(1, 24))
    counted = counter.get_flop_counts()["Global"]
    batched = () if name in ("MoBA", "NativeSparseAttention") else ("aten.bmm", "aten.baddbmm")  # of scores, there
    linear = sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm", *batched))
    (term,) = [term for term in products(mixer) if term.what == "products"]
    assert linear == 24 * term.flops


def test_attention_is_what_torch_counts_where_all_is_seen() -> None:
    mixer = Attention(WIDTH, heads=4, kv_heads=2, causal=False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        mixer(torch.randn(1, 24, WIDTH), SequenceLayout.build(1, 24))
    assert counter.get_total_flops() == 24 * mixer_cost(mixer, 24).flops


@pytest.mark.parametrize("window", [None, 1, 2, 7, 24, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_tokens_seen(window: int | None, causal: bool) -> None:
    length, reach = 24, 24 if window is None else window
    pairs = sum(abs(i - j) < reach and (j <= i or not causal) for i in range(length) for j in range(length))
    assert seen(length, window, causal) == pytest.approx(pairs / length)


@pytest.mark.parametrize(("window", "sinks"), [(1, 1), (7, 3), (3, 9), (20, 9), (24, 2)])
def test_sinks_beyond_the_window_are_counted(window: int, sinks: int) -> None:
    mixer = Attention(WIDTH, heads=4, window=window, sinks=sinks)
    (term,) = [term for term in mixer_cost(mixer, 24).terms if term.what == "attention"]
    pairs = sum(j <= i and (i - j < window or j < sinks) for i in range(24) for j in range(24))
    assert term.flops == pytest.approx(4 * WIDTH * pairs / 24)


@pytest.mark.parametrize("length", [1, 4, 23, 40])
def test_blocks_seen_are_counted(length: int) -> None:
    for chosen in (1, 3, 99):
        mixer = MoBA(WIDTH, heads=4, block=4, chosen=chosen)
        own = [token // 4 for token in range(length)]
        tokens = sum(token % 4 + 1 + 4 * min(chosen - 1, own[token]) for token in range(length))
        costs = {term.what: term.flops for term in mixer_cost(mixer, length).terms}
        assert costs["attention"] == pytest.approx(4 * WIDTH * tokens / length)
        assert costs["choice"] == pytest.approx(2 * WIDTH * sum(own) / length)
        nsa = NativeSparseAttention(WIDTH, heads=16, block=4, chosen=chosen, window=7)
        costs = {term.what: term.flops for term in mixer_cost(nsa, length).terms}
        local = sum(min(token + 1, 7) for token in range(length))
        assert costs["attention"] == pytest.approx(4 * WIDTH * (tokens + local) / length)
        assert costs["choice"] == pytest.approx(6 * WIDTH * sum((token + 1) // 4 for token in range(length)) / length)


@pytest.mark.parametrize("name", ["SwiGLU", "GeGLU", "GELU"])
def test_dense_feed_forwards_are_what_torch_counts(name: str) -> None:
    ffn = getattr(seqlong.ffn, name)(WIDTH)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ffn(torch.randn(1, 24, WIDTH))
    assert counter.get_total_flops() == 24 * feed_forward_cost(ffn).flops


def test_experts_cost_what_a_dense_layer_of_their_width_costs() -> None:
    moe = seqlong.ffn.MoE(WIDTH, experts=8, active=3, shared=2, d_hidden=16)
    dense = seqlong.ffn.SwiGLU(WIDTH, d_hidden=5 * 16)
    router = 2 * WIDTH * 8
    assert feed_forward_cost(moe).flops == feed_forward_cost(dense).flops + router
    lazy = seqlong.ffn.MoE(WIDTH, experts=8, active=3, shared=2, d_hidden=16, identity=8)
    router = 2 * WIDTH * 16
    assert feed_forward_cost(lazy).flops == feed_forward_cost(seqlong.ffn.SwiGLU(WIDTH, d_hidden=56)).flops + router


class Arithmetic(TorchDispatchMode):
    """Counts additions and multiplications of tensors as large as a state."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        wide = args[0] if name == "sum" else result
        if name in ("mul", "add", "sub", "sum") and isinstance(wide, Tensor) and wide.numel() == self.size:
            self.count += self.size
        return result


@pytest.mark.parametrize("mixer", ["Mixer", "GLA", "LinearAttention", "DeltaNet", "GatedDeltaNet", "KDA", "RWKV7"])
def test_recurrences_are_counted_from_their_definitions(mixer: str) -> None:
    tokens, heads, k, v = 3, 2, 5, 7
    q, key = torch.randn(2, 1, tokens, heads, k).unbind()
    value, decay, beta = torch.randn(1, tokens, heads, v), -torch.rand(1, tokens, heads), torch.rand(1, tokens, heads)
    by_channel = decay[..., None].expand(1, tokens, heads, k)
    size = heads * k * v
    with Arithmetic(size) as counter:
        if mixer in ("Mixer", "LinearAttention"):
            scalar_decay_reference(q, key, value, decay)
        elif mixer == "GLA":
            vector_decay_reference(q, key, value, by_channel)
        elif mixer == "RWKV7":
            dplr_reference(q, key, value, -key, key, by_channel)
        else:
            gate = {"DeltaNet": decay, "GatedDeltaNet": decay, "KDA": by_channel}[mixer]
            delta_rule_reference(q, key, value, beta, gate)
    decays = mixer in ("LinearAttention", "DeltaNet")  # their loop multiplies by a decay; they have none
    each, _ = OPERATIONS["Mixer" if mixer == "GLA" else mixer]
    assert counter.count == tokens * size * (each + decays)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("length", [5, 23])
def test_the_state_is_as_large_as_that_of_a_running_mixer(name: str, length: int) -> None:
    mixer = VARIANTS[name](WIDTH)
    with torch.no_grad():
        _, state = mixer(
            torch.randn(1, length, WIDTH), SequenceLayout.build(1, length), mixer.initial_state(1, "cpu", torch.float32)
        )
    carried = sum(x.numel() * x.element_size() for x in _tensors(state))
    assert mixer_cost(mixer, length, torch.float32).state == carried


def test_only_full_attention_grows() -> None:
    for name, build in VARIANTS.items():
        with torch.device("meta"):
            mixer = build(WIDTH)
        short, long = (mixer_cost(mixer, length) for length in (1 << 16, 1 << 17))
        assert (long.flops > 1.5 * short.flops) == (name in GROWING), name
        assert any(term.grows for term in long.terms) == (name in (*GROWING, *GROWING_SLOWLY)), name


@pytest.mark.parametrize("buckets", [1, 2, 4, 9])
@pytest.mark.parametrize("length", [1, 2, 23, 64, 100])
def test_buckets_in_use(buckets: int, length: int) -> None:
    last = 1 << buckets - 1
    used = sum((t % last).bit_count() + (t >= last) for t in range(length))
    assert buckets_in_use(length, buckets) == pytest.approx(used / length)


def test_a_mixer_may_say_its_cost_itself() -> None:
    class Own(Mixer):
        def cost(self, length: int) -> Cost:
            return Cost((Term("everything", 3.0 * length, "3 a token seen", grows=True),), 8 * length, "8 B a token")

    assert mixer_cost(Own(), 10) == Cost((Term("everything", 30.0, "3 a token seen", grows=True),), 80, "8 B a token")


def test_both_directions_count() -> None:
    one = mixer_cost(Mamba2(WIDTH), 100)
    for tied in (True, False):
        both = mixer_cost(Bidirectional(WIDTH, Mamba2, tied=tied), 100)
        assert both.flops == 2 * one.flops and both.state is None


# --- presets ---------------------------------------------------------------------------------------------------------

# Preset -> published parameters and those a token uses (None: not published), which embeddings these count, and how
# much more there are here, with the reason in the preset's own comment.
PUBLISHED: dict[str, tuple[float, float | None, str, float]] = {
    "linear_moe_2b": (2e9, 0.3e9, "none", 0.083),  # rounded in the name
    "linear_moe_7b": (7e9, 1e9, "none", -0.04),  # rounded in the name
    "minimax_01": (456e9, 45.9e9, "both; used: none", 0.0),
    "gdn_h1": (1.3e9, None, "one", 0.013),  # rounded in the name
    "gdn_h2": (1.3e9, None, "one", 0.04),
    "kimi_linear": (49.13e9, None, "both", 0.0),
    "samba_421m": (421e6, None, "one", -0.002),  # Mamba2 for Mamba
    "sambay_3_8b": (3.8e9, None, "one", 0.014),  # rounded in the name
    "ring_mini_linear": (16.4e9, 1.6e9, "both", 0.002),
    "griffin": (2.683e9, None, "one", 0.0),
    "bamba_9b": (9.78e9, None, "both", 0.0),
    "hunyuan_turbos": (560e9, 56e9, "both; used: none", -0.002),  # rounded in the report
    "hydra": (1.6e9, None, "one", 0.005),  # rounded in the paper, which proposes it
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_beside_the_published_counts(name: str) -> None:
    published, used, counting, more = PUBLISHED[name]
    shown = show([f"model={name}", "task.tie_embeddings=false"])
    matrix = shown.vocab_size * shown.d_model
    left_out = {"none": 2, "one": 1, "both": 0}
    every, _, of_used = counting.partition("; used: ")
    parameters = shown.parameters - left_out[every] * matrix
    assert parameters / published - 1 == pytest.approx(more, abs=0.006)
    if used is not None:
        active = shown.active - left_out[of_used or every] * matrix
        assert active == pytest.approx(used, rel=0.09 if name.startswith("linear_moe") else 0.01)


def test_a_model_of_any_size_is_shown_at_once_and_holds_nothing() -> None:
    show(["model=hybrid_small"])  # imports
    begun = time.perf_counter()
    shown = show(["model=minimax_01"], length=1_000_000)
    assert time.perf_counter() - begun < 10  # about one on an idle machine
    assert shown.line == (
        "minimax_01: llllllla × 10, 80 blocks of width 6,144, 455 B parameters, 47.2 B of them used by a token"
    )
    lightning, attention = shown.parts[:2]
    assert (lightning.count, attention.count) == (70, 10)
    assert lightning.state == 64 * 128 * 128 * 4 and attention.state == 2 * 8 * 128 * 2 * 1_000_000
    assert shown.growing == pytest.approx(10 * 4 * 64 * 128 * 500_000.5)


@pytest.mark.parametrize("name", options("model"))
def test_every_preset_adds_up(name: str) -> None:
    from seqlong.show import _composed, build

    composed = _composed([f"model={name}"])
    backbone = build(composed.house["model"]["backbone"], composed)
    assert all(parameter.is_meta for parameter in backbone.parameters())
    shown = show([f"model={name}"])
    assert shown.parameters == sum(parameter.numel() for parameter in backbone.parameters())
    feeds = [part for part in shown.parts if part.name in seqlong.ffn.__all__]
    assert sum(part.count for part in shown.parts if part.letter and part not in feeds) == shown.layers
    assert sum(part.count for part in feeds) == sum(block.ffn is not None for block in backbone.blocks)


def test_a_running_model_does_the_matrix_products_that_are_shown() -> None:
    from seqlong.backbone import Backbone, BackboneConfig
    from seqlong.batch import SequenceBatch
    from seqlong.heads import LanguageHead
    from seqlong.show import measure

    mixers: dict[str, Any] = {"m": Mamba2, "a": lambda d: Attention(d, heads=4, causal=False)}
    backbone = Backbone(BackboneConfig(d_model=WIDTH, pattern="ma", layers=3, mixers=mixers))
    head = LanguageHead(WIDTH, 16, backbone.embedding)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        head.logits(backbone(SequenceBatch(tokens=torch.randint(0, 16, (1, 24)))).hidden)
    values = {"mixers": {letter: {"class_path": "x.Y"} for letter in "ma"}, "ffn": {"class_path": "x.SwiGLU"}}
    shown = measure("toy", backbone, values, True, 24)
    beside = sum(
        p.count * t["flops"] for p in shown.parts for t in p.terms if t["what"] in ("recurrence", "convolution")
    )
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "conv" not in str(op))
    assert counted == 24 * (shown.flops - beside)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def test_show_prints_a_line_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "model=hybrid_small", "model.backbone.layers=10", "--length", "8,192"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("hybrid_small: mmma × 2 + mm, 10 blocks of width 128, ")
    assert "m: Mamba2" in text and "d_state 32, head_dim 32" in text and "state at 8,192" in text
    assert "512 B a token, to 511" in text and "0 % of the FLOPs at 8,192 tokens grow with the length" in text


def test_a_mixer_within_another_may_be_given_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = "{class_path: seqlong.mixers.Bidirectional, init_args: {mixer: GLA}}"
    assert main(["show", "model=hybrid_small", f"model.backbone.mixers.a={wrapped}"]) == 0
    assert "a: Bidirectional(GLA)" in capsys.readouterr().out


def test_without_a_model_the_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in options("model"))


def test_show_of_an_experiment_and_of_a_saved_configuration(
    _here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["experiment=dna/pretrain", "hardware=cpu", "model.backbone.d_model=64"]
    assert main(["show", *words, "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["d_model"] == 64 and shown["layers"] == 4 and shown["length"] == 131072
    assert shown["flops"] > shown["growing"] == 0 and shown["parameters"] == shown["active"]
    run = tmp_path / "a-run"
    run.mkdir()
    (run / "config.yaml").write_text(dump(compose([*words, "data.path=x.fa"]).lightning))
    assert main(["show", "--config", str(run / "config.yaml"), "--json", "x.json"]) == 0
    assert capsys.readouterr().out.startswith("a-run: mmma, ")
    again = json.loads(Path("x.json").read_text())
    assert again["parts"] == shown["parts"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["model=minimax_1"], "there is no model=minimax_1; did you mean 'minimax_01'?"),
        (["minimax_01"], "'minimax_01' has no '='; did you mean 'model=minimax_01'?"),
        (["task=causal_lm"], "show needs a model: model=NAME, one of"),
        (["model=hybrid_small", "model.bacbone.layers=3"], "model.bacbone is unknown; did you mean 'backbone'?"),
        (["model=hybrid_small", "model.backbone.d_modl=3"], "model.backbone.d_modl is not a setting of BackboneConfig"),
        (["model=hybrid_small", "model.backbone.d_model=wide"], "model.backbone.d_model: "),
        (["model=hybrid_small", "model.backbone.d_model=100"], "head_dim"),
        (["model=hybrid_small", "model.backbone.pattern=mx"], "backbone.pattern 'mx' has 'x' at block 2"),
        (["model=hybrid_small", "model.backbone.mixers.m.class_path=seqlong.mixers.Mambo2"], "Mambo2"),
        (
            ["model=hybrid_small", "model.backbone.mixers.a={class_path: seqlong.mixers.MoBA, init_args: {window: 3}}"],
            "\nmodel.backbone.mixers.a.init_args.window is not a setting of MoBA; there are: block,",
        ),
        (
            ["model=hybrid_small", "model.backbone.mixers.a.init_args.heads=0"],
            "Attention needs heads above 0, found heads=0",
        ),
        (["model=hybrid_small", "--length", "0"], "expected tokens, a whole number above 0, found '0'"),
        (["model=hybrid_small", "--lenght", "9"], "`seqlong show --help` lists what it takes"),
        (["model=hybrid_small", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", *words]) == 2
    told = capsys.readouterr().err
    assert complaint in f"\n{told}" and len(told.splitlines()) <= 2


def test_patterns_are_written_as_what_repeats() -> None:
    assert repeated("m") == "m" and repeated("mmmm") == "m × 4" and repeated("mmma") == "mmma"
    assert repeated("mmmammma") == "mmma × 2" and repeated("mmammamm") == "mma × 2 + mm"
    assert repeated("mmmammmm") == "mmmammmm", "once and a bit is no repetition"


# --- words -----------------------------------------------------------------------------------------------------------


def test_the_vocabulary_has_everything_there_is() -> None:
    entries = vocabulary()
    kinds = {kind: {entry.word for entry in entries if entry.kind == kind} for kind in PEERS}
    assert kinds["mixer"] == {*MIXERS, "Bidirectional", "Convolution", "PrefixMixer"} and kinds["op"] == set(PROBES)
    assert kinds["feed-forward"] == {n for n in seqlong.ffn.__all__ if inspect.isclass(getattr(seqlong.ffn, n))}
    for target in (*MIXERS.values(), seqlong.ffn.MoE):
        assert set(inspect.signature(target).parameters) <= kinds["setting"]
    assert {"pattern", "checkpointing"} <= kinds["setting"]
    assert [entry.word for entry in entries if not entry.what] == []
    for kind in ("op", "setting", "feed-forward"):
        assert set(PEERS[kind]) - kinds[kind] == set(), "names of what is not there"
    assert kinds["op"] - set(PEERS["op"]) == set()


@pytest.mark.parametrize(
    ("search", "expected"),
    [("swa", {"Attention", "window"}), ("num_key_value_heads", {"kv_heads"}), ("--moe-router-topk", {"active"}),
     ("headdim", {"head_dim"}), ("Qwen3NextGatedDeltaNet", {"GatedDeltaNet"}), ("past_key_values", {"state"})],
)  # fmt: skip
def test_words_are_found_by_anyones_name(search: str, expected: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["words", search, "--json", "-"]) == 0
    found = {row["word"] for row in json.loads(capsys.readouterr().out)}
    assert expected <= found and len(found) <= len(expected) + 2


def test_words_prints_a_table_and_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["words", "decay", "rank"]) == 0
    text = capsys.readouterr().out
    assert "decay_rank" in text and "gate_low_rank_dim" in text and "d_model" not in text
    assert main(["words", "nim_heads"]) == 2
    assert "no word has 'nim_heads'; did you mean 'num_heads'?" in capsys.readouterr().err


def test_modules_without_a_weight_cost_nothing() -> None:
    assert products(nn.Identity()) == []


def test_a_letters_own_feed_forward_is_a_line_of_its_own() -> None:
    """The rest of the model keeps its own."""
    plain = {part.letter or part.name: part for part in show(["model=hybrid_small"]).parts}
    shown = show(["model=hybrid_small", "+model.backbone.ffns.a.class_path=seqlong.ffn.GELU"])
    own = [part for part in shown.parts if part.name == "GELU"]
    assert [(part.letter, part.count) for part in own] == [("a", plain["a"].count)]
    swiglu = next(part for part in shown.parts if part.name == "SwiGLU")
    assert (swiglu.letter, swiglu.count) == ("", plain["SwiGLU"].count - plain["a"].count)
    without = show(["model=hybrid_small", "+model.backbone.ffns.a=null"])
    assert without.parameters == shown.parameters - own[0].count * own[0].parameters - plain["a"].count * shown.d_model
