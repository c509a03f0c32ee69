"""VideoTextMatching: which text is of which video?"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seqlong.backbone import BackboneConfig, BackboneOutput
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.metrics import world
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.base import SequenceTask
from seqlong.tasks.finetune import freeze_blocks, load_backbone, scale_by_depth
from seqlong.tasks.retrieval import Retrieval, belong, contrast
from seqlong.tasks.video_classification import needs_patches

_VIDEO, _TEXT = 1, 2  # segments of a row
_HOTTEST = math.log(100.0)


class VideoTextMatching(SequenceTask):
    """Videos and texts to vectors, so that those that belong together lie together: ``s · v·u``, both of length 1.

    One backbone reads both, as two segments of one row that do not see each other. Each is pooled by its mean and
    projected. The loss is that of choosing the right text for a video, and the right video for a text, among those of
    the whole batch (InfoNCE, arXiv 1807.03748; both ways, arXiv 2103.00020):
    ``-½ ln softmax_j(s v_i·u_j)[i] - ½ ln softmax_j(s u_i·v_j)[i]``. What is of the same video, or has the same text,
    is no wrong answer.

    Why no head over one row of both: that scores one pair a row, so that b wrong answers cost b times the work, and a
    search through n videos n passes for each question. Here a batch of b has b² - b wrong answers for the work of b
    rows, which is what small batches lack most, and n videos are embedded once.

    Over several processes all of their pairs are compared, with gradients through both sides: the loss is that of one
    process with the whole batch.

    Logs what every task does; ``bits`` are of choosing among a training batch, in evaluation too. And, over all pairs
    of an evaluation, ``val/video_to_text/r1`` (r5, r10), ``val/text_to_video/r1``: how often a partner is among the
    first; ``val/video_to_text/chance_r1``: how often it would be by chance.

    Args:
        backbone: the architecture; its ``patches`` must be as large as the data's.
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        width: of the vectors.
        loss: ``softmax`` as above; ``sigmoid``: each pair for itself, ``-ln σ(±(s v_i·u_j + c))``, arXiv 2303.15343.
        init_from: checkpoint file or run folder of any task of ours, whose backbone training starts from.
        freeze: first blocks that stay as they are, the embeddings with them; -1: the whole backbone.
        layer_decay: learning rate of a block as a share of that of the block above it.
        backbone_lr: learning rate of the backbone as a share of ``optimizer.lr``, which the projections have.
        compile: compile each block with torch.compile: a slow first step, then faster ones on a GPU.

    Raises:
        ConfigError: a setting is out of its range, or the model reads no patches.
    """

    targets = "pair"  # type: ignore[assignment]

    def __init__(
        self,
        backbone: BackboneConfig,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        width: int = 128,
        loss: Literal["softmax", "sigmoid"] = "softmax",
        init_from: str | None = None,
        freeze: int = 0,
        layer_decay: float = 1.0,
        backbone_lr: float = 1.0,
        compile: bool = False,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, True, 0.0, False, compile)
        if width < 1 or loss not in ("softmax", "sigmoid"):
            raise ConfigError(f"task.width {width} must be 1 or more, task.loss '{loss}' softmax or sigmoid")
        needs_patches(self)
        self.head = PairHead(self.backbone.width, width, backbone.vocab_size)  # type: ignore[assignment]
        self.loss = loss
        freeze_blocks(self.backbone, freeze)
        if freeze:
            self.backbone.patch_embedding.requires_grad_(False)  # type: ignore[union-attr]
        self.init_from, self.layer_decay, self.backbone_lr = init_from, layer_decay, backbone_lr
        self.among = 0  # pairs that evaluation chooses among; 0: those of its batches
        for part in ("val", "test"):
            self.add_module(f"{part}_retrieval", Retrieval())

    def setup(self, stage: str) -> None:
        """Check that the data has pairs; take the weights of ``init_from``.

        Raises:
            ConfigError: it has not.
            CheckpointError: ``init_from`` does not fit.
        """
        super().setup(stage)
        self.among = int(getattr(getattr(self.trainer, "datamodule", None), "batch_size", 0))
        if stage == "fit" and self.init_from and not self.trainer.ckpt_path:
            load_backbone(self.backbone, self.init_from)

    def configure_optimizers(self) -> Any:
        """AdamW with a learning rate for each depth, and its schedule."""
        made = super().configure_optimizers()
        if self.layer_decay == 1 and self.backbone_lr == 1:
            return made
        optimizer = made["optimizer"]
        for group in optimizer.param_groups:
            group["lr"] = self.optimizer_settings.lr  # which the schedule has multiplied already
            group.pop("initial_lr", None)
        scale_by_depth(optimizer, self.backbone, self.layer_decay, self.backbone_lr)
        schedule = self.schedule.build(optimizer, self.trainer.max_steps if self.trainer.max_steps > 0 else None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        if batch.patches is None or batch.tokens is None or batch.targets is None or batch.segment_ids is None:
            raise ConfigError(
                "VideoTextMatching needs rows of a video and a text; set data=video_text data.targets=pair (or "
                "data=video_captions)"
            )
        if self._sequence is not None:
            raise ConfigError("VideoTextMatching pools rows that one process holds; set trainer.strategy=auto or ddp")
        return batch

    # --- the model -----------------------------------------------------------------------------------------------

    @property
    def pairs(self) -> PairHead:
        """The head, by its type."""
        assert isinstance(self.head, PairHead)
        return self.head

    def embed(self, batch: SequenceBatch) -> tuple[Float[Tensor, "b w"], Float[Tensor, "b w"]]:
        """Vectors of the videos and of the texts, of length 1, float32."""
        return self._vectors(self._run(batch), batch)

    def _vectors(self, output: BackboneOutput, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        assert batch.segment_ids is not None
        hidden = output.hidden if output.hidden.dtype == torch.float64 else output.hidden.float()
        pooled = []
        for segment in (_VIDEO, _TEXT):
            here = (batch.segment_ids == segment).to(hidden.dtype)
            mean = torch.einsum("btd,bt->bd", hidden, here) / here.sum(dim=1, keepdim=True).clamp(min=1)
            pooled.append(mean)
        return self.pairs(*pooled)  # type: ignore[no-any-return]

    def objective(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``SequenceTask``; ``nats`` and ``count`` are of choices, two a pair."""
        batch = self.prepare(batch)
        output = self._run(batch)
        video, text = self._vectors(output, batch)
        videos, names = numbers(batch)
        rank, ranks = world()
        every_video, every_text = gathered(video, rank, ranks), gathered(text, rank, ranks)
        all_videos, all_names = (gathered(number, rank, ranks) for number in (videos, names))
        fits = belong(videos, names, all_videos, all_names)
        known, mine = all_videos >= 0, videos >= 0
        right = torch.arange(len(videos), device=videos.device) + rank * len(videos)
        total = known.sum().clamp(min=1)
        scale = self.pairs.scale
        nats = video.new_zeros(len(videos))
        for query, gallery in ((video, every_text), (text, every_video)):
            nats = nats + torch.where(mine, contrast(scale * query @ gallery.T, right, fits, known), 0)
        if self.loss == "softmax":
            loss = nats.sum() / 2
        else:
            logits = scale * video @ every_text.T + self.pairs.offset
            each = nn.functional.softplus(torch.where(fits, -logits, logits))
            loss = torch.where(mine[:, None] & known, each, 0).sum()
        loss, aux = self._with_aux(loss * ranks / total, output, batch)
        return loss, {"nats": nats.detach().sum(dtype=torch.float64), "count": 2 * mine.sum(), **aux}

    # --- evaluation ----------------------------------------------------------------------------------------------

    def _evaluate(self, batch: SequenceBatch, part: str) -> dict[str, Tensor]:
        batch = self.prepare(batch)
        video, text = self.embed(batch)
        videos, names = numbers(batch)
        self.get_submodule(f"{part}_retrieval").update(video, text, videos, names)  # type: ignore[operator]
        return {"video": video, "text": text}

    def on_validation_epoch_end(self) -> None:
        self._log_retrieval("val")

    def on_test_epoch_end(self) -> None:
        self._log_retrieval("test")

    def _log_retrieval(self, part: str) -> None:
        metric = self.get_submodule(f"{part}_retrieval")
        assert isinstance(metric, Retrieval)
        figures = metric.compute()
        with metric.sync_context(should_sync=world()[1] > 1):
            video, text, videos, names = metric.parts()
        if len(videos):
            bits = self._bits(video, text, videos, names)
            self.log(f"{part}/bits", bits, batch_size=1)
        for name, value in figures.items():
            self.log(f"{part}/{name}", value, batch_size=1)
        metric.reset()

    def _bits(self, video: Tensor, text: Tensor, videos: Tensor, names: Tensor) -> Tensor:
        """Mean bits of choosing among as many pairs as training does; NaN where all belong together."""
        size = self.among or len(videos)
        scale = self.pairs.scale.detach()
        nats: list[Tensor] = []
        for begin in range(0, max(len(videos) - size, 0) + 1, size):
            v, u, a, b = (part[begin : begin + size] for part in (video, text, videos, names))
            right, known = torch.arange(len(a), device=a.device), torch.ones_like(a, dtype=torch.bool)
            fits = belong(a, b, a, b)
            asked = ~fits.all(dim=1)
            nats += [contrast(scale * x @ y.T, right, fits, known)[asked] for x, y in ((v, u), (u, v))]
        return torch.cat(nats).mean() / math.log(2)

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Any]:
        """Vectors of videos and texts, whose products say how well they fit.

        Returns:
            ``video`` and ``text`` ``(b w)`` float32; ``index`` ``(b)``; ``source``. All on the CPU, without rows that
            only fill up a batch.
        """
        batch = self.prepare(batch)
        video, text = self.embed(batch)
        index = torch.arange(batch.shape[0]) if batch.index is None else batch.index.cpu()
        kept = index >= 0
        source = batch.source or [""] * batch.shape[0]
        return {
            "video": video.cpu()[kept],
            "text": text.cpu()[kept],
            "index": index[kept],
            "source": [text for text, keep in zip(source, kept.tolist(), strict=True) if keep],
        }

    def describe(self) -> dict[str, Any]:
        """The model, for people and for JSON."""
        said = super().describe()
        size = sum(part.numel() for part in self.head.parameters())
        return said | {"head": {"name": f"pairs, {self.pairs.width} wide", "parameters": size}}


