"""Rows of several kinds: the patches of a clip, bases of DNA and bytes of a text, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqlong.batch import SequenceBatch
from seqlong.datamodules.dna import alphabet
from seqlong.datamodules.text.vocabulary import BOS, EOS, MASK, PAD, ByteVocabulary
from seqlong.datamodules.video.clips import Clip
from seqlong.datamodules.video.tubelets import Tubelets
from seqlong.errors import ConfigError

#: Ids below are bytes and their special tokens; from here on DNA's sixteen (``[0, DNA]`` for the model's modalities).
DNA = ByteVocabulary.size

Targets = Literal["next", "same", "pair"]
Kind = Literal["text", "dna"]


class MultimodalVocabulary:
    """276 ids: 260 of bytes (``ByteVocabulary``), then 16 of DNA, so that a base is no letter of a text.

    Attributes:
        replacements: ids that a random corruption of text may draw: printable ASCII.
    """

    size = DNA + 16
    pad, mask, bos, eos = PAD, MASK, BOS, EOS
    unit = "byte"
    digest = "bytes-260-dna-16"
    replacements: Sequence[int] = range(4 + 32, 4 + 127)

    def encode(self, text: str) -> list[int]:
        """Ids of the UTF-8 bytes of a text."""
        return ByteVocabulary().encode(text)

    def encode_dna(self, sequence: str) -> list[int]:
        """Ids of bases; what is not A, C, G, T or U is N."""
        return (
            alphabet.encode(np.frombuffer(sequence.encode("ascii"), dtype=np.uint8)).astype(np.int64) + DNA
        ).tolist()

    def decode(self, tokens: Sequence[int] | NDArray[np.int64]) -> str:
        """The text among ids; special ones and bases are left out."""
        ids = np.asarray(tokens, dtype=np.int64)
        return ByteVocabulary().decode(ids[ids < DNA])


@dataclass(frozen=True)
class Told:
    """What goes with a clip.

    Attributes:
        text: of the clip; empty for none.
        dna: bases that go with it; empty for none.
        video: number of the video, the same for all clips of one; -1 where the row counts for nothing.
        name: number of the text, the same for equal texts.
    """

    text: str = ""
    dna: str = ""
    video: int = -1
    name: int = -1


@dataclass(frozen=True)
class Rows:
    """How a clip and what goes with it become a row.

    - ``next`` and ``same``: one segment, ``patches, <dna> bases <end>, <text> bytes <end>``, so that a causal model
      reads a text after all of what it is about. The target of a position is the token after it, or that at it, where
      it is of one of ``losses``; patches have none.
    - ``pair``: two segments that do not see each other, patches and then ``<text> bytes <end>``. The target of the last
      patch is the number of the video, that of the last byte the number of the text.

    Positions are ``(t 3)``: patches stand at their time, height and width; a token stands at the same number on every
    axis, one above that before it, the first one above all of the patches'. So a text turns as on one axis, and ends
    and beginnings lie as far apart as they do in the row's own count. (arXiv 2409.12191, 2.1)

    Attributes:
        tubelets: how clips are cut.
        patches: of a clip, at most.
        text_length: bytes of a text, at most; what is longer is cut, and then has no end.
        dna_length: bases, at most; 0 for rows without DNA.
        targets: see above.
        losses: kinds of tokens that are to be predicted.
    """

    tubelets: Tubelets
    patches: int
    text_length: int
    dna_length: int = 0
    targets: Targets = "next"
    losses: tuple[Kind, ...] = ("text",)

    def __post_init__(self) -> None:
        if self.text_length < 1 or self.dna_length < 0:
            raise ConfigError(
                f"data.text_length {self.text_length} must be 1 or more, data.dna_length {self.dna_length} 0 or more"
            )
        if self.targets not in ("next", "same", "pair"):
            raise ConfigError(f"data.targets '{self.targets}' must be next, same or pair")
        if self.targets == "pair" and self.dna_length:
            raise ConfigError("data.targets=pair matches videos and texts; set data.dna_length=0")
        if not self.losses or not set(self.losses) <= {"text", "dna"}:
            raise ConfigError(f"data.losses {list(self.losses)} must name text, dna or both")
        if "dna" in self.losses and (not self.dna_length or self.targets != "next"):
            raise ConfigError(
                "data.losses has dna, which needs data.dna_length above 0 and data.targets=next (masks are of text)"
            )

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.patches + (self.dna_length + 2 if self.dna_length else 0) + self.text_length + 2

    def tokens(self, told: Told) -> list[tuple[Kind, Tensor]]:
        """What follows the patches: each kind with its ids, the beginning and the end with them."""
        words = MultimodalVocabulary()
        parts: list[tuple[Kind, Tensor]] = []
        for kind, given, room, shift in (
            ("dna", words.encode_dna(told.dna), self.dna_length, DNA),
            ("text", words.encode(told.text), self.text_length, 0),
        ):
            if given and room:
                ids = [BOS + shift, *given[:room], *([EOS + shift] if len(given) <= room else [])]
                parts.append((kind, torch.tensor(ids)))  # type: ignore[arg-type]
        return parts

    def join(self, clips: Sequence[Clip], told: Sequence[Told], numbers: Tensor) -> SequenceBatch:
        """Rows of ``length`` positions; what is left of each is padding, and all of a row whose clip has no pixels.

        Args:
            clips: one a row.
            told: what goes with each.
            numbers: of the samples; ``index`` of the batch.
        """
        rows, length = len(clips), self.length
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        targets = torch.full((rows, length), -1)
        segments = torch.zeros(rows, length, dtype=torch.int32)
        positions = torch.zeros(rows, length, 3, dtype=torch.int64)
        patches = torch.zeros(rows, length, self.tubelets.size)
        for row, (clip, with_it) in enumerate(zip(clips, told, strict=True)):
            if clip.pixels is None or not len(clip.pixels):
                continue
            grid = self.tubelets.grid(*clip.pixels.shape[:3])
            at = min(grid[0] * grid[1] * grid[2], self.patches)
            patches[row, :at] = self.tubelets.cut(clip.pixels)[:at]
            positions[row, :at] = self.tubelets.positions(grid)[:at]
            tokens[row, :at], segments[row, :at] = -1, 1
            place = 1 + int(positions[row, :at].max())
            if self.targets == "pair":
                targets[row, at - 1], place = with_it.video, 0
            for kind, ids in self.tokens(with_it):
                end = at + len(ids)
                tokens[row, at:end] = ids
                positions[row, at:end] = torch.arange(place, place + len(ids))[:, None]
                segments[row, at:end] = 2 if self.targets == "pair" else 1
                if self.targets == "pair":
                    targets[row, end - 1] = with_it.name
                elif kind in self.losses:
                    if self.targets == "next":
                        targets[row, at : end - 1] = ids[1:]
                    else:
                        targets[row, at + 1 : end] = ids[1:]
                at, place = end, place + len(ids)
        return SequenceBatch(
            tokens=tokens, targets=targets, segment_ids=segments, positions=positions, index=numbers,
            source=[clip.source for clip in clips], patches=patches,
        )  # fmt: skip
