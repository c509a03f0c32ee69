"""The picture of benchmarks/kernels.py: a line a row, every contender on it; time on the left, memory on the right."""

from __future__ import annotations

from matplotlib.figure import Figure

from seqlong.bench import Row, format_value

OURS, INK, MUTED = "#1767b3", "#14191f", "#5d6772"
PEERS = ["#c2410c", "#15803d", "#7c3aed", "#b45309", "#be185d", "#0f766e"]
#: What a panel shows, and its title; then where there are decoding steps alone.
PANELS = {"fwdbwd_ms": "forward and backward (ms)", "extra_mib": "memory beside inputs, outputs and gradients (MiB)"}
STEPS = {"graph_ms": "a step, replayed from a CUDA graph (ms)", "fwd_ms": "a step, as it is called (ms)"}


def short(peer: str) -> str:
    """A peer's name as far as the legend needs it; what was wrong with it stays."""
    name, mark, wrong = peer.partition(" (WRONG")
    return name.split(",")[0].split(" (")[0] + (" WRONG" if mark and wrong else "")


def draw(rows: list[Row], figure: Figure) -> None:
    """One panel a metric, one line an op and size; ours is the diamond, with its value and the best peer's ratio."""
    titles = PANELS if any(row.metric == "fwdbwd_ms" for row in rows) else STEPS
    panels = {metric: [row for row in rows if row.metric == metric] for metric in titles}
    names = list(dict.fromkeys(row.name for row in next(iter(panels.values()))))
    peers = list(dict.fromkeys(short(row.peer) for row in rows if row.peer and row.peer_value))
    colours = {peer: PEERS[place % len(PEERS)] for place, peer in enumerate(peers)}
    figure.set_size_inches(13, 1.6 + 0.42 * len(names))
    figure.set_facecolor("white")
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for (metric, found), axis in zip(panels.items(), axes, strict=True):
        for place, name in enumerate(names):
            group = [row for row in found if row.name == name]
            others = [(row.peer_value, short(row.peer)) for row in group if row.peer and row.peer_value]
            for value, peer in others:
                axis.plot(value, place, "o", color=colours[peer], markersize=6)
            if group:
                mine = group[0].value
                best = min((value for value, _ in others), default=None)
                against = "" if best is None else f" ({best / mine:.2g}x)"
                axis.plot([mine, *(value for value, _ in others)], [place] * (1 + len(others)), "-", color="#dfe3e7",
                          zorder=0)  # fmt: skip
                axis.plot(mine, place, "D", color=OURS, markersize=8)
                axis.annotate(f"{format_value(mine)}{against}", (mine, place), xytext=(0, 7), fontsize=8, color=INK,
                              textcoords="offset points", ha="center")  # fmt: skip
        axis.set_xscale("log")
        axis.set_title(f"{titles[metric]}; less is better", fontsize=10, loc="left", color=INK)
        axis.set_yticks(range(len(names)), names, fontsize=9, color=INK)
        axis.set_ylim(len(names) - 0.4, -0.8)
        axis.grid(axis="x", color="#e4e7ea", linewidth=0.7)
        axis.tick_params(length=0, labelcolor=MUTED, labelsize=8)
        axis.tick_params(axis="y", labelcolor=INK, labelsize=9)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    for label, colour in {"seqlong": OURS, **colours}.items():
        axes[0].plot([], [], "D" if label == "seqlong" else "o", color=colour, label=label)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle("Kernels: ours, and in brackets how many times the best other needs", fontsize=12,
                    fontweight="bold", x=0.01, ha="left", color=INK)  # fmt: skip
