"""Vocabularies: bytes, or a tokenizer.json of Hugging Face ``tokenizers``. Documents go in, arrays of ids come out."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlong.errors import ConfigError, DataError, nearest

PAD, MASK, BOS, EOS = range(4)
SPECIALS = ("<pad>", "<mask>", "<bos>", "<eos>")
_SHIFT = len(SPECIALS)
#: Characters that are tokenised at once. Longer documents are cut between words.
PIECE = 1 << 16
#: Characters of text given to the tokenizer's threads at once.
BATCH = 1 << 23
_NAMES = {
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", "<|endoftext|>"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "mask": ("<mask>", "[MASK]"),
}
#: A place where text can be cut without another result: white space begins, which no token of a word ends with.
_CUT = re.compile(r"(?<=\S)\s")
_PROBE = "It was the best of times,\nit was the worst.  (1,859 of them)\n\n\tDon't; caf\u00e9 \u4e16\u754c \u00a73."


class Vocabulary(ABC):
    """Token ids and what they stand for.

    Attributes:
        size: number of ids.
        pad: id of padding.
        mask: id that hides a token in masked modelling; None where there is none.
        bos: id that begins a document, or None.
        eos: id that ends one, or None.
        dtype: how tokens are kept on disk.
        offset: what is added to a token on disk to make its id.
        digest: names the vocabulary: two with the same digest give the same ids.
        unit: what a token is called.
        replacements: ids that a random corruption may draw.
    """

    size: int
    pad: int
    mask: int | None
    bos: int | None
    eos: int | None
    dtype: np.dtype[Any]
    offset: int = 0
    digest: str
    unit: str = "token"

    @abstractmethod
    def write(self, documents: Iterable[tuple[int, bytes]]) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Turn pieces of text into tokens as they are kept on disk, in order.

        Args:
            documents: ``(document number, UTF-8 bytes)``, the pieces of one document after one another.

        Yields:
            tokens of dtype ``dtype``, and ``(n, 2)`` int64 of document numbers and how many of the tokens are theirs.
        """

    @abstractmethod
    def byte_lengths(self) -> NDArray[np.int64]:
        """``(size)`` bytes of text that each id stands for, 0 for special ones."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ones."""

    @abstractmethod
    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        """The text of ids; special ones are left out."""


class ByteVocabulary(Vocabulary):
    """260 ids: 4 special ones, and the 256 bytes of UTF-8 text after them."""

    size = 256 + _SHIFT
    pad, mask, bos, eos = PAD, MASK, BOS, EOS
    dtype = np.dtype(np.uint8)
    offset = _SHIFT
    digest = "bytes-260"
    unit = "byte"
    replacements: Sequence[int] = range(_SHIFT, 256 + _SHIFT)

    def write(self, documents: Iterable[tuple[int, bytes]]) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        for number, data in documents:
            yield np.frombuffer(data, dtype=np.uint8), np.array([[number, len(data)]], dtype=np.int64)

    def byte_lengths(self) -> NDArray[np.int64]:
        lengths = np.ones(self.size, dtype=np.int64)
        lengths[:_SHIFT] = 0
        return lengths

    def encode(self, text: str) -> list[int]:
        return (np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) + _SHIFT).tolist()

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.size):
            raise DataError(f"bytes: found id {ids.max() if ids.min() >= 0 else ids.min()}, expected 0 to 259")
        return (ids[ids >= _SHIFT] - _SHIFT).astype(np.uint8).tobytes().decode("utf-8", "replace")