class PairHead(nn.Module):
    """``v = A h / |A h|`` of a video, ``u = B h / |B h|`` of a text, and the scale s of their products.

    A and B start normal with deviation ``1 / √d``, s at 1 / 0.07, never above 100.

    Args:
        d_model: width of the pooled states.
        width: of the vectors.
        vocab_size: of the backbone, for who asks the head.
    """

    tied = False

    def __init__(self, d_model: int, width: int, vocab_size: int) -> None:
        super().__init__()
        self.width, self.vocab_size = width, vocab_size
        self.video, self.text = (nn.Linear(d_model, width, bias=False) for _ in range(2))
        for part in (self.video, self.text):
            nn.init.normal_(part.weight, std=d_model**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.offset = nn.Parameter(torch.tensor(-5.0))
        for parameter in (self.log_scale, self.offset):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    @property
    def scale(self) -> Float[Tensor, ""]:
        """s."""
        return self.log_scale.clamp(max=_HOTTEST).exp()

    def forward(
        self, video: Float[Tensor, "b d"], text: Float[Tensor, "b d"]
    ) -> tuple[Float[Tensor, "b w"], Float[Tensor, "b w"]]:
        """Vectors of length 1, in the type of the states."""
        with torch.autocast(video.device.type, enabled=False):
            pairs = ((self.video, video), (self.text, text))
            made = [nn.functional.linear(h, part.weight.to(h.dtype)) for part, h in pairs]
            return nn.functional.normalize(made[0], dim=-1), nn.functional.normalize(made[1], dim=-1)


def numbers(batch: SequenceBatch) -> tuple[Int[Tensor, "b"], Int[Tensor, "b"]]:
    """The number of each row's video and of its text; -1, -1 where one of them is missing."""
    assert batch.targets is not None and batch.segment_ids is not None
    found = [torch.where(batch.segment_ids == part, batch.targets, -1).amax(dim=1) for part in (_VIDEO, _TEXT)]
    whole = (found[0] >= 0) & (found[1] >= 0)
    return torch.where(whole, found[0], -1), torch.where(whole, found[1], -1)


def gathered(x: Tensor, rank: int, ranks: int) -> Tensor:
    """``(b ...)`` of all ranks behind one another, by rank; gradients go back to whose it was."""
    return x if ranks == 1 else _Gathered.apply(x, rank, ranks)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int, ranks: int) -> Tensor:
        ctx.rank, ctx.rows = rank, len(x)
        parts = [torch.empty_like(x) for _ in range(ranks)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows], None, None
