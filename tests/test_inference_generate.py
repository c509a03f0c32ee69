"""Drawing sequences: what is drawn follows the model's probabilities, seeds and cuts, and any prompt is read whole."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from inference_cases import causal_model, save_checkpoint

from seqlong.cli import main
from seqlong.errors import ConfigError
from seqlong.inference.generate import draw, write
from seqlong.inference.sampling import Sampling
from seqlong.inference.strands import tokens_of


def drawn(prompt: bytes, length: int, count: int = 1, **settings: float) -> list[str]:
    parts = list(draw(causal_model(), iter([prompt]), length, count, Sampling(**settings)))  # type: ignore[arg-type]
    return ["".join(block[row].decode() for block, _ in parts) for row in range(count)]


def letters(text: str) -> torch.Tensor:
    import numpy as np

    return tokens_of(np.frombuffer(text.encode(), dtype=np.uint8))[None]


def test_the_likeliest_base_is_that_of_whole_rows() -> None:
    model, text = causal_model(), "ACGTTGCAAC"
    found = drawn(text.encode(), 12, temperature=0.0)[0]
    for _ in range(12):
        text += "ACGT"[model.logits(letters(text))[0][0, -1, 4:8].argmax()]
    assert found == text[10:]


def test_what_is_drawn_has_the_probabilities_of_the_model() -> None:
    model, prompt = causal_model(), "ACGTTGCAAC"
    first = [row[0] for row in drawn(prompt.encode(), 1, count=4000, temperature=9.0)]
    expected = (model.logits(letters(prompt))[0][0, -1, 4:8] / 9.0).softmax(dim=-1)
    for base, share in zip("ACGT", expected.tolist(), strict=True):
        assert first.count(base) / 4000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000) + 1e-3)


def test_a_row_of_a_seed_is_the_same_however_many_are_drawn() -> None:
    three = drawn(b"ACG", 12, count=3, seed=5, temperature=20.0)
    assert (
        drawn(b"ACG", 12, count=1, seed=5, temperature=20.0) == three[:1]
        and drawn(b"ACG", 12, count=2, seed=6, temperature=20.0) == three[1:]
    )
    assert len(set(three)) == 3


def test_cuts() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    torch.testing.assert_close(Sampling(top_k=2).probabilities(logits)[0, 2:], torch.zeros(2).double())
    kept = Sampling(top_p=0.65).probabilities(logits)[0]
    torch.testing.assert_close(kept, torch.tensor([4 / 7, 3 / 7, 0, 0]).double(), atol=1e-6, rtol=0)
    assert Sampling(top_p=0.01).probabilities(logits)[0, 0] == 1
    assert Sampling(temperature=0.5).probabilities(logits)[0, 0].item() == pytest.approx(0.16 / 0.30, abs=1e-6)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}):
        with pytest.raises(ConfigError, match="expected"):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_headers_tell_the_bits_of_what_was_drawn() -> None:
    model, prompt, file = causal_model(), "ACGTT", io.BytesIO()
    write(model, iter([prompt.encode()]), 84, 1, Sampling(temperature=9.0), file.write)
    head, *lines = file.getvalue().decode().splitlines()
    text = "".join(lines)
    assert len(text) == 84 and len(lines[0]) == 80
    said = model.logits(letters(prompt + text))[0][0, :, 4:8].log_softmax(dim=-1)
    bits = -sum(said[4 + i, "ACGT".index(base)].item() for i, base in enumerate(text)) / 84 / math.log(2)
    assert f"bits={bits:.4f}" in head and "length=84" in head


def test_the_state_is_all_that_is_kept() -> None:
    """A prompt in parts is the prompt; nothing before the state is read again."""
    model, text = causal_model(), "ACGTTGCAACGGTTACCAGT"
    whole = next(draw(model, iter([text.encode()]), 20, 1, Sampling(9.0)))[0]
    parts = next(draw(model, iter([text[:3].encode(), text[3:4].encode(), text[4:].encode()]), 20, 1, Sampling(9.0)))[0]
    assert whole == parts


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path)
    (tmp_path / "p.fa").write_text(">one\nACGTAC\nGTTT\n>two\nAAAA\n")
    words = ["generate", "--ckpt", "last", "--length", "12"]
    assert main([*words, "--prompt-file", "p.fa", "--count", "2", "--output", "g.fa"]) == 0
    assert (tmp_path / "g.fa").read_text().count(">generated_") == 2
    assert main([*words, "--prompt", "acgtacgttt"]) == 0
    shown = capsysbinary.readouterr().out.decode().splitlines()
    assert shown[1] == (tmp_path / "g.fa").read_text().splitlines()[1], "the same prompt, the same seed"
    for more, complaint in (
        (["--prompt", "ACX"], "--prompt has 'X'"),
        (["--prompt", "A", "--prompt-file", "p.fa"], "two prompts"),
        (["--top-p", "2"], "--top-p is 2.0"),
        (["--temperature", "hot"], "'hot' is not a number"),
    ):
        assert main([*words, *more]) == 2
        assert complaint in capsysbinary.readouterr().err.decode()
