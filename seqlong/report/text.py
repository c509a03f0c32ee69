"""Numbers and words for people: counts, sizes, durations, and HTML that is escaped unless it says otherwise."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from datetime import UTC, datetime


class Html(str):
    """Text that is already HTML. Everything else is escaped on its way into a page."""

    __slots__ = ()


def escape(content: object) -> Html:
    """``content`` as HTML text; ``Html`` passes unchanged, None is empty."""
    if isinstance(content, Html):
        return content
    return Html("" if content is None else html.escape(str(content), quote=True))


def tag(name: str, *children: object, attributes: Mapping[str, object] | None = None) -> Html:
    """``<name ...>children</name>``, children and attribute values escaped."""
    given = "".join(f' {key}="{escape(value)}"' for key, value in (attributes or {}).items() if value is not None)
    return Html(f"<{name}{given}>{''.join(escape(child) for child in children)}</{name}>")


def div(class_: str, *children: object) -> Html:
    """A ``div`` of a class."""
    return tag("div", *children, attributes={"class": class_})


def span(class_: str, *children: object) -> Html:
    """A ``span`` of a class."""
    return tag("span", *children, attributes={"class": class_})


def count(number: float | int) -> str:
    """``1234567`` as ``1.23 M``; below 10,000 in full with thousands separated."""
    if not math.isfinite(number):
        return str(number)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= limit * 0.99995:
            scale = 1e3 if unit == "k" else limit
            return f"{_three_digits(number / scale)} {unit}"
    return f"{number:,.0f}" if number == int(number) or abs(number) >= 100 else f"{number:.3g}"


def words_count(number: float | int) -> str:
    """``1234567`` as ``1.23 million``, for sentences."""
    for limit, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(number) >= limit * 0.99995:
            return f"{_three_digits(number / limit)} {word}"
    return f"{number:,.0f}"


def _three_digits(value: float | int) -> str:
    places = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def exact(number: int) -> str:
    """``4641652`` as ``4,641,652``."""
    return f"{number:,}"


def bits(value: float | int) -> str:
    """Bits per base with three decimals, as the field prints them."""
    return f"{value:.3f}"


def duration(seconds: float | int) -> str:
    """``754`` as ``12 min 34 s``."""
    if seconds < 0 or not math.isfinite(seconds):
        return "unknown"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def gibibytes(value: float | int) -> str:
    """GiB as ``3.1 GiB``, or MiB below a tenth."""
    return f"{value * 1024:.0f} MiB" if value < 0.1 else f"{value:.2f} GiB" if value < 10 else f"{value:.1f} GiB"


def moment(unix_seconds: float | int) -> str:
    """``22 November 2026, 13:21 UTC``."""
    when = datetime.fromtimestamp(unix_seconds, UTC)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def plural(number: int, word: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def listed(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
