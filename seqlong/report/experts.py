"""How evenly the experts of each block are used: a strip a router, and the worst router over the run."""

from __future__ import annotations

from seqlong.report import words
from seqlong.report.plots import line_chart
from seqlong.report.record import RunRecord, Series
from seqlong.report.text import Html, div, tag

#: A cell is darkest at this many times the mean load.
_DARKEST = 2.0


def experts_section(record: RunRecord) -> Html | None:
    """A strip a router, one cell an expert, as dark as its share of the choices; None where nothing has experts."""
    last = {(block, part): counts for _, block, part, counts in record.experts if sum(counts)}
    if not last:
        return None
    letters = {number: str(block.get("letter", "")) for number, block in enumerate(words.blocks(record), 1)}
    cells: list[object] = []
    for (block, part), counts in sorted(last.items(), key=lambda item: (item[0][0], item[0][1] == "ffn", item[0][1])):
        place = _place(block, part)
        said = [f"MaxVio {_last(record, place, 'max_violation'):.2f}", f"{_last(record, place, 'dead'):.0f} dead"]
        said.append(f"entropy {_last(record, place, 'entropy'):.2f}")
        if f"{place}/identity" in record.metrics:
            said.append(f"{100 * _last(record, place, 'identity'):.0f} % to experts that do nothing")
        name = " ".join(word for word in (str(block), letters.get(block, ""), part.replace("/", " ")) if word)
        cells += [
            tag("div", name, attributes={"class": "name"}),
            tag("div", strip(counts)),
            div("size", ", ".join(said)),
        ]
    step = max(entry[0] for entry in record.experts)
    note = (
        f"A strip a router, a cell an expert, over the steps up to {step:,}: the darker, the more of the choices fell "
        "on it; half dark is the mean. ffn: experts of the feed-forward. mixer: what the mixer's router chooses among, "
        "heads, experts of a head, memories or parts of a state. MaxVio: the largest load over the mean, minus 1. "
        "Dead: below a hundredth of the mean. Entropy: of the router's scores, 1 where it does not prefer any."
    )
    charts: list[object] = []
    both = len({part == "ffn" for _, part in last}) == 2
    for part, kind in (("mixer", "routers/"), ("feed-forward", "experts/")):
        name = f"Largest MaxVio of any {part if both else 'block'}"
        worst = line_chart(name, worst_violation(record, kind))
        charts += [tag("div", tag("h3", name), div("chart", worst))] if worst else []
    children = [tag("p", note, attributes={"class": "note"}), div("contigs", *cells), div("grid", *charts)]
    return tag("section", tag("h2", "Experts"), *children, attributes={"id": "experts"})


def strip(counts: list[int]) -> Html:
    """One cell an expert, as dark as its load."""
    mean = sum(counts) / len(counts)
    drawn = "".join(
        f'<rect class="s0" x="{place}" y="0" width="0.96" height="1" '
        f'fill-opacity="{min(count / mean / _DARKEST, 1):.3f}"><title>expert {place + 1}: '
        f"{count / mean:.2f} times the mean</title></rect>"
        for place, count in enumerate(counts)
    )
    return Html(
        f'<svg role="img" aria-label="load of {len(counts)} experts" viewBox="0 0 {len(counts)} 1" '
        f'preserveAspectRatio="none">{drawn}</svg>'
    )


def worst_violation(record: RunRecord, kind: str = "experts/") -> Series:
    """The largest MaxVio of any block at each step: of feed-forwards, or with ``routers/`` of mixers."""
    worst: dict[int, tuple[float, float]] = {}
    for name, series in record.metrics.items():
        if not (name.startswith(kind) and name.endswith("/max_violation")):
            continue
        for step, time, value in zip(series.step, series.time, series.value, strict=True):
            if step not in worst or value > worst[step][1]:
                worst[step] = (time, value)
    steps = sorted(worst)
    return Series(steps, [worst[step][0] for step in steps], [worst[step][1] for step in steps])


def _place(block: int, part: str) -> str:
    """What the names of a router's figures begin with."""
    return f"experts/{block}" if part == "ffn" else f"routers/{block}{part.removeprefix('mixer')}"


def _last(record: RunRecord, place: str, name: str) -> float:
    value = record.series(f"{place}/{name}").last
    return float("nan") if value is None else value
