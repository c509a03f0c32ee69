"""The verb ``seqlong generate``: sequences drawn from a causal model, of any length in constant memory."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile

import torch
from jaxtyping import Float
from torch import Tensor

from seqlong.datamodules.dna.alphabet import BOS, A, DnaVocabulary, T
from seqlong.datamodules.dna.fasta import Header
from seqlong.datamodules.dna.sequences import read_sequences
from seqlong.errors import ConfigError, DataError, nearest
from seqlong.inference import generate_text
from seqlong.inference.arguments import Parser, integer, open_model, progress, require_bases
from seqlong.inference.model import Model, repeat
from seqlong.inference.sampling import Sampling
from seqlong.state import BackboneState

log = logging.getLogger("seqlong")

HELP = """Draws sequences from a causal model, symbol by symbol, in the memory of its state (which grows with full
attention only). Of a model of DNA: FASTA; each header tells the settings, and the bits a base that the model gives what
it drew. Of a model of text: the prompt and what follows, up to the end of the text if it comes.

Sequence n of a seed is the same however many are drawn."""
EXAMPLES = """examples:
  seqlong generate --ckpt last --prompt ATGAAACGC --length 1000
  seqlong generate --ckpt last --prompt-file start.fa --length 1000000 --count 4 --top-p 0.95 --seed 7 --output g.fa
  seqlong generate --ckpt runs/my-books --prompt 'It was a dark' --length 500 --temperature 0.8"""
_BLOCK = 4096
_BASES = b"ACGT"


def command(words: Sequence[str]) -> int:
    """``seqlong generate``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the flags or the files.
    """
    parser = Parser("generate", HELP, EXAMPLES)
    parser.add_model()
    parser.add_argument("--prompt", default="", help="bases or text to go on from; none starts with anything")
    parser.add_argument("--prompt-file", metavar="FILE", help="the first record of a FASTA, or a text, of any length")
    parser.add_argument(
        "--tag", metavar="NAME", help="species or domain, of a model trained on some (experiment=dna/tagged)"
    )
    parser.add_argument("--length", type=integer, default=1000, help="bases or tokens to draw; 1000 if left out")
    parser.add_argument(
        "--tokenizer", help="of a model of text: tokenizer.json, where it is not where it was in training"
    )
    parser.add_argument("--count", type=integer, default=1, help="sequences")
    parser.add_argument("--temperature", type=_number, default=1.0, help="below 1: likelier ones; 0: the likeliest")
    parser.add_argument("--top-k", type=int, default=0, help="only the k likeliest; 0 for all")
    parser.add_argument("--top-p", type=_number, default=1.0, help="only the likeliest with this probability together")
    parser.add_argument("--seed", type=int, default=0, help="names the draw")
    parser.add_argument("--output", metavar="FILE", help="FASTA or text; the terminal if left out")
    given = parser.parse_args(list(words))
    sampling = Sampling(given.temperature, given.top_k, given.top_p, given.seed)
    if given.prompt and given.prompt_file:
        raise ConfigError("--prompt and --prompt-file are two prompts; give one")
    model = open_model(given)
    model.require("causal", why="generate")
    _put(given, _text_writer(given, model, sampling) or _base_writer(given, model, sampling))
    return 0


Writer = Callable[[Callable[[bytes], object]], None]


def _text_writer(given: argparse.Namespace, model: Model, sampling: Sampling) -> Writer | None:
    vocabulary = generate_text.vocabulary_of(model, given.tokenizer)
    if vocabulary is None:
        return None
    if given.tag is not None:
        raise ConfigError(f"--tag {given.tag}: {model.path} is a model of text, and tags are of genomes")
    prompt = generate_text.read_prompt(Path(given.prompt_file)) if given.prompt_file else given.prompt
    return lambda put: generate_text.write(model, vocabulary, prompt, given.length, given.count, sampling, put)


def _base_writer(given: argparse.Namespace, model: Model, sampling: Sampling) -> Writer:
    require_bases(model, "generate")
    head = prefix(model, given.tag)
    parts = _first_record(Path(given.prompt_file)) if given.prompt_file else iter([_letters(given.prompt)])
    return lambda put: write(model, parts, given.length, given.count, sampling, put, head)


def _put(given: argparse.Namespace, write: Writer) -> None:
    """To the file that was asked for, which is there once it is whole, or to the terminal."""
    if given.output:
        target = Path(given.output)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                write(file.write)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        log.info("wrote %s", target)
    else:
        sys.stdout.flush()
        write(sys.stdout.buffer.write)
        sys.stdout.buffer.flush()


def prefix(model: Model, tag: str | None) -> list[int]:
    """Tokens before a prompt: that of a tag, ``<bos>`` of a model that knows tags if none is given, else nothing.

    Raises:
        ConfigError: the model knows no tags, or not this one.
    """
    known = model.card.get("tags")
    tags = {str(name): int(number) for name, number in known.items()} if isinstance(known, dict) else {}
    if tag is None:
        return [BOS] if tags else []
    if not tags:
        raise ConfigError(f"--tag {tag}: {model.path} was trained without tags; experiment=dna/tagged trains with some")
    if tag not in tags:
        raise ConfigError(f"--tag {tag}: the model has no such tag{nearest(tag, tags)}; it has {', '.join(tags)}")
    return [tags[tag]]


def write(
    model: Model,
    prompt: Iterator[bytes],
    length: int,
    count: int,
    sampling: Sampling,
    put: Callable[[bytes], object],
    head: Sequence[int] = (),
) -> None:
    """Draw ``count`` sequences and ``put`` them, as FASTA."""
    with ExitStack() as stack:
        kept = [stack.enter_context(TemporaryFile()) for _ in range(count)]
        nats = torch.zeros(count, dtype=torch.float64)
        with progress("Drawing", length * count, "bases") as advance:
            for block, said in draw(model, prompt, length, count, sampling, head):
                for row, letters in zip(kept, block, strict=True):
                    row.write(letters)
                nats -= said
                advance(len(block[0]) * count)
        settings = f"temperature={sampling.temperature} top_k={sampling.top_k} top_p={sampling.top_p}"
        for number, row in enumerate(kept):
            bits = nats[number].item() / length / math.log(2)
            name = f">generated_{number + 1} length={length} {settings} seed={sampling.seed} bits={bits:.4f}\n"
            put(name.encode())
            row.seek(0)
            while line := row.read(80):
                put(line + b"\n")


def draw(
    model: Model, prompt: Iterator[bytes], length: int, count: int, sampling: Sampling, head: Sequence[int] = ()
) -> Iterator[tuple[list[bytes], Tensor]]:
    """Letters of ``count`` rows, some thousand at a time, and ``(count)`` the ``ln p`` of each row's part.

    ``p`` is the model's own, before temperature and cuts, among the four bases; that of a first base without a prompt
    is 1/4. ``head``: tokens before the prompt.
    """
    vocabulary, randoms = DnaVocabulary(), [torch.Generator().manual_seed(sampling.seed + row) for row in range(count)]
    state: BackboneState | None = None
    last: Tensor | None = None
    if head:
        last, state = model.hidden(torch.tensor([list(head)]), model.initial_state())
        last = last[:, -1:]
    for part in prompt:
        for start in range(0, len(part), 1 << 15):
            tokens = torch.tensor([vocabulary.encode(part[start : start + (1 << 15)].decode())])
            state = model.initial_state() if state is None else state
            last, state = model.hidden(tokens, state)
            last = last[:, -1:]
    if state is None:
        state = model.initial_state()
    state = repeat(state, count)
    logits = torch.zeros(count, 4, dtype=torch.float64) if last is None else _bases(model, last).expand(count, 4)
    for start in range(0, length, _BLOCK):
        size = min(_BLOCK, length - start)
        uniform = torch.stack([torch.rand(size, generator=each, dtype=torch.float64) for each in randoms], dim=1)
        found = torch.empty(count, size, dtype=torch.uint8)
        said = torch.zeros(count, dtype=torch.float64)
        for step in range(size):
            edges = sampling.probabilities(logits).cumsum(dim=-1)
            chosen = (uniform[step, :, None] * edges[:, -1:] >= edges).sum(dim=-1).clamp(max=3)
            found[:, step] = chosen.to(torch.uint8)
            said += logits.log_softmax(dim=-1).gather(-1, chosen[:, None])[:, 0]
            last, state = model.hidden((chosen + A)[:, None], state)
            logits = _bases(model, last)
        yield [bytes(row).translate(_LETTERS) for row in found.numpy()], said


_LETTERS = bytes([*_BASES, *range(4, 256)])


def _bases(model: Model, hidden: Tensor) -> Float[Tensor, "b 4"]:
    """Logits of A, C, G and T after the last position, on the CPU."""
    with torch.no_grad(), model.products():
        return model.task.head.logits(hidden)[:, -1, A : T + 1].double().cpu()


def _letters(text: str) -> bytes:
    found = "".join(text.split()).upper()
    wrong = sorted(set(found) - set("ACGTUN"))
    if wrong:
        raise ConfigError(f"--prompt has '{wrong[0]}'; expected A, C, G, T or N")
    return found.encode()


def _first_record(path: Path) -> Iterator[bytes]:
    """The bases of the first record of a sequence file, in parts."""
    started = False
    for item in read_sequences(path):
        if isinstance(item, Header):
            if started:
                return
            started = True
        else:
            yield item
    if not started:
        raise DataError(f"{path} has no records")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from error
