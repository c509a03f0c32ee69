"""The parts of the page below its head: curves, model, data and the record of how the run was made."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqlong.report import documents, text, words
from seqlong.report.plots import line_chart, loss_chart
from seqlong.report.record import RunRecord, unix_seconds
from seqlong.report.text import Html, div, tag

_PALETTE = 8
_CONTIGS_SHOWN = 24
_BINS = 800  # of a contig's bar; finer intervals merge into what fills most of the bin
_PARTS = {"train": 0, "training": 0, "val": 1, "validation": 1, "test": 2, "predict": 3}


def section(identity: str, heading: str, note: str, *children: object) -> Html:
    """A titled part of the page."""
    intro = tag("p", note, attributes={"class": "note"}) if note else ""
    return tag("section", tag("h2", heading), intro, *children, attributes={"id": identity})


def loss_section(record: RunRecord) -> Html:
    """The loss curve with its floors."""
    train = record.series("train/bits")
    lengths = words.stages(record)
    unit = words.unit(record)
    bits = (record.series("val/bits"), record.series("test/bits"))
    chart = loss_chart(train, *bits, words.floors(record), lengths, unit)
    if chart is None:
        return section("loss", "Loss", "No loss was logged: the run ended before its first logged step.")
    note = f"Bits per {unit}, lower is better. "
    if len(train) > 30:
        note += "Faint: each logged training step; line: its running mean; the first steps may lie above the frame. "
    if len(record.series("val/bits")):
        note += "Dots: validation, the best ringed. "
    if words.floors(record):
        pressed = any(floor.label in ("bz2", "xz") for floor in words.floors(record))
        text_floors = "counting pairs of bytes, and what compressors make of the text"
        sequence_floors = "models that know only the composition or short words of the same sequence"
        note += f"Dashed: the floors, {text_floors if pressed else sequence_floors}. "
    if len(lengths) > 1:
        note += "Dotted: where the windows grow; the figure above is their length in positions."
    return section("loss", "Loss", note.strip(), div("chart", chart))


def training_section(record: RunRecord) -> Html | None:
    """Learning rate, gradient norm with skipped steps, throughput, memory, length; None when none was logged."""
    skipped = record.series("skipped_steps")
    total = int(skipped.last or 0)
    marks = [step for i, step in enumerate(skipped.step) if skipped.value[i] > (skipped.value[i - 1] if i else 0.0)]
    norm_note = "no step was skipped"
    if total:
        norm_note = f"{text.plural(total, 'step')} skipped for a non-finite gradient (red)"
    panels: list[tuple[str, str, Html | None]] = [
        ("Learning rate", "", line_chart("Learning rate", record.series("lr"))),
        (
            "Gradient norm",
            norm_note if len(skipped) or total else "",
            line_chart("Gradient norm", record.series("grad_norm"), smooth=True, log=True, marks=marks),
        ),
        (
            "Throughput",
            f"{words.unit(record)}s per second",
            line_chart("Throughput", record.series("throughput/tokens_per_s"), smooth=True),
        ),
        ("Peak memory", "GiB", line_chart("Peak memory", record.series("memory/peak_gib"))),
    ]
    if len(words.stages(record)) > 1:
        chart = line_chart("Window length", record.series("train/length"), steps_like=True)
        panels.append(("Window length", "positions", chart))
    drawn = [
        tag("div", tag("h3", title, text.span("note", f"  {note}") if note else ""), div("chart", chart))
        for title, note, chart in panels
        if chart is not None
    ]
    return section("training", "Training", "", div("grid", *drawn)) if drawn else None


def model_section(record: RunRecord) -> Html | None:
    """The model as a strip of blocks, and a table of what they cost; None when model.json is missing."""
    blocks = words.blocks(record)
    if not record.model:
        return None
    letters = list(dict.fromkeys(str(block.get("letter", "?")) for block in blocks))
    colour = {letter: i % _PALETTE for i, letter in enumerate(letters)}
    cells = [div("end", "embed")] if blocks else []
    for number, block in enumerate(blocks, 1):
        letter = str(block.get("letter", "?"))
        cost = block.get("parameters")
        hint = f"block {number}: {block.get('mixer')}, {block.get('ffn') or 'no ffn'}"
        hint += f", {text.count(cost)} parameters" if isinstance(cost, int) else ""
        cells.append(tag("div", letter, attributes={"class": f"cell k{colour[letter]}", "title": hint}))
    cells += [div("end", _head_name(record.model.get("head")))] if blocks else []
    total = record.model.get("parameters")
    rows: list[list[object]] = []
    kinds: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
    for block in blocks:
        kind = (str(block.get("letter", "?")), str(block.get("mixer", "?")), str(block.get("ffn") or "none"))
        kinds[kind].append(int(block.get("parameters") or 0))
    counted = 0
    for (letter, mixer, ffn), costs in kinds.items():
        counted += sum(costs)
        swatch = tag("span", attributes={"class": f"swatch k{colour[letter]}"})
        each = text.count(costs[0]) if len(set(costs)) == 1 else f"{text.count(min(costs))} to {text.count(max(costs))}"
        together = [text.count(sum(costs)), _share(sum(costs), total)]
        rows.append([Html(swatch + tag("code", letter)), mixer, ffn, len(costs), each, *together])
    if isinstance(total, int) and total > counted:
        rest = total - counted
        rows.append(["", "Embedding, final norm, head", "", "", "", text.count(rest), _share(rest, total)])
    table = _table(["", "Mixer", "Ffn", "Blocks", "Parameters each", "Together", "Share"], rows, numeric={3, 4, 5, 6})
    facts = []
    if isinstance(total, int):
        active = record.model.get("parameters_active")
        facts.append(f"{text.exact(total)} parameters")
        if isinstance(active, int) and active != total:
            facts.append(f"{text.exact(active)} active for a position")
    for key, label in (("d_model", "wide"), ("vocab_size", "symbols in the vocabulary")):
        if isinstance(record.model.get(key), int):
            facts.append(f"{record.model[key]:,} {label}")
    if blocks:
        facts.append(text.plural(len(blocks), "block"))
    note = f"{record.model.get('name', 'Model')}: " + ", ".join(facts) + "." if facts else ""
    return section("model", "Model", note, div("strip", *cells) if cells else "", div("scroll", table) if rows else "")


def _head_name(head: Any) -> str:
    if isinstance(head, dict):
        head = head.get("name") or head.get("type")
    return f"head: {head}" if isinstance(head, str) and head and len(head) < 24 else "head"


def _share(part: Any, total: Any) -> str:
    if not isinstance(part, int) or not isinstance(total, int) or not total:
        return ""
    return f"{100 * part / total:.1f} %" if part else "none"


def data_section(record: RunRecord) -> Html | None:
    """Sources with their digests, and the split as a table and as bars along the contigs; None without data.json."""
    if not record.data:
        return None
    children: list[object] = []
    sources = _records(record.data.get("sources"))
    if documents.are_documents(sources):
        children.append(div("scroll", documents.source_table(sources, _table)))
    elif sources:
        heads = ["Source", "Contigs", "Bases", "Unknown", "Soft-masked", "Digest"]
        rows = [
            [
                tag("code", Path(str(source.get("path", ""))).name, attributes={"title": source.get("path")}),
                _number(source.get("contigs")),
                _number(source.get("bases")),
                _share(source.get("unknown"), source.get("bases")),
                _share(source.get("soft_masked"), source.get("bases")),
                tag("code", str(source.get("digest", ""))[:23], attributes={"title": source.get("digest")}),
            ]
            for source in sources
        ]
        children.append(div("scroll", _table(heads, rows, numeric={1, 2, 3, 4})))
    intervals = split_intervals(record.data.get("split"))
    if intervals:
        children.append(_split_table(intervals))
        children.append(tag("p", _split_how(record.data["split"]), attributes={"class": "note"}))
        children.append(_contig_bars(intervals, _contig_lengths(record.data)))
    elif tables := documents.split_tables(record.data.get("split"), _table):
        children += tables
    elif record.data.get("split"):
        children.append(_folded("Split", json.dumps(record.data["split"], indent=2, ensure_ascii=False)))
    stages = _records(record.data.get("stages"))
    if stages:
        keys = list(dict.fromkeys(key for stage in stages for key in stage))
        rows = [["to the end" if stage.get(key) is None else _number(stage[key]) for key in keys] for stage in stages]
        heads = [key.replace("_", " ").capitalize() for key in keys]
        children.append(_table(heads, rows, numeric=set(range(1, len(keys)))))
    notes = record.data.get("notes")
    for note in notes if isinstance(notes, list) else []:
        children.append(tag("p", note, attributes={"class": "note"}))
    title = "" if sources else str(record.data.get("title") or "")  # which repeats what the table says
    return section("data", "What it was trained on", title, *children)


def split_intervals(split: Any) -> list[tuple[str, str, int, int]]:
    """``(part, contig, start, stop)`` of a split in any of the shapes that data.json may hold it in.

    ``{"train": [[contig, start, stop] | {...}, ...], ...}`` or a list of records with contig, start, stop (or end)
    and split (or part), either of them also under the key ``regions`` or ``intervals``. Empty when it is something
    else, such as file names.
    """
    for key in ("regions", "intervals"):
        if isinstance(split, dict) and isinstance(split.get(key), list | dict):
            split = split[key]
    entries: list[tuple[Any, Any]] = []
    if isinstance(split, dict):
        entries = [(part, one) for part, many in split.items() if isinstance(many, list) for one in many]
    elif isinstance(split, list):
        entries = [(None, one) for one in split]
    found = []
    for part, one in entries:
        if isinstance(one, dict):
            label = part or one.get("split") or one.get("part")
            values = [one.get("contig"), one.get("start"), one.get("stop", one.get("end"))]
        elif isinstance(one, list) and len(one) >= 3:
            label, values = (part, one[:3]) if part else (one[3] if len(one) > 3 else None, one[:3])
        else:
            return []
        contig, start, stop = values
        if label is None or contig is None or not isinstance(start, int) or not isinstance(stop, int):
            return []
        found.append((str(label), str(contig), start, stop))
    return found


def _split_how(split: Any) -> str:
    """The settings that made a split, as a sentence; empty when data.json does not say."""
    if not isinstance(split, dict) or "kind" not in split:
        return ""
    said = []
    for key, value in split.items():
        if isinstance(value, list) and 0 < len(value) <= 8 and all(isinstance(one, str) for one in value):
            value = ", ".join(value)
        if key != "kind" and isinstance(value, str | int | float):
            said.append(f"{key.replace('_', ' ')} {_number(value)}")
    return f"Split {split['kind']}{': ' if said else ''}{'; '.join(said)}."


def _split_table(intervals: list[tuple[str, str, int, int]]) -> Html:
    bases: Counter[str] = Counter()
    pieces: Counter[str] = Counter()
    for part, _, start, stop in intervals:
        bases[part] += stop - start
        pieces[part] += 1
    whole = sum(bases.values())
    rows = [
        [
            Html(tag("span", attributes={"class": f"swatch s{_part_colour(part, list(bases))}"}) + text.escape(part)),
            _number(pieces[part]),
            _number(bases[part]),
            _share(bases[part], whole),
        ]
        for part in bases
    ]
    return _table(["Split", "Intervals", "Bases", "Share"], rows, numeric={1, 2, 3})


def _part_colour(part: str, parts: list[str]) -> int:
    return _PARTS.get(part.lower(), 3 + parts.index(part) % 2)


def _contig_lengths(data: dict[str, Any]) -> dict[str, int]:
    """Lengths where data.json names them; a bar otherwise ends with its last interval."""
    lengths: dict[str, int] = {}
    sources = _records(data.get("sources"))
    named = [source.get("records", source.get("contigs")) for source in sources]
    for many in [data.get("contigs"), *named]:
        if isinstance(many, dict):
            lengths.update({str(name): size for name, size in many.items() if isinstance(size, int)})
        elif isinstance(many, list):
            for one in many:
                if isinstance(one, dict) and isinstance(one.get("length"), int):
                    lengths[str(one.get("name", one.get("contig")))] = one["length"]
    if not lengths and len(sources) == 1 and sources[0].get("contigs") == 1:
        lengths[""] = int(sources[0].get("bases") or 0)  # a single contig of unknown name
    return lengths


def _contig_bars(intervals: list[tuple[str, str, int, int]], lengths: dict[str, int]) -> Html:
    by_contig: defaultdict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for part, contig, start, stop in intervals:
        end = lengths.get(contig, stop)
        by_contig[contig].append((part, start, min(stop, end)))
        if stop > end:  # a circular contig, past its origin
            by_contig[contig].append((part, 0, stop - end))
    only = lengths.get("", 0) if len(by_contig) == 1 else 0
    sizes = {
        contig: max(lengths.get(contig, only), *(stop for _, _, stop in given), 1)
        for contig, given in by_contig.items()
    }
    largest = set(sorted(sizes, key=lambda contig: -sizes[contig])[:_CONTIGS_SHOWN])
    shown = [contig for contig in by_contig if contig in largest]  # in the order of the file
    longest = max(sizes.values())
    parts = list(dict.fromkeys(part for part, *_ in intervals))
    cells: list[object] = []
    for contig in shown:
        width = max(100 * sizes[contig] / longest, 0.5)
        drawing = "".join(
            f'<rect class="s{_part_colour(part, parts)}" x="{start}" y="0" width="{stop - start:g}" height="1">'
            f"<title>{text.escape(part)}</title></rect>"
            for part, start, stop in _binned(by_contig[contig], sizes[contig])
        )
        bar = Html(
            f'<svg role="img" aria-label="split of {text.escape(contig)}" viewBox="0 0 {_BINS} 1" '
            f'preserveAspectRatio="none" style="width:{width:.2f}%">{drawing}</svg>'
        )
        cells += [
            tag("div", contig, attributes={"class": "name", "title": contig}),
            tag("div", bar),
            div("size", f"{text.count(sizes[contig])}b"),
        ]
    legend = [
        tag("span", tag("span", attributes={"class": f"swatch s{_part_colour(part, parts)}"}), part) for part in parts
    ] + [tag("span", tag("span", attributes={"class": "swatch", "style": "background:var(--grid)"}), "gap, not used")]
    hidden = len(by_contig) - len(shown)
    more = tag("p", f"And {text.plural(hidden, 'shorter contig')}.", attributes={"class": "note"}) if hidden else ""
    return Html(div("contigs", *cells) + div("legend", *legend) + text.escape(more))


def _binned(given: list[tuple[str, int, int]], size: int) -> list[tuple[str, float | int, float | int]]:
    """``(part, first, last)`` in bins of the bar. Few intervals keep their exact ends; many are merged bin by bin."""
    if len(given) <= _BINS // 2:
        return [(part, round(_BINS * start / size, 2), round(_BINS * stop / size, 2)) for part, start, stop in given]
    cover: list[Counter[str]] = [Counter() for _ in range(_BINS)]
    for part, start, stop in given:
        first, last = start * _BINS // size, min(max(stop - 1, start) * _BINS // size, _BINS - 1)
        for slot in range(first, last + 1):
            inside = min(stop, (slot + 1) * size // _BINS) - max(start, slot * size // _BINS)
            cover[slot][part] += max(inside, 0)
    merged: list[tuple[str, float | int, float | int]] = []
    for slot, counts in enumerate(cover):
        if not counts:
            continue
        part = counts.most_common(1)[0][0]
        if merged and merged[-1][0] == part and merged[-1][2] == slot:
            merged[-1] = (part, merged[-1][1], slot + 1)
        else:
            merged.append((part, slot, slot + 1))
    return merged


def making_section(record: RunRecord) -> Html:
    """Command, commit, machine, versions, the whole configuration and the last value of everything logged."""
    run = record.run
    host = run["host"] if isinstance(run.get("host"), dict) else run
    command = run.get("command")
    if isinstance(command, list):
        command = shlex.join(str(word) for word in command)
    pairs: list[tuple[str, object]] = [("Command", tag("code", command) if command else None)]
    commit = run.get("commit")
    if commit:
        dirty = " with uncommitted changes" if run.get("dirty") else ""
        pairs.append(("Commit", Html(tag("code", str(commit)[:12]) + text.escape(dirty))))
    for key, label in (("started", "Started"), ("ended", "Ended")):
        when = unix_seconds(run.get(key))
        pairs.append((label, text.moment(when) if when is not None else None))
    pairs.append(("Earlier sittings", _history(run)))
    pairs.append(("Resumed from", tag("code", run["resumed_from"]) if run.get("resumed_from") else None))
    machine = _devices(host.get("gpu")) + ([str(host["cpu"])] if host.get("cpu") else [])
    if host.get("cores"):
        machine.append(text.plural(int(host["cores"]), "core") if str(host["cores"]).isdigit() else str(host["cores"]))
    memory = host.get("memory_gib", host.get("memory"))
    if memory:
        machine.append(_memory(memory))
    if host.get("system"):
        machine.append(str(host["system"]))
    pairs.append(("Machine", ", ".join(machine) or None))
    versions = run.get("versions")
    if isinstance(versions, dict):
        pairs.append(("Versions", ", ".join(f"{key} {value}" for key, value in versions.items())))
    pairs.append(("Folder", tag("code", record.folder)))
    known = [Html(tag("dt", label) + tag("dd", value)) for label, value in pairs if value is not None]
    children: list[object] = [tag("dl", *known, attributes={"class": "pairs"})]
    if record.config:
        children.append(_folded("Full configuration", highlight_yaml(record.config)))
    if record.metrics:
        rows = [
            [tag("code", name), _last(series.last), f"{series.step[-1]:,}", f"{len(series):,}"]
            for name, series in sorted(record.metrics.items())
        ]
        table = _table(["Metric", "Last value", "At step", "Entries"], rows, numeric={1, 2, 3})
        children.append(tag("details", tag("summary", "Everything logged"), div("scroll", table)))
    for problem in record.problems:
        children.append(tag("p", problem, attributes={"class": "note"}))
    return section("making", "How it was made", "", *children)


def _records(value: Any) -> list[dict[str, Any]]:
    """The objects of a list; empty for anything else."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _devices(gpu: Any) -> list[str]:
    """``["8 x NVIDIA H100", ...]`` of one name or a list of them."""
    names = Counter(str(one) for one in (gpu if isinstance(gpu, list) else [gpu] if gpu else []))
    return [f"{number} x {name}" if number > 1 else name for name, number in names.items()]


