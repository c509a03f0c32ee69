"""Backbone: embed, blocks by a pattern, norm. It has no head and no loss."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.batch import SequenceBatch
from seqlong.block import MEMORY, ROUTERS, Block, Checkpointing, Residual
from seqlong.embeddings import PatchEmbedding, PatchFactory, embed
from seqlong.errors import ConfigError, nearest
from seqlong.ffn import FeedForwardFactory, SwiGLU
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import MixerFactory
from seqlong.norms import NORMS
from seqlong.offload import HostMemory
from seqlong.state import BackboneState
from seqlong.strands import ReverseComplement, Strands


@dataclass
class BackboneConfig:
    """The architecture, as data.

    Args:
        vocab_size: token ids are below this.
        d_model: width of the residual stream.
        pattern: one letter a block, from ``mixers``; spaces are for the eye. Repeated until there are ``layers``.
        mixers: letter -> mixer, given as class_path and init_args.
        layers: blocks in all; the length of the pattern if not given.
        ffn: the feed-forward half of every block, given as class_path and init_args; null leaves it out.
        ffns: letter -> feed-forward of that letter's blocks instead of ``ffn``; null leaves theirs out. Two letters may
            have one mixer and two feed-forwards.
        reads: letter -> letter: a block of the first reads what the last block of the second before it publishes: keys
            and values, for ``SharedAttention``, or the output of a recurrence, for ``GatedMemoryUnit``.
        patches: what embeds patches (of a video), given as class_path and init_args; null: the model reads tokens only.
        norm: kind of norm before each half and at the end.
        norm_eps: added under the root in norms.
        residual: what each half of a block adds its result to: its ``input``, as nearly all models do, or the ``norm``
            of it, ``n + mixer(n)`` with ``n = norm(h)``, as MiniMax-01 does.
        rc: ``equivariant`` reads every row and its reverse complement with the same weights: hidden states are twice as
            wide, one half a strand, and turn around with the input (see ``seqlong.strands``). For masked models of
            DNA, at twice the work. ``none`` reads rows as they are given.
        complement: for ``rc``: the token that pairs with each token, from 0 on; ids beyond are their own. DNA's bases
            A, C, G, T are 4 to 7.
        checkpointing: what training keeps for the backward pass. ``none``: everything, fastest. ``selective``: matrix
            products and states. ``block``: the input of each block, a third more compute. ``tiled``: the same, and
            inside a block at most ``tile`` positions at once: for the longest rows.
        tile: positions a tile, for ``tiled``.
        offload: keep that in the host's memory instead of the GPU's, copied out and back beside the computation. For
            ``block`` and ``tiled``: the input of each block, 2 or 4 bytes a channel, position and block. On a CPU
            nothing changes.
        residual_in_fp32: keep the residual stream in float32 under mixed precision. False halves what ``block`` and
            ``tiled`` keep, a tensor a block, and costs some digits: for rows that else do not fit.
    """

    vocab_size: int = 16
    d_model: int = 128
    pattern: str = "mmma"
    mixers: dict[str, MixerFactory] = field(default_factory=dict)
    layers: int | None = None
    ffn: FeedForwardFactory | None = SwiGLU
    ffns: dict[str, FeedForwardFactory | None] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    patches: PatchFactory | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    residual: Residual = "input"
    rc: ReverseComplement = "none"
    complement: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 7, 6, 5, 4])
    checkpointing: Checkpointing = "none"
    tile: int = 16384
    offload: bool = False
    residual_in_fp32: bool = True

    def letters(self) -> str:
        """One letter a block.

        Raises:
            ConfigError: an empty pattern, a letter that ``mixers`` lacks, in the pattern, ``ffns`` or ``reads``.
        """
        letters = "".join(self.pattern.split())
        known = ", ".join(f"'{letter}'" for letter in self.mixers) or "none"
        if not letters:
            raise ConfigError("backbone.pattern is empty; give one letter a block, such as 'mmma'")
        for number, letter in enumerate(letters):
            if letter not in self.mixers:
                raise ConfigError(
                    f"backbone.pattern '{self.pattern}' has '{letter}' at block {number + 1}, but backbone.mixers "
                    f"defines {known}{nearest(letter, self.mixers)}; use one of these or add mixers.{letter}"
                )
        for letter in self.ffns:
            if letter not in self.mixers:
                raise ConfigError(
                    f"backbone.ffns.{letter} is for no block: backbone.mixers defines {known}"
                    f"{nearest(letter, self.mixers)}; use one of these or add mixers.{letter}"
                )
        for pair in self.reads.items():
            for letter in pair:
                if letter not in self.mixers:
                    raise ConfigError(
                        f"backbone.reads has '{letter}', but backbone.mixers defines {known}"
                        f"{nearest(letter, self.mixers)}; use one of these or add mixers.{letter}"
                    )
        count = len(letters) if self.layers is None else self.layers
        if count < 1:
            raise ConfigError(f"backbone.layers must be at least 1, found {count}")
        return (letters * math.ceil(count / len(letters)))[:count]


@dataclass
class BackboneOutput:
    """What a backbone returns.

    Attributes:
        hidden: ``(b t d)`` after the last norm; ``(b t 2d)``, both strands, if the backbone is equivariant.
        state: to be passed with the next window; None if no state was passed with this one.
        aux: further losses and figures that the blocks report, by name. ``router_loss_sum`` is a sum over positions
            that are not padding; ``experts/<block>/<what>`` are, in training, a block's ``load``, ``positions`` and
            ``entropy`` (see ``seqlong.ffn.MoE``), blocks counted from 1, and ``routers/<block>/<what>`` those of a
            router in its mixer, ``routers/<block>/<name>/<what>`` of one of several (see ``Mixer.router_sums``).
    """

    hidden: Float[Tensor, "b t d"]
    state: BackboneState | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)


class Backbone(nn.Module):
    """Embedding, blocks by pattern, norm.

    Attributes:
        strands: what reads the other strand, if ``rc`` is ``equivariant``; else None.
        width: channels of the hidden states.

    Initialisation follows the Mamba2 code: embeddings normal with deviation 0.02, linear layers torch's default, and
    layers that write to the residual stream divided by the root of how many there are.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.letters = config.letters()
        self.checkpointing, self.tile, self.offload = config.checkpointing, config.tile, config.offload
        self.residual_in_fp32 = config.residual_in_fp32
        if config.checkpointing == "tiled" and config.tile < 1:
            raise ConfigError(f"backbone.tile must be at least 1 position, found {config.tile}")

        def norm(width: int) -> nn.Module:
            return NORMS[config.norm](width, config.norm_eps)

        self.strands = Strands(config.complement, config.vocab_size) if config.rc == "equivariant" else None
        self.width = config.d_model if self.strands is None else 2 * config.d_model
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.patch_embedding: PatchEmbedding | None = None
        if config.patches is not None:
            try:
                self.patch_embedding = config.patches(config.d_model)
            except ValueError as error:
                raise ConfigError(f"backbone.patches: {error}") from error
        blocks = []
        for layer, letter in enumerate(self.letters):
            try:
                mixer = config.mixers[letter](config.d_model)
                mixer.place(layer, len(self.letters))
            except ValueError as error:
                raise ConfigError(f"backbone.mixers.{letter}: {error}") from error
            try:
                make = config.ffns.get(letter, config.ffn)
                ffn = None if make is None else make(config.d_model)
            except ValueError as error:
                raise ConfigError(f"backbone.{_ffn_key(config, letter)}: {error}") from error
            blocks.append(Block(config.d_model, mixer, ffn, norm, config.residual))
        choosing = [key for key, block in zip(self.letters, blocks, strict=True) if not block.feeds_each_alone]
        for block in blocks:
            block.one_way = self.strands is None
        if all(block.mixer.causal and block.one_way for block in blocks) and choosing:
            key = _ffn_key(config, choosing[0])
            raise ConfigError(
                f"backbone.{key}: choice 'expert' lets experts compare a position with later ones, but every mixer of "
                f"pattern '{config.pattern}' is causal; set backbone.{key}.init_args.choice=token, or use "
                "bidirectional mixers"
            )
        self.sources = _bind(config, self.letters, blocks)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(config.d_model)
        self._initialise()

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def _initialise(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self._blocks():
            writers = block.residual_projections()
            for layer in writers:
                with torch.no_grad():
                    layer.weight /= math.sqrt(len(writers) * len(self.blocks))

    def forward(self, batch: SequenceBatch, state: BackboneState | None = None) -> BackboneOutput:
        """Hidden states of every position.

        Args:
            batch: tokens, patches or both, with segment ids and positions if there are any.
            state: from the window before, or ``initial_state`` to begin a stream; None keeps none.
        """
        if self.strands is not None:
            _check_strands(batch, state)
        rows, length = batch.shape
        if state is not None and batch.continues is not None:
            state = state.keep(batch.continues)
        if batch.fragment is not None:
            self._check_fragment(state)
            layout = batch.fragment.layout(rows, length)
        else:
            layout = SequenceLayout.build(
                rows,
                length,
                batch.segment_ids,
                batch.positions,
                offset=None if state is None else state.position,
                device=batch.inputs.device,
            )
        if batch.prefix is not None:
            layout = replace(layout, prefix=batch.prefix)
        tokens, whole = batch.tokens, layout
        if self.strands is not None and tokens is not None:
            tokens, layout = self.strands.both(tokens, whole)
        hidden = embed(tokens, batch.patches, batch.positions, self.embedding, self.patch_embedding)
        if not self.residual_in_fp32 and torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        after: list[Any] = []
        aux: dict[str, Tensor] = {}
        memories: dict[int, Any] = {}
        with HostMemory() if self.offload and torch.is_grad_enabled() else nullcontext():
            for number, block in enumerate(self._blocks()):
                before = None if state is None else state.blocks[number]
                memory = memories.get(self.sources.get(number, -1))
                hidden, left, said = block(hidden, layout, before, memory, self.checkpointing, self.tile)
                after.append(left)
                if block.publishes:
                    memories[number] = said.pop(MEMORY)
                for name, value in said.items():
                    if name.endswith("_sum"):
                        aux[name] = aux[name] + value if name in aux else value
                    else:
                        part, what = name.split("/", 1) if name.startswith(f"{ROUTERS}/") else ("experts", name)
                        aux[f"{part}/{number + 1}/{what}"] = value
        hidden = self.norm(hidden)
        if self.strands is not None:  # sums are for each position, which was seen twice
            hidden = self.strands.join(hidden, whole)
            aux = {name: value / 2 if name.endswith("_sum") else value for name, value in aux.items()}
        if state is None:
            return BackboneOutput(hidden, aux=aux)
        return BackboneOutput(hidden, BackboneState(after, _advance(state.position, layout)), aux)

    def _check_fragment(self, state: BackboneState | None) -> None:
        """Raise ConfigError for what cannot be done with rows that several processes hold."""
        for given, what in (
            (state is not None, "carries no state from window to window: set task.carry_state=false"),
            (self.strands is not None, "reads no other strand: set model.backbone.rc=none"),
            (bool(self.sources), "shares no memory between blocks: take backbone.reads out"),
            (not all(block.feeds_each_alone for block in self._blocks()), "lets no expert compare positions: set "
             "choice=token"),
        ):  # fmt: skip
            if given:
                raise ConfigError(f"sequence parallelism {what}")

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> BackboneState:
        """The state before the first token of ``rows`` rows.

        Raises:
            ValueError: a mixer or the other strand needs the whole row.
        """
        if self.strands is not None:
            raise ValueError("an equivariant backbone (backbone.rc) has no state: the other strand needs the whole row")
        blocks = [block.mixer.initial_state(rows, device, dtype) for block in self._blocks()]
        return BackboneState(blocks, torch.zeros(rows, dtype=torch.int64, device=device))


def _bind(config: BackboneConfig, letters: str, blocks: list[Block]) -> dict[int, int]:
    """Tell each block that reads a memory whose it is; which block reads which, counted from 0.

    Raises:
        ConfigError: nothing is there to read, or not what the mixer can read, or the mixer reads nothing.
    """
    sources: dict[int, int] = {}
    for number, (letter, block) in enumerate(zip(letters, blocks, strict=True)):
        kind, source = type(block.mixer).__name__, config.reads.get(letter)
        if source is None:
            if block.mixer.reads_memory:
                raise ConfigError(
                    f"backbone.mixers.{letter}: block {number + 1} is {kind}, which reads what an earlier block "
                    f"publishes; set backbone.reads.{letter} to that block's letter"
                )
            continue
        if not block.mixer.reads_memory:
            raise ConfigError(
                f"backbone.reads.{letter}: block {number + 1} is {kind}, which reads no other block's memory; take "
                f"reads.{letter} out, or use SharedAttention or GatedMemoryUnit"
            )
        found = letters.rfind(source, 0, number)
        if found < 0:
            raise ConfigError(
                f"backbone.reads.{letter}: block {number + 1} reads '{source}', but no block before it is one; put a "
                f"'{source}' earlier in the pattern"
            )
        try:
            block.mixer.bind(blocks[found].mixer)
        except ValueError as error:
            where = f"block {number + 1} reads block {found + 1}"
            raise ConfigError(f"backbone.reads.{letter}: {where}: {error}") from error
        sources[number] = found
        blocks[found].publishes = True
    return sources


def _check_strands(batch: SequenceBatch, state: BackboneState | None) -> None:
    """Raise ValueError for what has no reverse complement."""
    if state is not None:
        raise ValueError("an equivariant backbone (backbone.rc) carries no state: the other strand needs the whole row")
    if batch.tokens is None or batch.patches is not None or batch.positions is not None:
        raise ValueError(
            "an equivariant backbone (backbone.rc) reads tokens, and counts positions from either end of a segment; "
            "the batch has patches or positions of its own: set backbone.rc=none"
        )


def _ffn_key(config: BackboneConfig, letter: str) -> str:
    """The setting that a block's feed-forward is from."""
    return f"ffns.{letter}" if letter in config.ffns else "ffn"


def _advance(position: Tensor, layout: SequenceLayout) -> Tensor:
    """Tokens of the segment that goes on, after this window."""
    last = (layout.lengths - 1).clamp(min=0)[:, None]
    steps = layout.positions if layout.positions.dim() == 2 else layout.positions[..., 0]
    if not layout.shape[1]:
        return position
    return torch.where(layout.lengths > 0, steps.gather(1, last)[:, 0] + 1, position)
