"""What a matching task found: how often a video's text, and a text's video, is among the first, beside chance."""

from __future__ import annotations

from seqlong.report.plots import line_chart
from seqlong.report.record import RunRecord
from seqlong.report.text import Html, div, span, tag

_WAYS = (("video_to_text", "texts of a video"), ("text_to_video", "videos of a text"))
_AT = (1, 5, 10)


def retrieval_section(record: RunRecord) -> Html | None:
    """Recall at 1, 5 and 10 both ways, of the last evaluation and over the run; None where nothing was matched."""
    rows, charts = [], []
    for part, name in (("val", "validation"), ("test", "test")):
        for way, words in _WAYS:
            found = [record.series(f"{part}/{way}/r{at}").last for at in _AT]
            if any(value is None for value in found):
                continue
            guessed = [record.series(f"{part}/{way}/chance_r{at}").last for at in _AT]
            rows.append([f"{words}, {name}", *(_share(value) for value in found)])
            rows.append(["by chance", *(_share(value) for value in guessed)])
            chart = line_chart(words, record.series(f"{part}/{way}/r1"), scale=100.0) if part == "val" else None
            if chart is not None:
                note = span("note", f"  recall at 1, %; by chance {_share(guessed[0])}")
                charts.append(tag("div", tag("h3", words.capitalize(), note), div("chart", chart)))
    if not rows:
        return None
    heads = ["Among the first", *map(str, _AT)]
    head = tag("thead", _row("th", heads))
    body = tag("tbody", *[_row("td", row) for row in rows])
    about = "How often a partner is among the first of all that were evaluated; what scores as high stands before it."
    return tag(
        "section", tag("h2", "Retrieval"), tag("p", about, attributes={"class": "note"}), div("grid", *charts),
        div("scroll", tag("table", head, body)), attributes={"id": "retrieval"},
    )  # fmt: skip


def _row(kind: str, cells: list[str]) -> Html:
    return tag("tr", *[tag(kind, cell, attributes={"class": "n"} if n else {}) for n, cell in enumerate(cells)])


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
