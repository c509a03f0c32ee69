"""Log-likelihoods and continuations with carried states, against whole rows; the harness where it is installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from inference_cases import masked_model
from text_cases import trained

from seqlong.backbone import BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.datamodules.text.vocabulary import ByteVocabulary, TokenizerVocabulary, Vocabulary
from seqlong.errors import ConfigError
from seqlong.inference import harness
from seqlong.inference.harness import TextModel, harness_model
from seqlong.inference.model import Model
from seqlong.mixers import Attention, Mamba2
from seqlong.tasks import CausalLM


def model(size: int = 300) -> Model:
    torch.manual_seed(1)
    mixers = {"m": lambda width: Mamba2(width, d_state=8, head_dim=8), "a": lambda width: Attention(width, heads=2)}
    backbone = BackboneConfig(vocab_size=size, d_model=16, pattern="ma", mixers=mixers)
    task = CausalLM(backbone).eval().requires_grad_(False).double()
    task.backbone.embedding.weight.mul_(60)
    return Model(task, Path("toy.ckpt"), torch.device("cpu"), "float64")


def by_hand(made: Model, given: list[int], asked: list[int]) -> tuple[float, bool]:
    """In one row, from the definition."""
    logits = made.task.head.logits(made.backbone(SequenceBatch(tokens=torch.tensor([given + asked]))).hidden)[0]
    said = logits.log_softmax(-1)[len(given) - 1 : -1]
    targets = torch.tensor(asked)
    return said.gather(1, targets[:, None]).sum().item(), bool((said.argmax(-1) == targets).all())


@pytest.fixture(params=["bytes", "bpe", "bare"])
def vocabulary(request: pytest.FixtureRequest, tmp_path: Path) -> Vocabulary:
    if request.param == "bytes":
        return ByteVocabulary()
    return TokenizerVocabulary(trained(tmp_path), bos="" if request.param == "bare" else None)


def test_scores_are_those_of_whole_rows(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_PART", 7)
    made = model()
    asked = TextModel(made, vocabulary)
    start = [] if vocabulary.bos is None else [vocabulary.bos]
    for context, answer in (
        ("the whale of the sea", " and ship"),
        ("the whale of the sea", " harpoon"),
        ("sea ", "ship"),
    ):
        ids = vocabulary.encode(context + answer)
        size = len(vocabulary.encode(context if vocabulary.unit == "byte" else context.rstrip()))
        score, greedy = asked.score(context, answer)
        assert (score, greedy) == (pytest.approx(by_hand(made, start + ids[:size], ids[size:])[0]), False)
    text = "captain white and of a in to it was he his that upon"
    ids = vocabulary.encode(text)
    given, rest = (start, ids) if start else (ids[:1], ids[1:])
    assert asked.score_whole(text) == pytest.approx(by_hand(made, given, rest)[0])
    assert asked.score("", text)[0] == pytest.approx(by_hand(made, given, rest)[0])
    assert asked.score("the", "") == (0.0, True)


def test_what_it_writes_is_greedy_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    made, vocabulary = model(260), ByteVocabulary()
    made.task.backbone.embedding.weight[:4] = 0
    made.task.backbone.embedding.weight[100:] = 0  # ASCII
    asked = TextModel(made, vocabulary)
    text = asked.write("the sea", most=12)
    ids = vocabulary.encode(text)
    assert len(ids) == 12 and asked.score("the sea", text)[1]  # each is the likeliest
    assert not asked.score("the sea", text[:-1] + ("a" if text[-1] != "a" else "b"))[1]
    stop = text[5:7]
    assert asked.write("the sea", [stop, "never"], 12) == text[: text.index(stop)]
    monkeypatch.setattr(ByteVocabulary, "eos", ids[3])
    assert asked.write("the sea", most=12) == text[: [*ids].index(ids[3])]


def test_a_context_is_read_once_for_all_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = TextModel(model(), ByteVocabulary())
    read: list[int] = []
    hidden = Model.hidden
    monkeypatch.setattr(
        Model, "hidden", lambda self, tokens, state: read.append(tokens.shape[1]) or hidden(self, tokens, state)
    )
    asked.score("x" * 50, "abc")
    asked.score("x" * 50, "de")
    assert read == [51, 2, 1]  # with <bos>; then what follows, less its last token


def test_models_that_cannot_be_asked() -> None:
    with pytest.raises(ConfigError, match="needs a causal language model"):
        TextModel(masked_model(), ByteVocabulary())
    with pytest.raises(ConfigError, match="has 16 tokens, but the tokenizer 260"):
        TextModel(model(16), ByteVocabulary())
    with pytest.raises(ConfigError, match="do_sample=false"):
        harness._written(TextModel(model(), ByteVocabulary()), "a", {"do_sample": True, "temperature": 0.7})


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'seqlong\[harness\]'"):
        harness_model(TextModel(model(), ByteVocabulary()))


def test_the_harness_asks_in_any_order_and_gets_answers_in_its_own() -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (seqlong[harness])")
    asked = TextModel(model(), ByteVocabulary())
    made = harness_model(asked)
    pairs = [("sea", "ship"), ("a", "b"), ("sea", "men"), ("", "whale")]
    found = made.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    assert found == [asked.score(*pair) for pair in pairs]
    assert made.loglikelihood_rolling([SimpleNamespace(args=("ship",))]) == [asked.score_whole("ship")]
    request = SimpleNamespace(args=("sea", {"until": "q", "max_gen_toks": 5}))
    assert made.generate_until([request]) == [asked.write("sea", ["q"], 5)]
