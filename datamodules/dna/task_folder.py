"""TaskFolder: benchmarks that are folders of tasks, each with its own train, dev and test, such as GUE."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from seqlong.datamodules.dna.labelled import LabelledData
from seqlong.datamodules.dna.tokens import TokenizerSettings
from seqlong.errors import DataError, nearest

_ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".jsonl")
_VALIDATION = ("dev", "validation", "valid", "val")


class TaskFolder(LabelledData):
    """One task of a folder of them: ``folder/task/{train,dev,test}.csv``, also gzipped, TSV, Parquet or JSON lines.

    Args:
        folder: the benchmark.
        task: one of its tasks, a path inside it.
        labels: what labels are: a ``class``, several of them (``multilabel``), or a ``value``.
        validation_share: share of training records that is held out where the task has no dev file.
        length: longest row, bases; null is the longest record.
        rows: ``pad``: a record a row; ``pack``: several to a row of ``length``.
        batch_size: rows in a batch over all ranks.
        unseen: which records the ``unseen`` scores leave out: ``exact`` ones (on either strand) or ``near`` ones too.
        eval_batch_size: rows in an evaluation batch over all ranks; null is ``batch_size``.
        seed: number that names the order of training.
        workers: loader processes of each rank.
        floors: whether to fit the linear models that scores are held against.
        cache_dir: folder where floors are kept; null is $SEQLONG_CACHE or ~/.cache/seqlong.
        tokenizer: what a position is: a base, a word, a codon, or a learnt piece; null is a base.

    Raises:
        DataError: there is no such task; it names those that there are.
    """

    def __init__(
        self,
        folder: str,
        task: str,
        labels: Literal["class", "multilabel", "value"] = "class",
        validation_share: float = 0.1,
        length: int | None = None,
        rows: Literal["pad", "pack"] = "pad",
        batch_size: int = 32,
        unseen: Literal["exact", "near"] = "near",
        eval_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 0,
        floors: bool = True,
        cache_dir: str | None = None,
        tokenizer: TokenizerSettings | None = None,
    ) -> None:
        place = Path(folder).expanduser() / task
        train, test = _file(place, "train"), _file(place, "test")
        if train is None or test is None:
            raise DataError(_missing(Path(folder).expanduser(), task, "train" if train is None else "test"))
        validation = next((found for name in _VALIDATION if (found := _file(place, name))), None)
        super().__init__(
            train, validation, test, labels=labels, validation_share=validation_share, length=length, rows=rows,
            batch_size=batch_size, unseen=unseen, eval_batch_size=eval_batch_size, seed=seed, workers=workers,
            floors=floors, cache_dir=cache_dir, tokenizer=tokenizer,
        )  # fmt: skip
        self.task = task


def _file(place: Path, name: str) -> str | None:
    return next((str(place / (name + end)) for end in _ENDINGS if (place / (name + end)).is_file()), None)


def _missing(folder: Path, task: str, part: str) -> str:
    if not folder.is_dir():
        return f"data.folder={folder}: there is no such folder; expected one with folders of tasks in it"
    tasks = sorted({str(path.parent.relative_to(folder)) for path in folder.rglob("train.*")})
    listed = ", ".join(tasks[:30]) or "none"
    return f"{folder / task} has no {part}.csv{nearest(task, tasks)}; the tasks there: {listed}"
