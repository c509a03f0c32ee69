"""``seqlong tokenizer``: train a BPE on your own text or genome, and see what a tokenizer.json does to a text."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from seqlong.datamodules.text.documents import Reading, Tally, read_documents
from seqlong.datamodules.text.files import find_files
from seqlong.datamodules.text.vocabulary import BATCH, SPECIALS, TokenizerVocabulary, pieces
from seqlong.errors import ConfigError, DataError, SeqlongError

HELP = "Train a tokenizer on your own files, or look at one."
EXAMPLES = """\
examples:
  seqlong tokenizer train books/ --size 8192 --out tokenizer.json
  seqlong tokenizer train 'web/*.jsonl.gz' --size 32000 --field content
  seqlong tokenizer train genome.fa.gz --size 4096         (pieces of bases)
  seqlong tokenizer show tokenizer.json books/moby_dick.txt

Files: .txt, .md, .jsonl, .parquet, .tar; folders and patterns of them. Or sequences: .fa, .fasta, .fna, .fq, .fastq,
.gb, .gbk, .gbff, .embl, also gzipped. Train on the files that you train a model on."""
#: Bytes of text that a tokenizer is trained on, at most; more of the same teaches it nothing.
LIMIT = 1 << 30
_PIECE = 1 << 16
_SEQUENCES = re.compile(r"\.(fa|fasta|fna|ffn|fq|fastq|gb|gbk|gbff|embl)(\.b?gz)?$", re.IGNORECASE)
#: Bytes, and the special tokens.
_SMALLEST = 256 + len(SPECIALS)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SeqlongError(f"{self.prog}: {message}; `seqlong tokenizer --help` lists what it takes")


def command(words: Sequence[str]) -> int:
    """``seqlong tokenizer``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the arguments or in the files.
    """
    parser = _Parser(
        prog="seqlong tokenizer",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="train|show", required=True)
    training = verbs.add_parser("train", prog="seqlong tokenizer train", help="train one")
    training.add_argument("paths", nargs="+", metavar="PATH", help="files, folders or patterns of text")
    training.add_argument("--size", type=int, default=8192, help="ids, special ones with them; 8192 if left out")
    training.add_argument("--out", default="tokenizer.json", help="file to write; tokenizer.json if left out")
    training.add_argument("--field", default="text", help="field of JSON rows or column of Parquet that holds the text")
    training.add_argument("--limit", type=int, default=LIMIT, help="bytes of text to train on, at most; 1 GiB")
    showing = verbs.add_parser("show", prog="seqlong tokenizer show", help="look at one")
    showing.add_argument("file", help="a tokenizer.json")
    showing.add_argument("paths", nargs="*", metavar="PATH", help="text to try it on")
    showing.add_argument("--field", default="text", help="as above")
    given = parser.parse_args(list(words))
    if given.verb == "train" and all(_SEQUENCES.search(path) for path in given.paths):
        from seqlong.datamodules.dna.bpe import BpeTokenizer, train_bpe

        made = BpeTokenizer(train_bpe(given.paths, given.size, given.out, min(given.limit, 1 << 25)))
        print(f"{given.out}: {made.size:,} ids; pieces of {int(made.widths(np.arange(made.size)).max())} bases at most")
        print(
            f"use it: seqlong fit experiment=dna/kmers 'data.tokenizer={{kind: bpe, file: {given.out}}}' "
            f"model.backbone.vocab_size={made.size}"
        )
    elif given.verb == "train":
        train(given.paths, given.size, given.out, given.field, given.limit)
        show(given.out, [], given.field)
        print(f"use it: data.tokenizer={given.out} model.backbone.vocab_size={given.size}")
    else:
        show(given.file, given.paths, given.field)
    return 0


def train(
    paths: Sequence[str], size: int = 8192, out: str | Path = "tokenizer.json", field: str = "text", limit: int = LIMIT
) -> Path:
    """Train a byte-level BPE and save it as a tokenizer.json, which Hugging Face tokenizers reads too.

    Any text can be written in it, and comes back as it was. Its ids are four special tokens, 256 bytes, and merges.

    Args:
        paths: files, folders or patterns.
        size: ids in all.
        out: the file to write.
        field: field or column that holds the text of JSON and Parquet.
        limit: bytes of text to read, at most, shared among the files by their size.

    Raises:
        ConfigError: too small a vocabulary.
        DataError: the files hold no text, cannot be read, or too little text for so many ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if size < _SMALLEST:
        raise ConfigError(f"size {size} is too small: bytes and special tokens alone are {_SMALLEST}")
    target = Path(out).expanduser()
    if not target.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {target.parent}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Reading", total=None)
        tokenizer.train_from_iterator(_texts(paths, field, limit, bar, task), trainer=trainer)
    found = tokenizer.get_vocab_size()
    if found <= _SMALLEST:
        raise DataError(f"{', '.join(map(str, paths))}: too little text to learn any pair of bytes from")
    if found < size:
        raise DataError(
            f"{', '.join(map(str, paths))}: the text has pairs for {found} ids only, not {size}; give more text, or "
            f"--size {found}"
        )
    tokenizer.save(str(target))
    return target


