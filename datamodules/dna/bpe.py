"""BPE over bases: pieces of any length, learnt from a genome by ``seqlong tokenizer train genome.fa``.

Only A, C, G and T are merged. Every other letter is one token, N, so that a window is cut into runs of known bases, and
each run into pieces from its first base on. The other strand is cut anew: its pieces are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from seqlong.datamodules.dna.alphabet import BASE_TABLE, Bytes, translate
from seqlong.datamodules.dna.fasta import Header
from seqlong.datamodules.dna.sequences import read_sequences
from seqlong.datamodules.dna.tokens import SPECIAL, DnaTokenizer, Ids
from seqlong.datamodules.text.vocabulary import TokenizerVocabulary
from seqlong.errors import ConfigError, DataError

#: Longest piece, bases: repeats would else become tokens that stand nowhere else.
LONGEST = 16
#: Bases that pieces are learnt from at once, and in all.
_PART, LIMIT = 4096, 1 << 25
_UPPER = bytes(b"ACGTN"[value] for value in BASE_TABLE)


class BpeTokenizer(DnaTokenizer):
    """Pieces of a tokenizer.json of Hugging Face ``tokenizers``, ours or another's of bases.

    Args:
        path: the file.

    Raises:
        DataError: no such file, or a tokenizer that does not write bases.
    """

    span = None

    def __init__(self, path: str | Path) -> None:
        self._vocabulary = TokenizerVocabulary(path)
        tokenizer = self._vocabulary.tokenizer
        self.size, self.pad, self.mask = self._vocabulary.size, self._vocabulary.pad, self._vocabulary.mask
        unknown = [tokenizer.token_to_id(name) for name in ("N", "<unk>", "[UNK]")]
        found = next((number for number in unknown if number is not None), None)
        pieces = {number: text for text, number in tokenizer.get_vocab(with_added_tokens=True).items()}
        self._pieces = {number: text for number, text in pieces.items() if text and not text.strip("ACGT")}
        probe = "ACGTTGCAAC"
        if found is None or "".join(self._pieces.get(one, "") for one in self._ids(probe)) != probe:
            raise DataError(
                f"{path}: this tokenizer has no pieces of A, C, G and T, or none for N; train one with "
                "seqlong tokenizer train genome.fa"
            )
        self.unknown, self.unit = int(found), "token"
        self.name = f"pieces of {Path(path).name}"

    @cached_property
    def _widths(self) -> Ids:
        widths = np.zeros(self.size, dtype=np.int64)
        for number, text in self._pieces.items():
            widths[number] = len(text)
        widths[self.unknown] = 1
        return widths

    @property
    def replacements(self) -> Sequence[int]:
        return sorted(self._pieces)

    def _ids(self, text: str) -> list[int]:
        return self._vocabulary.tokenizer.encode(text, add_special_tokens=False).ids

    def tokens(self, bases: Bytes) -> Ids:
        known = translate(bases, BASE_TABLE) != 4
        cuts = [0, *(np.flatnonzero(np.diff(known)) + 1).tolist(), bases.size]
        letters = bases.tobytes().translate(_UPPER)
        made: list[Ids] = []
        for start, stop in pairwise(cuts):
            if start == stop:
                continue
            if known[start]:
                made.append(np.array(self._ids(letters[start:stop].decode()), dtype=np.int64))
            else:
                made.append(np.full(stop - start, self.unknown, dtype=np.int64))
        return np.concatenate(made) if made else np.zeros(0, dtype=np.int64)

    def widths(self, ids: Ids) -> Ids:
        return self._widths[ids]

    def known(self, ids: Ids) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return (self._widths[ids] > 0) & (ids != self.unknown)

    def decode(self, tokens: Sequence[int] | Ids) -> str:
        names = [self._pieces.get(number) for number in np.asarray(tokens, dtype=np.int64).tolist()]
        tokenizer = self._vocabulary.tokenizer
        return "".join(
            name or ("N" if number == self.unknown else str(tokenizer.id_to_token(number)))
            for name, number in zip(names, np.asarray(tokens).tolist(), strict=True)
        )


def train_bpe(paths: Sequence[str], size: int, out: str | Path, limit: int = LIMIT) -> Path:
    """Learn pieces from sequence files, on both strands, and save a tokenizer.json.

    Ids are four special tokens, N, the four bases, and merges.

    Args:
        paths: FASTA, FASTQ, GenBank or EMBL.
        size: ids in all.
        out: the file to write.
        limit: bases to learn from, at most, shared among the files.

    Raises:
        ConfigError: too small a vocabulary, or no folder to write to.
        DataError: a file cannot be read, or holds too few bases for so many ids.
    """
    from tokenizers import Tokenizer, models, trainers

    smallest = len(SPECIAL) + 5
    if size <= smallest:
        raise ConfigError(f"size {size} is too small: special tokens and single bases alone are {smallest}")
    target = Path(out).expanduser()
    if not target.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {target.parent}")
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, "N"],
        initial_alphabet=list("ACGT"),
        max_token_length=LONGEST,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_parts(paths, limit), trainer=trainer)
    found = tokenizer.get_vocab_size()
    if found < size:
        raise DataError(
            f"{', '.join(map(str, paths))}: the bases have pieces for {found} ids only, not {size}; give more, or "
            f"--size {found}"
        )
    tokenizer.save(str(target))
    return target


def _parts(paths: Sequence[str], limit: int) -> Iterator[str]:
    """Runs of known bases, in parts, each also as its other strand."""
    other = str.maketrans("ACGT", "TGCA")
    for path in paths:
        room = max(limit // len(paths) // 2, 1)
        for item in read_sequences(path):
            if room <= 0:
                break
            if isinstance(item, Header):
                continue
            text = item[:room].translate(_UPPER).decode()
            room -= len(text)
            for run in text.replace("N", " ").split():
                for start in range(0, len(run), _PART):
                    part = run[start : start + _PART]
                    yield part
                    yield part[::-1].translate(other)
