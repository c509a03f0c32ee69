"""Texts drawn from a causal model: ``seqlong generate`` where tokens are bytes or a tokenizer's."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from seqlong.datamodules.text.vocabulary import Vocabulary, load_vocabulary
from seqlong.errors import ConfigError, DataError
from seqlong.inference.arguments import progress
from seqlong.inference.model import Model, repeat
from seqlong.inference.sampling import Sampling
from seqlong.state import BackboneState

#: Tokens that are read at once, and uniform numbers that are drawn at once.
_PART, _BLOCK = 1 << 15, 4096
#: Tokens of the prompt that the first drawn ones are decoded with.
_TOGETHER = 16


@dataclass
class Drawn:
    """A row that is drawn.

    Attributes:
        tokens: ids after the prompt.
        nats: ``-ln p`` of them, and of the end if it came; ``p`` is the model's own, before temperature and cuts.
        ended: whether the token that ends a text was drawn; it is not in ``tokens``.
    """

    tokens: array[int] = field(default_factory=lambda: array("l"))
    nats: float = 0.0
    ended: bool = False


def vocabulary_of(model: Model, tokenizer: str | None = None) -> Vocabulary | None:
    """What a model of text was trained with; None for a model of something else.

    Args:
        model: from a checkpoint.
        tokenizer: tokenizer.json, where it is no longer where it was in training.

    Raises:
        ConfigError: the model has fewer tokens than the tokenizer.
    """
    data = model.config.get("data") or {}
    settings = data.get("init_args") or {}
    if ".text" not in str(data.get("class_path")) or not settings.get("tokenizer"):
        return None
    found = load_vocabulary(str(tokenizer or settings["tokenizer"]), settings.get("bos"), settings.get("eos"))
    if found.size > model.task.head.vocab_size:
        raise ConfigError(
            f"{model.path} has {model.task.head.vocab_size} tokens, but the tokenizer {found.size}; give the one that "
            "it was trained with: --tokenizer FILE"
        )
    return found


def read_prompt(path: Path) -> str:
    """A file's text.

    Raises:
        DataError: there is no such file, or it is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file (iconv -t UTF-8)") from error


def write(
    model: Model,
    vocabulary: Vocabulary,
    prompt: str,
    length: int,
    count: int,
    sampling: Sampling,
    put: Callable[[bytes], object],
) -> None:
    """Draw ``count`` texts of at most ``length`` tokens and ``put`` each after its prompt, as UTF-8; above each of
    several a line that tells its number and bits."""
    rows = [Drawn() for _ in range(count)]
    with progress("Drawing", length * count, f"{vocabulary.unit}s") as advance:
        for drawn in draw(model, vocabulary, prompt, length, rows, sampling):
            advance(drawn)
    for number, row in enumerate(rows, 1):
        if count > 1:
            size = max(1, len(row.tokens) + row.ended)
            how = ", to its end" if row.ended else ""
            bits = row.nats / size / math.log(2)
            put(f"==> {number} of {count}: {bits:.3f} bits a {vocabulary.unit}{how} <==\n".encode())
        put((prompt + _after(vocabulary, prompt, row)).encode() + b"\n")


def _after(vocabulary: Vocabulary, prompt: str, row: Drawn) -> str:
    """What was drawn as it stands behind the prompt: a tokenizer may leave out the space before the first of tokens."""
    given = vocabulary.encode(prompt)[-_TOGETHER:]
    before, whole = vocabulary.decode(given), vocabulary.decode([*given, *row.tokens])
    return whole[len(before) :] if whole.startswith(before) else vocabulary.decode(row.tokens)


def draw(
    model: Model, vocabulary: Vocabulary, prompt: str, length: int, rows: list[Drawn], sampling: Sampling
) -> Iterator[int]:
    """Fill ``rows`` token by token, until each has ``length`` or has ended; yields how many tokens came.

    Row n is drawn with seed ``sampling.seed + n``.

    Raises:
        ConfigError: there is nothing to begin with.
    """
    given = ([] if vocabulary.bos is None else [vocabulary.bos]) + vocabulary.encode(prompt)
    if not given:
        raise ConfigError("the tokenizer has no token that begins a text: give the model some text with --prompt")
    state, last = model.initial_state(), None
    for start in range(0, len(given), _PART):
        last, after = model.hidden(torch.tensor([given[start : start + _PART]]), state)
        assert after is not None
        state = after
    assert last is not None
    allowed = torch.arange(vocabulary.size) >= 0
    for special in (vocabulary.pad, vocabulary.mask, vocabulary.bos):
        if special is not None and special != vocabulary.eos:
            allowed[special] = False
    logits = _logits(model, last, allowed).expand(len(rows), -1)
    state = repeat(state, len(rows))
    randoms = [torch.Generator().manual_seed(sampling.seed + number) for number in range(len(rows))]
    for start in range(0, length, _BLOCK):
        size = min(_BLOCK, length - start)
        uniform = torch.stack([torch.rand(size, generator=each, dtype=torch.float64) for each in randoms], dim=1)
        for step in range(size):
            chosen = _chosen(sampling.probabilities(logits), uniform[step])
            nats = -logits.log_softmax(dim=-1).gather(-1, chosen[:, None])[:, 0]
            came = 0
            for row, token, cost in zip(rows, chosen.tolist(), nats.tolist(), strict=True):
                if row.ended:
                    continue
                row.nats, row.ended, came = row.nats + cost, token == vocabulary.eos, came + 1
                if not row.ended:
                    row.tokens.append(token)
            yield came
            if all(row.ended for row in rows):
                return
            last, state = _next(model, chosen, state)
            logits = _logits(model, last, allowed)


def _next(model: Model, chosen: Tensor, state: BackboneState) -> tuple[Tensor, BackboneState]:
    last, after = model.hidden(chosen[:, None], state)
    assert after is not None
    return last, after


def _chosen(shares: Float[Tensor, "b y"], uniform: Float[Tensor, "b"]) -> Tensor:
    """The symbol in whose part of the line from 0 to 1 each number lies; never one without a share."""
    edges = shares.cumsum(dim=-1)
    found = (uniform[:, None] * edges[:, -1:] >= edges).sum(dim=-1)
    highest = shares.shape[-1] - 1 - shares.flip(-1).gt(0).int().argmax(dim=-1)
    return torch.minimum(found, highest)


def _logits(model: Model, hidden: Tensor, allowed: Tensor) -> Float[Tensor, "b y"]:
    """Logits after the last position, on the CPU; minus infinity for what no text holds."""
    with torch.no_grad(), model.products():
        found = model.task.head.logits(hidden[:, -1:])[:, -1, : allowed.numel()].double().cpu()
    return found.masked_fill(~allowed, -math.inf)
