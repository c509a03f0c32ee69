"""Texts drawn from a model of text: the likeliest are the harness's, probabilities the model's, ends are ends."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from test_inference_harness import model
from text_cases import trained

from seqlong.cli import main
from seqlong.datamodules.text.vocabulary import ByteVocabulary, TokenizerVocabulary, Vocabulary
from seqlong.errors import ConfigError, DataError
from seqlong.inference import generate_text
from seqlong.inference.generate_text import Drawn, _chosen, draw, read_prompt, vocabulary_of, write
from seqlong.inference.harness import TextModel
from seqlong.inference.model import Model
from seqlong.inference.sampling import Sampling


def drawn(made: Model, vocabulary: Vocabulary, prompt: str, length: int, count: int = 1, **how: float) -> list[Drawn]:
    rows = [Drawn() for _ in range(count)]
    came = sum(draw(made, vocabulary, prompt, length, rows, Sampling(**how)))  # type: ignore[arg-type]
    assert came == sum(len(row.tokens) + row.ended for row in rows)
    return rows


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_likeliest_tokens_are_those_of_the_harness(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_text, "_PART", 3)
    monkeypatch.setattr(generate_text, "_BLOCK", 5)
    vocabulary = ByteVocabulary() if kind == "bytes" else TokenizerVocabulary(trained(tmp_path))
    made = model(vocabulary.size)
    made.task.backbone.embedding.weight[[vocabulary.pad, vocabulary.bos]] = 0  # no text holds them
    if vocabulary.mask is not None:
        made.task.backbone.embedding.weight[vocabulary.mask] = 0
    (row,) = drawn(made, vocabulary, "the whale of the sea", 12, temperature=0.0)
    wanted = TextModel(made, vocabulary).write("the whale of the sea", most=12)
    assert vocabulary.decode(row.tokens) == wanted and wanted


def test_rows_of_seeds_their_bits_and_ends() -> None:
    vocabulary, made = ByteVocabulary(), model(260)
    made.task.backbone.embedding.weight.mul_(0.02)  # nearly all alike: many tokens are drawn, and ends come
    three = drawn(made, vocabulary, "sea", 400, 3, seed=5)
    assert drawn(made, vocabulary, "sea", 400, 1, seed=6)[0].tokens == three[1].tokens
    ended = [row for row in drawn(made, vocabulary, "sea", 400, 8) if row.ended]
    assert ended, "of 3,200 tokens of 257 some end a text"
    row = ended[0]
    given = [vocabulary.bos, *vocabulary.encode("sea")]
    logits = made.logits(torch.tensor([[*given, *row.tokens]]))[0][0, len(given) - 1 :]
    logits[:, [vocabulary.pad, vocabulary.mask, vocabulary.bos]] = -math.inf
    said = logits.log_softmax(-1)[torch.arange(len(row.tokens) + 1), torch.tensor([*row.tokens, vocabulary.eos])]
    assert row.nats == pytest.approx(-said.sum().item())
    assert not {vocabulary.pad, vocabulary.mask, vocabulary.bos, vocabulary.eos} & set(row.tokens)


def test_what_has_no_share_is_never_chosen() -> None:
    shares = torch.tensor([[0.5, 0.0, 0.5, 0.0]]).double().expand(4, -1)
    uniform = torch.tensor([0.0, 0.4999, 0.5, 1.0 - 2**-53]).double()
    assert _chosen(shares, uniform).tolist() == [0, 0, 2, 2]


def test_several_texts_have_a_line_each() -> None:
    file = io.BytesIO()
    write(model(260), ByteVocabulary(), "the sea", 9, 2, Sampling(), file.write)
    lines = file.getvalue().decode().split("\n")
    assert lines[0].startswith("==> 1 of 2: ") and lines[0].endswith(" bits a byte <==") and "the sea" in lines[1]
    file = io.BytesIO()
    write(model(260), ByteVocabulary(), "the sea", 9, 1, Sampling(), file.write)
    assert file.getvalue().decode().startswith("the sea") and "==>" not in file.getvalue().decode()


def test_a_model_without_a_beginning_needs_a_prompt(tmp_path: Path) -> None:
    bare = TokenizerVocabulary(trained(tmp_path), bos="")
    with pytest.raises(ConfigError, match="no token that begins a text"):
        drawn(model(bare.size), bare, "", 3)
    small = model(100)
    small.config["data"] = {"class_path": "seqlong.datamodules.text.TextData", "init_args": {"tokenizer": "bytes"}}
    with pytest.raises(ConfigError, match="has 100 tokens, but the tokenizer 260"):
        vocabulary_of(small)


def test_the_command_on_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary) -> None:
    """A run folder is a checkpoint for every verb: fit goes on in it, test measures it, generate writes from it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    for number in range(3):
        (tmp_path / "books" / f"{number}.txt").write_text(f"the sea and the ship {number}\n" * 200)
    small = [
        "data.path=books", "data.length=64", "data.batch_size=2", "data.eval_length=64", "trainer.limit_val_batches=2",
        "trainer.val_check_interval=2", "trainer.limit_test_batches=2",
    ]  # fmt: skip
    assert main(["fit", "experiment=text/demo", *small, "trainer.max_steps=2", "run.dir=run"]) == 0
    more = ["fit", "experiment=text/demo", *small, "trainer.max_steps=4", "--ckpt_path", "run"]
    assert main(more) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    steps = {line.split(",")[1] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]}
    assert "4" in steps and "2" in steps, "it went on in its own folder"
    assert main(["test", "--ckpt_path", "run", "run.dir=tested"]) == 0
    capsysbinary.readouterr()
    words = ["generate", "--ckpt", "run", "--length", "20"]
    assert main([*words, "--prompt", "the sea"]) == 0
    shown = capsysbinary.readouterr().out
    assert shown.startswith(b"the sea") and len(shown) > 8
    (tmp_path / "p.txt").write_text("the sea")
    assert main([*words, "--prompt-file", "p.txt", "--output", "out/g.txt"]) == 0
    assert (tmp_path / "out" / "g.txt").read_bytes() == shown, "the same prompt, the same seed"
    capsysbinary.readouterr()
    assert main([*words, "--tag", "ecoli"]) == 2
    assert b"is a model of text, and tags are of genomes" in capsysbinary.readouterr().err
    assert main(["test", "--ckpt_path", "books"]) == 2
    assert b"there is no checkpoint books; expected a file, a run folder" in capsysbinary.readouterr().err


def test_prompts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"bad\.txt: byte 3 is not UTF-8"):
        read_prompt(tmp_path / "bad.txt")
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        read_prompt(tmp_path / "none.txt")
