"""Text to rows of tokens on a CPU, MB/s: against Hugging Face datasets + tokenizers.

The same documents (1 to 200 kB of words drawn with Zipf's frequencies, as rows of JSON), the same tokenizer.json, the
same rows of 8,192. The peer does what its course and example scripts do: ``load_dataset("json")``, ``map`` of the
tokenizer over batches, ``map`` that joins and cuts, a shuffling DataLoader. ``--path FILE`` measures documents of your
own (.jsonl with a field text).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seqlong.bench import Row, main
from seqlong.datamodules.text import TextData
from seqlong.datamodules.text.splits import PositionSplit
from seqlong.tokenizer import train

PEER = "datasets + tokenizers"
LENGTH = 8192
SIZE = 24 << 20


def corpus(path: Path, size: int = SIZE) -> None:
    """Rows of JSON whose texts have ``size`` bytes in all, always the same."""
    generator = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    weights = np.arange(1, len(letters) + 1, dtype=np.float64) ** -0.7
    spelled = generator.choice(letters, (30_000, 9), p=weights / weights.sum())
    lengths = np.minimum(generator.geometric(0.22, 30_000) + 1, 9)
    words = ["".join(row[:length]) for row, length in zip(spelled, lengths, strict=True)]
    share = 1.0 / np.arange(1, 30_001)
    share /= share.sum()
    written = 0
    with path.open("w") as file:
        while written < size:
            count = int(generator.integers(200, 40_000))
            drawn = generator.choice(30_000, count, p=share).tolist()
            text = " ".join(words[one] for one in drawn).replace(" a ", ", ").replace(" e ", ".\n")
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text)


def timed(function: Any) -> tuple[float, Any]:
    """Seconds, and what it gives."""
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def ours(path: Path, tokenizer: str, folder: str) -> TextData:
    """Read, tokenise and keep; opened for rows."""
    data = TextData(
        path=str(path),
        tokenizer=tokenizer,
        length=LENGTH,
        batch_size=1,
        cache_dir=folder,
        split=PositionSplit(0.0, 0.0),
    )
    _ = data.layouts
    return data


def theirs(path: Path, tokenizer: str, folder: str) -> Any:
    """Read, tokenise, join and cut, kept as Arrow files."""
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    if tokenizer == "bytes":

        def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return {"ids": [[2, *(byte + 4 for byte in text.encode()), 3] for text in rows["text"]]}
    else:
        known = Tokenizer.from_file(tokenizer)

        def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return {"ids": [[2, *one.ids, 3] for one in known.encode_batch(rows["text"])]}

    def cut(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        whole = list(chain.from_iterable(rows["ids"]))
        return {"ids": [whole[at : at + LENGTH] for at in range(0, len(whole) - LENGTH + 1, LENGTH)]}

    found = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=folder)
    found = found.map(encode, batched=True, batch_size=100, remove_columns=found.column_names)
    return found.map(cut, batched=True, batch_size=100).with_format("torch")


def rows(given: argparse.Namespace) -> Iterator[Row]:
    """Measure, one row at a time."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        if given.path:
            path = Path(given.path)
        else:
            corpus(path)
        with path.open(encoding="utf-8") as file:
            size = sum(len(json.loads(line)["text"].encode()) for line in file) / 1e6
        bpe = str(train([str(path)], 8192, Path(folder) / "tokenizer.json", limit=8 << 20))
        for name, tokenizer in (("bytes", "bytes"), ("BPE of 8,192", bpe)):
            seconds, data = timed(lambda tokenizer=tokenizer: ours(path, tokenizer, f"{folder}/ours"))
            peer_seconds, peer = timed(
                lambda tokenizer=tokenizer: theirs(path, tokenizer, f"{folder}/theirs-{tokenizer[:5]}")
            )
            yield Row(name, "files to tokens, the first time", size / seconds, "MB/s", PEER, size / peer_seconds)
            count = min(300, len(peer) - 1)
            batches = iter(data.train_dataloader())
            next(batches)
            seconds, drawn = timed(lambda batches=batches, count=count: list(islice(batches, count)))
            other = iter(torch.utils.data.DataLoader(peer, batch_size=1, shuffle=True))
            next(other)
            peer_seconds, _ = timed(lambda other=other, count=count: list(islice(other, count)))
            assert all(batch.shape == (1, LENGTH) for batch in drawn)
            yield Row(
                name,
                "shuffled rows of 8,192 from a DataLoader (ours with targets, weights, segments)",
                count / seconds,
                "rows/s",
                PEER,
                count / peer_seconds,
            )
            seconds, _ = timed(lambda tokenizer=tokenizer: ours(path, tokenizer, f"{folder}/ours"))
            peer_seconds, _ = timed(
                lambda tokenizer=tokenizer: theirs(path, tokenizer, f"{folder}/theirs-{tokenizer[:5]}")
            )
            yield Row(name, "opened again", seconds, "s", PEER, peer_seconds)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", help="a .jsonl of your own, with a field text")
    main("text_cpu", rows(parser.parse_args()), on="cpu")
