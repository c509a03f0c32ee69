"""How well videos find their texts and texts their videos: recall at k both ways, beside what guessing would find."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

#: Hits that are looked at.
AT = (1, 5, 10)
#: Queries compared at a time.
_ROWS = 512


def belong(
    videos: Int[Tensor, "q"], names: Int[Tensor, "q"], other_videos: Int[Tensor, "n"], other_names: Int[Tensor, "n"]
) -> Bool[Tensor, "q n"]:
    """Whether the pair of a row and that of a column are of one video or have one text: then each fits the other, and
    it must not be held against a model that it says so. Rows of -1 belong to nothing."""
    same = (videos[:, None] == other_videos) | (names[:, None] == other_names)
    return same & (videos >= 0)[:, None] & (other_videos >= 0)


def contrast(
    scores: Float[Tensor, "q n"], right: Int[Tensor, "q"], fits: Bool[Tensor, "q n"], known: Bool[Tensor, "n"]
) -> Float[Tensor, "q"]:
    """``-ln softmax(scores)[right]`` over the right column and those that do not fit; nats.

    Args:
        scores: of each query with each candidate.
        right: the column of each query's partner.
        fits: see ``belong``.
        known: which columns are candidates.
    """
    own = torch.zeros_like(fits).scatter(1, right[:, None], True)
    allowed = (known & ~fits) | own
    return torch.nn.functional.cross_entropy(scores.masked_fill(~allowed, -math.inf), right, reduction="none")


def chance(right: int, of: int, at: int) -> float:
    """The probability that one of ``right`` is among ``at`` drawn of ``of``: ``1 - C(of - right, at) / C(of, at)``."""
    if of - right < at:
        return 1.0
    return 1 - math.comb(of - right, at) / math.comb(of, at)


class Retrieval(Metric):
    """Recall at 1, 5 and 10 of every text for each video and the other way about, over all ranks.

    A query is a hit at k where one of its partners stands among the first k; what scores as high as a partner stands
    before it. A video that several rows have is one video, and a text one text.
    """

    full_state_update = False
    higher_is_better = True
    video: list[Tensor]
    text: list[Tensor]
    videos: list[Tensor]
    names: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("video", "text", "videos", "names"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self, video: Float[Tensor, "b w"], text: Float[Tensor, "b w"], videos: Int[Tensor, "b"], names: Int[Tensor, "b"]
    ) -> None:
        """Add pairs.

        Args:
            video: embeddings.
            text: embeddings.
            videos: number of each video; negative for a row that counts for nothing.
            names: number of each text.
        """
        kept = videos >= 0
        self.video.append(video[kept].float())
        self.text.append(text[kept].float())
        self.videos.append(videos[kept])
        self.names.append(names[kept])

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings and numbers of all pairs."""
        found = (self.video, self.text, self.videos, self.names)
        return tuple(part if isinstance(part, Tensor) else torch.cat(part) for part in found)  # type: ignore[return-value]

    def compute(self) -> dict[str, Tensor]:
        """Shares: ``video_to_text/r1`` and so on; ``video_to_text/chance_r1``, what guessing finds."""
        video, text, videos, names = self.parts()
        if not len(videos):
            return {}
        which_video, of_video = _first(videos)
        which_text, of_text = _first(names)
        found = {}
        for way, query, gallery, asked, given in (
            ("video_to_text", video[which_video], text[which_text], of_video, of_text),
            ("text_to_video", text[which_text], video[which_video], of_text, of_video),
        ):
            ranks, counts = _ranks(query, gallery, asked, given)
            for at in AT:
                guessed = [chance(int(c), len(gallery), min(at, len(gallery))) for c in counts.tolist()]
                found[f"{way}/r{at}"] = (ranks <= at).float().mean()
                found[f"{way}/chance_r{at}"] = ranks.new_tensor(sum(guessed) / len(guessed), dtype=torch.float32)
        return found


def _first(numbers: Int[Tensor, "n"]) -> tuple[Int[Tensor, "u"], Int[Tensor, "n"]]:
    """The first row of each number, and which of them each row is."""
    _, of = numbers.unique(return_inverse=True)
    rows = torch.arange(len(numbers), device=numbers.device)
    first = rows.new_full((int(of.max()) + 1,), len(numbers)).scatter_reduce(0, of, rows, "amin")
    return first, of


def _ranks(
    query: Float[Tensor, "q w"], gallery: Float[Tensor, "n w"], asked: Int[Tensor, "r"], given: Int[Tensor, "r"]
) -> tuple[Int[Tensor, "q"], Int[Tensor, "q"]]:
    """The rank of each query's best partner, from 1, and how many partners it has; ``asked`` and ``given`` are the
    query and the partner of each row."""
    ranks, counts = [], []
    for begin in range(0, len(query), _ROWS):
        part = query[begin : begin + _ROWS]
        scores = part @ gallery.T
        here = (asked >= begin) & (asked < begin + len(part))
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[asked[here] - begin, given[here]] = True
        best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + ((scores >= best) & ~right).sum(dim=1))
        counts.append(right.sum(dim=1))
    return torch.cat(ranks), torch.cat(counts)
