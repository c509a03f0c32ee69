"""The verb ``seqlong report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seqlong.report import write_report


def command(words: Sequence[str]) -> int:
    """Write the report of the run folder that `words` names; returns the exit status."""
    if len(words) != 1 or words[0].startswith("-"):
        print("write the HTML report of a run again: seqlong report RUN_FOLDER, such as runs/demo-20260801-120000")
        return 0 if words and words[0] in ("-h", "--help") else 2
    folder = Path(words[0])
    print(write_report(folder) or folder / "report.html")
    return 0
