"""write_report: a run folder becomes one HTML file that needs nothing beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from seqlong.report import sections, text, words
from seqlong.report.experts import experts_section
from seqlong.report.losses import losses_section
from seqlong.report.recall import recall_section
from seqlong.report.record import RunRecord, read_run, unix_seconds
from seqlong.report.retrieval import retrieval_section
from seqlong.report.style import STYLE
from seqlong.report.text import Html, div, tag


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder: loss against the floors, training, model, data, and how it was made.

    It reads only text files, so that it works after a crash, on another machine and while the run goes on. The file is
    replaced as a whole.

    Args:
        run_dir: the folder of a run.

    Returns:
        The path of the report.

    Raises:
        SeqlongError: the folder does not exist or is not a run.
    """
    record = read_run(Path(run_dir))
    path = record.folder / "report.html"
    draft = record.folder / f".report.{os.getpid()}.tmp"
    draft.write_text(render(record), encoding="utf-8")
    os.replace(draft, path)
    return path


def render(record: RunRecord) -> str:
    """The report of ``record`` as one HTML document."""
    body = tag(
        "main",
        _head(record),
        sections.loss_section(record),
        recall_section(record),
        retrieval_section(record),
        losses_section(record),
        sections.training_section(record),
        sections.model_section(record),
        experts_section(record),
        sections.data_section(record),
        sections.making_section(record),
        tag("footer", _footer(record)),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"{tag('title', f'{words.name(record)} · seqlong')}\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _head(record: RunRecord) -> Html:
    status = words.status(record)
    started = unix_seconds(record.run.get("started"))
    eyebrow = [text.span(f"status {status}", words.STATUS[status])]
    if started is not None:
        eyebrow.append(tag("span", text.moment(started)))
    task = record.model.get("task") or _setting(record, "model", "class_path")
    if task:
        eyebrow.append(tag("span", str(task).rsplit(".", 1)[-1]))
    return tag(
        "header",
        div("eyebrow", *eyebrow),
        tag("h1", words.name(record)),
        tag("p", words.lead(record), attributes={"class": "lead"}),
        _trouble(record, status),
        words.verdict(record),
        _facts(record),
    )


def _trouble(record: RunRecord, status: str) -> Html | None:
    """Why the run did not finish, as far as it could say."""
    error = record.run.get("error")
    at = f" at step {record.steps:,}" if record.steps else " before the first logged step"
    if status == "failed":
        said = tag("pre", error) if error else tag("p", "It left no message.")
        return div("error", tag("h3", f"The run failed{at}"), said)
    if status == "stopped":
        onward = tag("p", "It can go on from its last checkpoint: ", tag("code", "--ckpt_path last"))
        said = tag("pre", error) if error else onward
        return div("error stopped", tag("h3", f"The run was stopped{at}"), said)
    if status == "running" and record.span:
        last = text.moment(record.span[1])
        return div("error stopped", tag("h3", f"The run had not finished when this was written; last entry {last}"))
    return None


def _facts(record: RunRecord) -> Html | None:
    facts: list[tuple[str, str, str]] = []
    planned = _setting(record, "trainer", "max_steps")
    if record.steps:
        goal = f"of {planned:,} planned" if isinstance(planned, int) and planned > 0 and planned != record.steps else ""
        facts.append(("Steps", f"{record.steps:,}", goal))
    tokens = record.series("train/tokens").last
    if tokens:
        training = sum(stop - start for part, _, start, stop in sections.split_intervals(record.data.get("split"))
                       if part.lower().startswith("train"))  # fmt: skip
        facts.append(
            (
                f"{words.unit(record).capitalize()}s seen",
                text.count(tokens),
                f"{tokens / training:.2g} training passes" if training else "",
            )
        )
    lengths = words.stages(record)
    if lengths:
        small = f"grown from {lengths[0][1]:,}" if len(lengths) > 1 else ""
        facts.append(("Window length", f"{lengths[-1][1]:,}", small))
    seconds = words.elapsed(record)
    if seconds is not None:
        legs = record.run.get("history")
        sittings = f"in {len(legs) + 1} sittings, pauses counted" if isinstance(legs, list) and legs else ""
        facts.append(("Time", text.duration(seconds), sittings))
    speed = record.series("throughput/tokens_per_s")
    finite = sorted(value for value in speed.value if value == value)
    if finite:
        facts.append(("Throughput", f"{text.count(finite[len(finite) // 2])}/s", f"{words.unit(record)}s, median"))
    peak = max((value for value in record.series("memory/peak_gib").value if value == value), default=None)
    if peak is not None:
        facts.append(("Peak memory", text.gibibytes(peak), ""))
    if not facts:
        return None
    return div(
        "facts",
        *[
            tag("div", div("label", label), div("value", value), div("small", small) if small else "")
            for label, value, small in facts
        ],
    )


def _setting(record: RunRecord, *keys: str) -> Any:
    """A value of the saved configuration; None where it is missing or the file is broken."""
    try:
        node: Any = yaml.safe_load(record.config) if record.config else None
    except yaml.YAMLError:
        return None
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _footer(record: RunRecord) -> str:
    version = record.run.get("versions", {}).get("seqlong") if isinstance(record.run.get("versions"), dict) else None
    return f"Written by seqlong{f' {version}' if version else ''} from the files in this folder. It needs no network."