def _texts(paths: Sequence[str], field: str, limit: int, bar: Progress, task: object) -> Iterator[str]:
    files, _ = find_files(list(paths))
    sizes = [file.stat().st_size for file in files]
    bar.update(task, total=min(sum(sizes), limit))  # type: ignore[arg-type]
    share = min(1.0, limit / max(sum(sizes), 1))
    held = ""
    for file, size in zip(files, sizes, strict=True):
        room = size * share if share < 1 else float("inf")
        for event in read_documents(file, Reading(field, "replace"), Tally()):
            if room <= 0:
                break
            if not isinstance(event, bytes):
                yield from pieces(held, _PIECE)
                held = ""
                continue
            room -= len(event)
            bar.advance(task, len(event))  # type: ignore[arg-type]
            held += event.decode()
            *whole, held = pieces(held, _PIECE)
            yield from whole
            if len(held) > BATCH:  # no white space anywhere
                yield held
                held = ""
        yield held
        held = ""


def show(file: str, paths: Sequence[str], field: str = "text") -> None:
    """Print what a tokenizer is, and how many bytes of the files make a token.

    Raises:
        DataError: no tokenizer, or files that cannot be read.
    """
    vocabulary = TokenizerVocabulary(file)
    console = Console()
    names = {role: getattr(vocabulary, role) for role in ("bos", "eos", "pad", "mask")}
    said = [
        f"{role} {vocabulary.tokenizer.id_to_token(number)!r} ({number})"
        for role, number in names.items()
        if number is not None
    ]
    console.print(
        f"{escape(str(file))}: {vocabulary.size:,} ids; {escape(', '.join(said) or 'no special tokens')}",
        soft_wrap=True,
    )
    if not paths:
        return
    table = Table("file", "bytes", "tokens", "bytes a token", "MB/s", box=None)
    for path in find_files(list(paths))[0]:
        begin = time.perf_counter()
        size, tokens = _count(vocabulary, path, field)
        seconds = time.perf_counter() - begin
        ratio = f"{size / tokens:.2f}" if tokens else ""
        table.add_row(path.name, f"{size:,}", f"{tokens:,}", ratio, f"{size / 1e6 / seconds:.1f}")
    console.print(table)


def _count(vocabulary: TokenizerVocabulary, path: Path, field: str) -> tuple[int, int]:
    """Bytes and tokens of a file."""
    size = 0

    def documents() -> Iterator[tuple[int, bytes]]:
        nonlocal size
        number = 0
        for event in read_documents(path, Reading(field, "replace"), Tally()):
            if isinstance(event, bytes):
                size += len(event)
                yield number, event
            else:
                number += 1

    tokens = sum(len(found) for found, _ in vocabulary.write(documents()))
    return size, tokens
