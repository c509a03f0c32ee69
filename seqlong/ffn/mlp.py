"""Dense feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def _rounded(width: float, multiple: int) -> int:
    return multiple * max(1, round(width / multiple))


def _inner(name: str, d_model: int, d_hidden: int | None, expand: float) -> int:
    """Inner width: as given, or ``expand · d_model`` rounded to a multiple of 64."""
    if expand <= 0 or (d_hidden is not None and d_hidden < 1):
        raise ValueError(f"{name} needs a width above 0, found d_hidden={d_hidden}, expand={expand}")
    return _rounded(expand * d_model, 64) if d_hidden is None else d_hidden


class SwiGLU(nn.Module):
    """``W_down (silu(W_gate x) ⊙ W_up x)``. Source: arXiv 2002.05202.

    Args:
        d_model: width of the residual stream.
        d_hidden: inner width; ``expand · d_model`` rounded to a multiple of 64 if not given.
        expand: inner width over d_model. The default, 8/3, has as many parameters as a plain MLP of four times d_model.
    """

    residual_projections = ("down_proj",)

    def __init__(self, d_model: int, d_hidden: int | None = None, expand: float = 8 / 3) -> None:
        super().__init__()
        d_hidden = _inner("SwiGLU", d_model, d_hidden, expand)
        self.gate_up_proj = nn.Linear(d_model, 2 * d_hidden, bias=False)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class GeGLU(nn.Module):
    """``W_down (gelu(W_gate x) ⊙ W_up x)``, gelu in its tanh form, as in Gemma and Griffin. Source: arXiv 2002.05202.

    Args:
        d_model: width of the residual stream.
        d_hidden: inner width; ``expand · d_model`` rounded to a multiple of 64 if not given.
        expand: inner width over d_model.
        bias: whether all three projections have biases.
    """

    residual_projections = ("down_proj",)

    def __init__(self, d_model: int, d_hidden: int | None = None, expand: float = 8 / 3, bias: bool = False) -> None:
        super().__init__()
        d_hidden = _inner("GeGLU", d_model, d_hidden, expand)
        self.gate_up_proj = nn.Linear(d_model, 2 * d_hidden, bias=bias)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=bias)

    def forward(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


class GELU(nn.Module):
    """``W_down gelu(W_up x)``. Source: arXiv 1606.08415.

    Args:
        d_model: width of the residual stream.
        d_hidden: inner width; ``expand · d_model`` rounded to a multiple of 64 if not given.
        expand: inner width over d_model.
        bias: whether both projections have biases.
    """

    residual_projections = ("down_proj",)

    def __init__(self, d_model: int, d_hidden: int | None = None, expand: float = 4.0, bias: bool = False) -> None:
        super().__init__()
        d_hidden = _inner("GELU", d_model, d_hidden, expand)
        self.up_proj = nn.Linear(d_model, d_hidden, bias=bias)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=bias)

    def forward(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.down_proj(F.gelu(self.up_proj(hidden)))