class TokenizerVocabulary(Vocabulary):
    """Any tokenizer.json.

    The beginning and the end of a document are the tokenizer's own special tokens, found by their usual names. Special
    tokens that are spelled out in the text are tokenised as text.

    Args:
        path: the file.
        bos: token that begins a document; null finds one by its usual names; an empty string is none.
        eos: token that ends a document, likewise.

    Raises:
        ConfigError: there is no such token.
        DataError: the file is no tokenizer.
    """

    def __init__(self, path: str | Path, bos: str | None = None, eos: str | None = None) -> None:
        self.path = Path(path).expanduser()
        self._tokenizer: Any = None
        tokenizer = self.tokenizer
        self.size = tokenizer.get_vocab_size(with_added_tokens=True)
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.size = max(self.size, highest + 1)  # ids may have holes
        self.bos, self.eos = self._special("bos", bos), self._special("eos", eos)
        pad = self._special("pad", None)
        self.pad = pad if pad is not None else self.eos if self.eos is not None else 0
        self.mask = self._special("mask", None)
        self.dtype = np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)
        text = tokenizer.to_str().encode()
        self.digest = hashlib.sha256(text + f"{self.bos},{self.eos}".encode()).hexdigest()[:32]
        whole = tokenizer.encode(_PROBE, add_special_tokens=False).ids
        apart = [token for part in pieces(_PROBE, 1) for token in tokenizer.encode(part, add_special_tokens=False).ids]
        #: Whether a text may be cut between words without another result. Without it, pieces are large instead.
        self.cuts_freely = whole == apart

    @property
    def tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer``."""
        if self._tokenizer is None:
            self._tokenizer = _load(self.path)
        return self._tokenizer

    @property
    def replacements(self) -> Sequence[int]:
        """Ids that a random corruption may draw: all that stand for text."""
        return np.flatnonzero(self.byte_lengths() > 0).tolist()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tokenizer": None}  # a loader's worker reads the file itself, if it ever needs it

    def write(self, documents: Iterable[tuple[int, bytes]]) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        size = PIECE if self.cuts_freely else BATCH
        owners: list[int] = []
        texts: list[str] = []
        waiting = 0
        for number, text in _texts(documents, size):
            owners.append(number)
            texts.append(text)
            waiting += len(text)
            if waiting >= BATCH:
                yield self._encode(owners, texts)
                owners, texts, waiting = [], [], 0
        if texts:
            yield self._encode(owners, texts)

    def _encode(self, owners: list[int], texts: list[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        counts = np.array([len(one) for one in found], dtype=np.int64)
        tokens = np.empty(int(counts.sum()), dtype=self.dtype)
        place = 0
        for one in found:
            tokens[place : place + len(one)] = one.ids
            place += len(one)
        return tokens, np.stack([np.array(owners, dtype=np.int64), counts], axis=1)

    def byte_lengths(self) -> NDArray[np.int64]:
        lengths = np.zeros(self.size, dtype=np.int64)
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        byte_level = "ByteLevel" in repr(self.tokenizer.decoder) or "ByteLevel" in repr(self.tokenizer.pre_tokenizer)
        for token, number in vocabulary.items():
            if byte_level:
                lengths[number] = len(token)  # one letter stands for each byte
            elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
                lengths[number] = 1
            else:
                lengths[number] = len(token.replace("\u2581", " ").removeprefix("##").encode())
        for number, added in self.tokenizer.get_added_tokens_decoder().items():
            lengths[number] = 0 if added.special else len(added.content.encode())
        return lengths

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        return str(self.tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=True))

    def _special(self, role: str, wanted: str | None) -> int | None:
        tokenizer = self.tokenizer
        if wanted is not None:
            if not wanted:
                return None
            number = tokenizer.token_to_id(wanted)
            if number is None:
                added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
                raise ConfigError(
                    f"data.{role}: {self.path} has no token '{wanted}'{nearest(wanted, added)} (its special tokens: "
                    f"{', '.join(added[:12]) or 'none'})"
                )
            return int(number)
        for name in _NAMES[role]:
            number = tokenizer.token_to_id(name)
            if number is not None:
                return int(number)
        return None


def load_vocabulary(tokenizer: str, bos: str | None = None, eos: str | None = None) -> Vocabulary:
    """``bytes``, or the path of a tokenizer.json.

    Raises:
        ConfigError, DataError: see `TokenizerVocabulary`.
    """
    if tokenizer == "bytes":
        if bos is not None or eos is not None:
            raise ConfigError("data.bos and data.eos name tokens of a tokenizer.json; with bytes leave them null")
        return ByteVocabulary()
    return TokenizerVocabulary(tokenizer, bos, eos)


def _load(path: Path) -> Any:
    # Unless it is said that threads are wanted, the library warns in every loader's worker, none of which tokenises.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import Tokenizer

    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    if not path.is_file():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"{path}: there is no such tokenizer{nearest(path.name, names)}; expected 'bytes' or a tokenizer.json, "
            "which seqlong tokenizer train makes"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path}: cannot be read as a tokenizer.json of Hugging Face tokenizers ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a document that spells out <eos> has not ended
    return tokenizer


def pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text where white space begins, into pieces of ``size`` characters or a little more."""
    start = 0
    while len(text) - start > size:
        found = _CUT.search(text, start + size)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _texts(documents: Iterable[tuple[int, bytes]], size: int) -> Iterator[tuple[int, str]]:
    """Pieces of documents as strings of about ``size`` characters, cut where white space begins; at ten times that
    anywhere, so that text without any cannot fill the memory."""
    owner, held = -1, ""
    for number, data in documents:
        if number != owner:
            if held:
                yield from ((owner, part) for part in pieces(held, size))
            owner, held = number, ""
        held += data.decode()
        if len(held) > 2 * size:
            *whole, held = pieces(held, size)
            yield from ((owner, part) for part in whole)
            if len(held) > 10 * size:
                cuts = range(0, len(held) - size, size)
                yield from ((owner, held[at : at + size]) for at in cuts)
                held = held[len(cuts) * size :]
    if held:
        yield from ((owner, part) for part in pieces(held, size))