def _history(run: dict[str, Any]) -> Html | None:
    """The earlier sittings of a run that was continued in the same folder."""
    earlier = _records(run.get("history"))
    lines = []
    for leg in earlier:
        ended = unix_seconds(leg.get("ended"))
        when = f" on {text.moment(ended)}" if ended is not None else ""
        error = f": {str(leg['error']).splitlines()[0]}" if leg.get("error") else ""
        lines.append(tag("div", f"{leg.get('status') or 'cut off'}{when}{error}"))
    return Html("".join(lines)) if lines else None


def _memory(memory: Any) -> str:
    if isinstance(memory, int | float):
        return f"{text.gibibytes(memory / 2**30 if memory > 1e6 else memory)} of memory"
    return str(memory)


def highlight_yaml(source: str) -> Html:
    """YAML with its keys and comments marked."""
    lines: list[str] = []
    for line in source.rstrip().split("\n"):
        match = re.match(r"^(\s*(?:- )*)([^\s:#'\"][^:#'\"]*)(:(?:\s.*)?)$", line)
        if line.lstrip().startswith("#"):
            lines.append(text.span("comment", line))
        elif match:
            lines.append(text.escape(match[1]) + text.span("key", match[2]) + text.escape(match[3]))
        else:
            lines.append(text.escape(line))
    return Html("\n".join(lines))


def _folded(title: str, content: str) -> Html:
    return tag("details", tag("summary", title), tag("pre", content))


def _last(value: float | int | None) -> str:
    return "not finite" if value is None else f"{value:,.0f}" if abs(value) >= 1e6 else f"{value:.6g}"


def _number(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"{len(value):,}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _table(heads: list[str], rows: Sequence[Sequence[object]], numeric: set[int]) -> Html:
    def cells(kind: str, values: Sequence[object]) -> list[Html]:
        return [tag(kind, value, attributes={"class": "n" if i in numeric else None}) for i, value in enumerate(values)]

    head = tag("thead", tag("tr", *cells("th", heads)))
    return tag("table", head, tag("tbody", *[tag("tr", *cells("td", row)) for row in rows]))
