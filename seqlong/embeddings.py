"""Embeddings of what is no token: patches of a video, with learned positions and modalities as options."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """``h = W x / √p + b (+ Σ_a table_a[position_a])``: one hidden state a patch of p numbers.

    b is what tells a patch from a token in a row of both. Without tables, positions are left to the mixers: rotary
    embedding on several axes (``rope_axes``), or the order of a recurrent mixer. Then resolution and the number of
    frames may differ from training's.

    Args:
        d_model: width of the residual stream.
        size: numbers of a patch: frames x height x width x 3.
        tables: learned positions for each axis of the positions, so many for time, height and width; none if not given.
            (Factorised as in ViViT, arXiv 2103.15691.)
        modalities: first token id of each kind of tokens, ascending from 0, for rows of several kinds: ``[0, 260]`` has
            bytes below 260 and bases from there. A learned vector for each kind, and one for patches, is then added to
            every hidden state; which is known from the token alone. None adds nothing.

    Raises:
        ValueError: a size that is not positive, modalities that do not ascend from 0.
    """

    firsts: Tensor

    def __init__(
        self, d_model: int, size: int, tables: Sequence[int] | None = None, modalities: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if size < 1 or any(count < 1 for count in tables or ()):
            raise ValueError(f"PatchEmbedding needs a size and tables of 1 or more, found {size} and {tables}")
        self.size = size
        self.projection = nn.Linear(size, d_model)
        # The numbers of a patch are much alike, so that a step of Adam moves all that they are multiplied with the same
        # way; without the root in front, one step at a usual rate would be many times what W says at first.
        self.scale = 1 / math.sqrt(size)
        nn.init.normal_(self.projection.weight, std=0.25)
        nn.init.normal_(self.projection.bias, std=0.02)
        self.tables = nn.ModuleList(nn.Embedding(count, d_model) for count in tables or ())
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.02)  # type: ignore[arg-type]
        firsts = list(modalities or ())
        if firsts and (firsts[0] != 0 or any(b <= a for a, b in pairwise(firsts))):
            raise ValueError(f"modalities are first token ids, ascending from 0, found {firsts}")
        self.modalities: nn.Embedding | None = None
        if firsts:
            self.modalities = nn.Embedding(1 + len(firsts), d_model)
            nn.init.normal_(self.modalities.weight, std=0.02)
        self.register_buffer("firsts", torch.tensor(firsts, dtype=torch.int64), persistent=False)

    def forward(
        self, patches: Float[Tensor, "b t p"], positions: Int[Tensor, "b t"] | Int[Tensor, "b t a"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """Hidden states of patches.

        Raises:
            ValueError: patches of another size, no positions for the tables, or (from torch) ones beyond them.
        """
        if patches.shape[-1] != self.size:
            raise ValueError(
                f"patches of {patches.shape[-1]} numbers, but backbone.patches was built for {self.size} "
                "(frames x height x width x 3); set backbone.patches.init_args.size"
            )
        hidden = self.projection(patches.to(self.projection.weight.dtype) * self.scale)
        if not self.tables:
            return hidden
        if positions is None or positions.dim() != 3 or positions.shape[-1] != len(self.tables):
            raise ValueError(f"tables for {len(self.tables)} axes need positions (b t {len(self.tables)})")
        for axis, table in enumerate(self.tables):
            hidden = hidden + table(positions[..., axis])
        return hidden

    def kinds(self, tokens: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
        """Which modality each position is of: 0 a patch (token -1), 1 the first kind of tokens, 2 the second, ..."""
        return torch.bucketize(tokens, self.firsts, right=True)


#: Builds an embedding of patches for a width. In YAML: ``{class_path: seqlong.embeddings.PatchEmbedding, ...}``.
PatchFactory = Callable[[int], PatchEmbedding]


def embed(
    tokens: Int[Tensor, "b t"] | None,
    patches: Float[Tensor, "b t p"] | None,
    positions: Tensor | None,
    of_tokens: nn.Embedding,
    of_patches: PatchEmbedding | None,
) -> Float[Tensor, "b t d"]:
    """Hidden states of a row of tokens, of patches, or of both: a patch stands where the token is -1. With modalities
    (``PatchEmbedding``) plus the vector of each position's kind.

    Raises:
        ValueError: patches, and nothing that embeds them.
    """
    hidden = _embed(tokens, patches, positions, of_tokens, of_patches)
    if of_patches is None or of_patches.modalities is None:
        return hidden
    kinds = hidden.new_zeros(hidden.shape[:2], dtype=torch.int64) if tokens is None else of_patches.kinds(tokens)
    return hidden + of_patches.modalities(kinds).to(hidden.dtype)


def _embed(
    tokens: Tensor | None,
    patches: Tensor | None,
    positions: Tensor | None,
    of_tokens: nn.Embedding,
    of_patches: PatchEmbedding | None,
) -> Tensor:
    if patches is None:
        assert tokens is not None
        return of_tokens(tokens)
    if of_patches is None:
        raise ValueError(
            "the batch holds patches, but the model embeds tokens only; set backbone.patches to "
            f"{{class_path: seqlong.embeddings.PatchEmbedding, init_args: {{size: {patches.shape[-1]}}}}}"
        )
    if tokens is not None and positions is not None and of_patches.tables and positions.dim() == 3:
        positions = positions.masked_fill((tokens >= 0)[..., None], 0)  # texts go on beyond the tables, unread
    seen = of_patches(patches, positions)
    if tokens is None:
        return seen
    return torch.where((tokens >= 0)[..., None], of_tokens(tokens.clamp(min=0)).to(seen.dtype), seen)
