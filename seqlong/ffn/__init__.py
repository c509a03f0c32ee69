"""Feed-forward layers: what moves information along the width."""

from collections.abc import Callable

from torch import nn

from seqlong.ffn.mlp import GELU, GeGLU, SwiGLU
from seqlong.ffn.moe import MoE

#: Builds a feed-forward layer for a width. In YAML: ``{class_path: seqlong.ffn.SwiGLU, init_args: {...}}``.
FeedForwardFactory = Callable[[int], nn.Module]

__all__ = ["GELU", "FeedForwardFactory", "GeGLU", "MoE", "SwiGLU"]
