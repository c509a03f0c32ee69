"""Tokenizers: any text comes back, cut in pieces or not; trained and looked at by the command."""

from __future__ import annotations

from itertools import pairwise

import pytest
from text_cases import prose, trained

from seqlong.cli import main
from seqlong.datamodules.text.vocabulary import BOS, EOS, ByteVocabulary, TokenizerVocabulary, load_vocabulary, pieces
from seqlong.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return trained(tmp_path_factory.mktemp("tokenizer"))


def test_bytes_come_back():
    vocabulary = ByteVocabulary()
    text = "caf\u00e9 \u4e16\n"
    assert vocabulary.decode([BOS, *vocabulary.encode(text), EOS]) == text
    assert vocabulary.size == 260 and max(vocabulary.encode("\u00ff")) < 260
    with pytest.raises(DataError, match="found id 260"):
        vocabulary.decode([260])


def test_a_trained_tokenizer_writes_any_text(tokenizer):
    vocabulary = load_vocabulary(tokenizer)
    assert isinstance(vocabulary, TokenizerVocabulary) and vocabulary.cuts_freely
    assert (vocabulary.size, vocabulary.pad, vocabulary.mask, vocabulary.bos, vocabulary.eos) == (290, 0, 1, 2, 3)
    for text in (prose(500, 3), "caf\u00e9 \u4e16\U0001f40b\t  <eos> \x00\x7f", " lead", "trail  \n\n"):
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text and EOS not in ids
        assert vocabulary.byte_lengths()[ids].sum() == len(text.encode())


def test_long_documents_are_tokenised_in_pieces_as_if_whole(tokenizer, monkeypatch):
    from seqlong.datamodules.text import vocabulary as module

    monkeypatch.setattr(module, "PIECE", 64)
    monkeypatch.setattr(module, "BATCH", 300)
    vocabulary = load_vocabulary(tokenizer)
    texts = [prose(2000, 3) + "\n\n  x  \n" + prose(500, 4), "", prose(50, 5), "y" * 40]
    cut = []
    for number, text in enumerate(texts):
        data = text.encode()
        edges = [0, *range(17, len(data), 101), len(data)]
        cut += [(number, data[low:high]) for low, high in pairwise(edges)]
    found: dict[int, list[int]] = {}
    for tokens, owners in vocabulary.write(cut):
        place = 0
        for number, count in owners.tolist():
            found.setdefault(number, []).extend(tokens[place : place + count].tolist())
            place += count
        assert place == len(tokens)
    assert {number: vocabulary.encode(text) for number, text in enumerate(texts) if text} == found
    assert "".join(pieces(texts[0], 10)) == texts[0]


def test_a_text_without_spaces_cannot_fill_the_memory(tokenizer, monkeypatch):
    from seqlong.datamodules.text import vocabulary as module

    monkeypatch.setattr(module, "PIECE", 64)
    found = [text for _, text in module._texts(((0, b"x" * 1000) for _ in range(12)), 64)]
    assert max(map(len, found)) <= 640 and sum(map(len, found)) == 12_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("none.json", None, r"there is no such tokenizer"), ("a.json", "{}", r"cannot be read as a tokenizer\.json")],
)
def test_what_is_no_tokenizer(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_vocabulary(str(tmp_path / name))


def test_special_tokens_by_name(tokenizer):
    assert TokenizerVocabulary(tokenizer, bos="", eos="<mask>").bos is None
    assert TokenizerVocabulary(tokenizer, bos="", eos="<mask>").digest != TokenizerVocabulary(tokenizer).digest
    with pytest.raises(ConfigError, match=r"data\.eos: .* has no token '<eoss>'; did you mean '<eos>'"):
        TokenizerVocabulary(tokenizer, eos="<eoss>")
    with pytest.raises(ConfigError, match=r"with bytes leave them null"):
        load_vocabulary("bytes", bos="x")


# The command


def test_train_and_show(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(prose(5000, 1))
    out = tmp_path / "t.json"
    assert main(["tokenizer", "train", str(tmp_path / "a.txt"), "--size", "280", "--out", str(out)]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "280 ids" in said and f"data.tokenizer={out} model.backbone.vocab_size=280" in said
    assert main(["tokenizer", "show", str(out), str(tmp_path / "a.txt")]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    ids = len(load_vocabulary(str(out)).encode((tmp_path / "a.txt").read_text()))
    assert row[:3] == ["a.txt", "5,001", f"{ids:,}"]
    first = out.read_bytes()
    assert main(["tokenizer", "train", str(tmp_path / "a.txt"), "--size", "280", "--out", str(out)]) == 0
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "a.txt", "--size", "100"], "size 100 is too small: bytes and special tokens alone are 260"),
        (["train", "a.txt", "--size", "99999"], "the text has pairs for"),
        (["train", "a.txt", "--out", "no/such/folder/t.json"], "there is no folder no/such/folder"),
        (["train", "b.txt"], "b.txt: no such file; did you mean 'a.txt'?"),
        (["train", "empty.txt"], "empty.txt: the file is empty"),
        (["train"], "seqlong tokenizer train: the following arguments are required"),
        (["show", "a.txt"], "cannot be read as a tokenizer.json"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(prose(2000, 1))
    (tmp_path / "empty.txt").write_text("")
    assert main(["tokenizer", *words]) == 2
    assert message in capsys.readouterr().err
