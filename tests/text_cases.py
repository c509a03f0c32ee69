"""Text that is made up, and a tokenizer trained on it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

WORDS = re.findall(r"\w+", "the whale sea ship harpoon captain white and of a in to it was he his that upon with not")


def prose(size: int, seed: int) -> str:
    """About ``size`` characters of words."""
    generator = np.random.default_rng(seed)
    text = " ".join(generator.choice(WORDS, size // 3))
    return text[:size] + "\n"


def trained(folder: Path) -> str:
    """A small BPE, trained by the command, in ``folder``."""
    from seqlong.tokenizer import train

    (folder / "a.txt").write_text(prose(20_000, 9))
    return str(train([str(folder / "a.txt")], 290, folder / "tokenizer.json"))
