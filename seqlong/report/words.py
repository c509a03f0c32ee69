"""What a run amounts to, in sentences: the model, what it was trained on, and how far it came against the floors."""

from __future__ import annotations

from typing import Any

from seqlong.report import text
from seqlong.report.plots import Floor
from seqlong.report.record import RunRecord, unix_seconds
from seqlong.report.text import Html, tag

STATUS = {
    "finished": "Finished",
    "failed": "Failed",
    "stopped": "Stopped early",
    "running": "Not finished",
    "unknown": "Status unknown",
}
_LEVEL = 0.0005  # bits; closer than this, two losses read the same at three decimals


def status(record: RunRecord) -> str:
    """One of the keys of ``STATUS``."""
    said = str(record.run.get("status", "unknown")).lower()
    return said if said in STATUS else "unknown"


def name(record: RunRecord) -> str:
    """The name of the run."""
    return str(record.run.get("name") or record.folder.resolve().name)


def model_phrase(record: RunRecord) -> str:
    """``a 2.1 million parameter hybrid of Mamba2 and attention``."""
    parameters = record.model.get("parameters")
    size = f"{text.words_count(parameters)} parameter " if isinstance(parameters, int) else ""
    kinds = list(dict.fromkeys(str(block.get("mixer", "?")) for block in blocks(record)))
    if not kinds:
        return f"a {size}model"
    counts = {kind: sum(block.get("mixer") == kind for block in blocks(record)) for kind in kinds}
    kinds.sort(key=lambda kind: -counts[kind])
    article = "an" if size.startswith(("8", "11 ", "11.", "18")) else "a"
    return f"{article} {size}hybrid of {text.listed(kinds)}" if len(kinds) > 1 else f"{article} {size}{kinds[0]} model"


def blocks(record: RunRecord) -> list[dict[str, Any]]:
    """The blocks of model.json, in order."""
    given = record.model.get("blocks")
    return [block for block in given if isinstance(block, dict)] if isinstance(given, list) else []


def unit(record: RunRecord) -> str:
    """What bits are counted by: ``base``, unless data.json says otherwise."""
    said = record.data.get("unit")
    if isinstance(said, str):
        return said
    return "token" if "generator" in record.data else "base"


def lead(record: RunRecord) -> str:
    """One sentence: what was trained, on what, for how long."""
    what = model_phrase(record)
    title = str(record.data.get("title") or "").partition(": ")[0].strip()  # what follows the colon are its sizes
    on = f" trained on {title}" if title else ", trained on data that this run did not record"
    steps = record.steps
    if not len(record.series("train/bits")) and not len(record.series("train/loss")):
        evaluated = record.series("test/bits").last is not None or record.series("val/bits").last is not None
        if evaluated:
            return f"{what[0].upper()}{what[1:]}, evaluated on {title or 'data that this run did not record'}."
        ended = "The run ended before its first step was logged."
        if not record.model and not title:
            return ended
        return f"{what[0].upper()}{what[1:]}{f' on {title}' if title else ''}. {ended}"
    tokens = record.series("train/tokens").last
    seen = f" ({text.words_count(tokens)} {unit(record)}s)" if tokens else ""
    return f"{what[0].upper()}{what[1:]}{on} for {text.plural(steps, 'step')}{seen}."


def floors(record: RunRecord) -> list[Floor]:
    """The lines to beat: the uniform one, the lowest Markov one, and any others by name."""
    lowest = min((floor for floor in record.floors if _order(floor) is not None), key=lambda f: f["bits"], default=None)
    shown = [floor for floor in record.floors if _order(floor) is None or floor is lowest]
    return [Floor(floor_label(floor), float(floor["bits"])) for floor in shown]


def floor_label(floor: dict[str, Any]) -> str:
    """``uniform``, ``Markov, order 6``, or the floor's own name."""
    order = _order(floor)
    return f"Markov, order {order}" if order is not None else str(floor.get("name", "floor"))


def _order(floor: dict[str, Any]) -> int | None:
    order, label = floor.get("order"), str(floor.get("name", ""))
    if order is None and label.startswith("markov-") and label[7:].isdigit():
        return int(label[7:])
    return int(order) if isinstance(order, int | float) and label.startswith("markov") else None


