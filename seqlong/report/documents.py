"""Documents that a run was trained on: sources and split of text as tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from seqlong.report.text import Html, tag

Table = Callable[[list[str], list[list[object]], set[int]], Html]


def are_documents(sources: list[dict[str, Any]]) -> bool:
    """Whether sources are of text."""
    return bool(sources) and all("documents" in source for source in sources)


def source_table(sources: list[dict[str, Any]], table: Table) -> Html:
    """Each source: documents, bytes, tokens, words."""
    heads = ["Source", "Documents", "Bytes", "Tokens", "Words", "Digest"]
    rows: list[list[object]] = [
        [
            tag("code", Path(str(source.get("path", ""))).name, attributes={"title": source.get("path")}),
            *(_number(source.get(key)) for key in ("documents", "bytes", "tokens", "words")),
            tag("code", str(source.get("digest", ""))[:23], attributes={"title": source.get("digest")}),
        ]
        for source in sources
    ]
    return table(heads, rows, {1, 2, 3, 4})


def split_tables(split: Any, table: Table) -> list[Html]:
    """The split of each source; empty when it is not one of text."""
    if not isinstance(split, dict):
        return []
    if "summary" not in split:
        found: list[Html] = []
        for name, one in split.items():
            inside = split_tables(one, table)
            found += [tag("h3", str(name)), *inside] if inside else []
        return found
    rows: list[list[object]] = []
    for part in split["summary"]:
        if not isinstance(part, dict) or "documents" not in part:
            return []
        first = [str(name) for name in part.get("first", [])]
        more = int(part["documents"]) - len(first)
        shown = ", ".join(first) + (f" and {more:,} more" if more > 0 else "")
        rows.append([part.get("split"), *(_number(part.get(key)) for key in ("documents", "bytes", "words")), shown])
    said = ", ".join(
        f"{key} {value}" for key, value in split.items() if key not in ("summary", "kind") and value is not None
    )
    how = f"Split {split.get('kind', '')}{': ' if said else ''}{said}."
    return [
        table(["Split", "Documents", "Bytes", "Words", ""], rows, {1, 2, 3}),
        tag("p", how, attributes={"class": "note"}),
    ]


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""
