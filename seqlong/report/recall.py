"""What a recall task found: the picture, and a table of accuracy beside chance and the bytes of the state."""

from __future__ import annotations

import base64
import json
from typing import Any

from seqlong.report import text
from seqlong.report.record import RunRecord
from seqlong.report.text import Html, div, tag


def recall_section(record: RunRecord) -> Html | None:
    """Recall of the last evaluation; None where no recall task was evaluated."""
    path = record.folder / "recall.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, json.JSONDecodeError):
        record.problems.append("recall.json cannot be read")
        return None
    if not isinstance(found, dict) or not isinstance(found.get("accuracy"), list):
        return None
    generator = found.get("generator") if isinstance(found.get("generator"), dict) else {}
    assert isinstance(generator, dict)
    counted = str(generator.get("counted", "items"))
    chance = found.get("chance")
    part = "test" if found.get("part") == "test" else "validation"
    note = f"{str(found.get('task') or 'recall').capitalize()}, {part} rows"
    note += f", after step {found['step']:,}. " if found.get("step") else ". "
    note += "An answer is right if every token of it is. The intervals are Wilson's, 95 %."
    if isinstance(chance, float):
        note += f" Guessing gives {100 * chance:.2g} %."
    rows = [_row(line) for line in found["accuracy"] if isinstance(line, dict)]
    heads = ["Length", counted.capitalize(), "Answers", "Right", "95 % interval", "State of a row"]
    head = tag("thead", tag("tr", *[tag("th", name, attributes={"class": "n"}) for name in heads]))
    body = tag("tbody", *[tag("tr", *[tag("td", x, attributes={"class": "n"}) for x in row]) for row in rows])
    children: list[object] = [tag("p", note, attributes={"class": "note"})]
    image = record.folder / "recall.png"
    if image.is_file():
        data = base64.b64encode(image.read_bytes()).decode()
        drawn = (
            f'<img alt="accuracy by depth, distance and length" style="width:100%" src="data:image/png;base64,{data}">'
        )
        children.append(div("chart", Html(drawn)))
    children.append(div("scroll", tag("table", head, body)))
    return tag("section", tag("h2", "Recall"), *children, attributes={"id": "recall"})


def _row(line: dict[str, Any]) -> list[str]:
    state = line.get("state_bytes")
    return [
        f"{line.get('length', 0):,}", f"{line.get('items', 0):,}", f"{line.get('answers', 0):,}",
        f"{100 * line.get('accuracy', 0):.1f} %",
        f"{100 * line.get('low', 0):.1f} to {100 * line.get('high', 1):.1f} %",
        text.gibibytes(state / 2**30) if isinstance(state, int) and state >= 1 << 20
        else f"{state / 1024:,.1f} KiB" if isinstance(state, int) else "the whole row",
    ]  # fmt: skip