def verdict(record: RunRecord) -> Html | None:
    """The best loss as a large figure, and beside it the distance to each floor in words; None without a loss."""
    best = record.series("val/bits").best()
    measured = "validation"
    if best is None:
        best, measured = record.series("test/bits").best(), "test"
    if best is None:
        return None
    step, value = best
    items = [tag("li", distance(value, floor, unit(record))) for floor in floors(record)]
    if not items:
        items = [tag("li", "No floors were saved, so there is nothing to hold this figure against.")]
    if passed := order_passed(record, value):
        items.append(tag("li", passed))
    test = record.series("test/bits").last
    if measured == "validation" and test is not None:
        items.append(tag("li", "On the test set: ", tag("b", text.bits(test)), f" bits per {unit(record)}."))
    per_byte, perplexity = record.series("val/bits_per_byte").best(), record.series("val/word_perplexity").best()
    if per_byte is not None and unit(record) != "byte":
        items.append(tag("li", "That is ", tag("b", text.bits(per_byte[1])), " bits per byte."))
    if perplexity is not None and perplexity[1] < 1e6:
        items.append(tag("li", f"Best word perplexity: {perplexity[1]:,.1f}."))
    accuracy = record.series("val/accuracy").last
    if accuracy is not None:
        items.append(tag("li", f"Validation accuracy at the end: {100 * accuracy:.1f} %."))
    figure = text.div(
        "",
        text.div("figure", text.bits(value)),
        text.div("unit", f"bits per {unit(record)}, best {measured}", f", at step {step:,}" if step else ""),
    )
    return text.div("verdict", figure, tag("ul", *items))


def order_passed(record: RunRecord, value: float) -> str:
    """Which of the Markov models ``value`` is below, if it is not below the best; empty when that is not known."""
    best = min((floor for floor in record.floors if _order(floor) is not None), key=lambda f: f["bits"], default=None)
    by_order = best.get("by_order") if best else None
    if best is None or value < best["bits"] or not isinstance(by_order, list):
        return ""
    passed = [order for order, bits in enumerate(by_order) if isinstance(bits, float) and bits > value]
    if not passed:
        return ""
    return f"Among Markov models it has passed order {max(passed)} ({text.bits(by_order[max(passed)])})."


def distance(value: float, floor: Floor, unit: str = "base") -> Html:
    """How ``value`` stands to a floor, and what that means."""
    gap = floor.bits - value
    markov = floor.label.startswith("Markov")
    subject = f"the {floor.label.replace('Markov, order ', 'order-')}{' Markov model' if markov else ' floor'}"
    where = f" {subject} ({text.bits(floor.bits)})"
    if abs(gap) < _LEVEL:
        meaning = ": no better than counting short words." if markov else "."
        meaning = ": nothing learnt yet." if _uniform(floor) else meaning
        return Html(tag("b", "Level") + " with" + text.escape(where + meaning))
    amount, side = (f"{abs(gap):.3f} below", "better") if gap > 0 else (f"{abs(gap):.3f} above", "worse")
    if markov:
        meaning = ": more than short words explain." if gap > 0 else ": counting short words does better so far."
    elif _uniform(floor):
        meaning = f", where every {unit} is a guess." if gap > 0 else f": worse than guessing every {unit}."
    else:
        meaning = "."
    return Html(text.span(side, amount) + text.escape(where + meaning))


def _uniform(floor: Floor) -> bool:
    return floor.label == "uniform"


def elapsed(record: RunRecord) -> float | None:
    """Seconds from the start of the run to its end, or to its last sign of life."""
    started, ended = unix_seconds(record.run.get("started")), unix_seconds(record.run.get("ended"))
    span = record.span
    if started is None:
        return span[1] - span[0] if span else None
    last = ended if ended is not None else span[1] if span else None
    return None if last is None else last - started


def stages(record: RunRecord) -> list[tuple[int, int]]:
    """``(first step, length)`` of each stretch of equal ``train/length``."""
    series = record.series("train/length")
    changes: list[tuple[int, int]] = []
    for step, value in zip(series.step, series.value, strict=True):
        if value == value and (not changes or changes[-1][1] != int(value)):
            changes.append((step, int(value)))
    return changes
