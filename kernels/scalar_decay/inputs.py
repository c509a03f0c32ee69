"""What the ops of this folder accept, said before anything is read: a kernel would read beyond a tensor in silence."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from seqlong.kernels.inputs import four_axes, heads_of_groups, needed, one_type, shaped, token_marks


def check(
    op: str,
    q: tuple[str, Tensor],
    k: tuple[str, Tensor],
    v: tuple[str, Tensor],
    gate: tuple[str, Tensor],
    *,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
    per_head: Mapping[str, Tensor | None] | None = None,
) -> None:
    """Raise a ValueError that names the argument, what was expected and what was found.

    Args:
        op: the op's name, for the message.
        q: its name and value ``(b t g k)``.
        k: as q.
        v: its name and value ``(b t h v)``.
        gate: its name and value ``(b t h)``, or ``(h)``.
        starts: ``(b t)`` bool.
        initial_state: ``(b h k v)``.
        per_head: more arguments ``(h)``.
    """
    needed(op, dict((q, k, v, gate)))
    four_axes(op, dict((q, k, v)))
    (rows, length, groups, width), (heads, value_width) = q[1].shape, v[1].shape[2:]
    heads_of_groups(op, heads, groups)
    one_type(op, q, k)
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        k[0]: (k[1], (rows, length, groups, width)),
        v[0]: (v[1], (rows, length, heads, value_width)),
        gate[0]: (gate[1], (heads,) if gate[1].dim() == 1 else (rows, length, heads)),
        **{name: (x, (heads,)) for name, x in (per_head or {}).items()},
        "initial_state": (initial_state, (rows, heads, width, value_width)),
    }
    shaped(op, expected)
    token_marks(op, {"starts": starts}, (rows, length), dict((q,)))
