"""Proteins as bases: every residue becomes a codon (reverse translation), so that one model reads DNA, RNA and protein.

A protein does not say which of its synonymous codons a gene has; a table of codon usage says which is likely. Life-Code
(arXiv 2502.07299) maps proteins so. RNA needs no mapping: U is read as T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.tokens import genetic_code
from seqlong.datamodules.sampler import mix
from seqlong.errors import ConfigError, nearest

#: Letters that name no single residue with codons of its own: any; D or N; E or Q; I or L; selenocysteine; pyrrolysine.
UNCLEAR = "XBZJUO"


@dataclass(frozen=True)
class ProteinSettings:
    """How residues become codons.

    Attributes:
        usage: codon usage of ``h_sapiens_9606``, ``e_coli_316407`` or another species of python-codon-tables.
        code: number of NCBI's genetic code.
        draw: ``most``: the most used codon of each residue; ``sample``: one in proportion to its use, always the same
            for the same place, residue and ``seed``.
        seed: names the draw.
        unclear: residues that are not one (X, B, Z, J, U, O): ``error``, or ``n`` reads them as NNN.
    """

    usage: str = "h_sapiens_9606"
    code: int = 1
    draw: Literal["most", "sample"] = "most"
    seed: int = 0
    unclear: Literal["error", "n"] = "error"


class ReverseTranslation:
    """Residues to codons.

    Attributes:
        name: tells apart what different settings make.

    Raises:
        ConfigError: no such table or genetic code.
    """

    def __init__(self, settings: ProteinSettings) -> None:
        import python_codon_tables

        known = python_codon_tables.available_codon_tables_names
        if settings.usage not in known:
            raise ConfigError(
                f"data.protein.usage: there is no table '{settings.usage}'{nearest(settings.usage, known)}; there are: "
                f"{', '.join(sorted(known))}"
            )
        self.settings = settings
        self.name = "-".join(map(str, (settings.usage, settings.code, settings.draw, settings.seed, settings.unclear)))
        tables = python_codon_tables.get_codons_table(settings.usage)
        used = {codon.replace("U", "T"): share for table in tables.values() for codon, share in table.items()}
        codons: dict[str, list[tuple[float, str]]] = {}
        for codon, residue in genetic_code(settings.code).items():
            codons.setdefault(residue, []).append((used.get(codon, 0.0), codon))
        self._bases = np.full((256, 6, 3), ord("N"), dtype=np.uint8)
        self._below = np.ones((256, 6))
        for residue, found in codons.items():
            found.sort(key=lambda pair: (-pair[0], pair[1]))  # the most used first; ties by letters
            found = found[:6]  # more synonyms than six has no residue in most codes; the rarest are left out
            share = np.array([use + 1e-9 for use, _ in found])
            for letter in (residue, residue.lower()):
                for place, (_, codon) in enumerate(found):
                    self._bases[ord(letter), place] = np.frombuffer(codon.encode(), dtype=np.uint8)
                self._below[ord(letter), : len(found)] = np.cumsum(share) / share.sum()
        self._clear = "".join(codons)

    def problem(self, residues: bytes, last: bool = True) -> tuple[int, str] | None:
        """The place (from 0) of the first residue that has no codon, and what is wrong; None where all are well.

        Args:
            residues: upper or lower case.
            last: whether the protein ends here, as it may with a stop.
        """
        body = residues.upper()
        body = body[:-1] if last and body.endswith(b"*") else body
        allowed = self._clear.replace("*", "") + (UNCLEAR if self.settings.unclear == "n" else "")
        bad = body.translate(None, delete=allowed.encode())
        if not bad:
            return None
        letter = chr(bad[0])
        place = body.index(bad[:1])
        if letter == "*":
            return place, "a stop inside of the protein; cut it there, or remove the record"
        if letter in UNCLEAR:
            return place, f"residue '{letter}' has no codon of its own; data.protein.unclear=n reads it as NNN"
        return place, f"illegal letter {letter!r}; expected amino acids ({''.join(sorted(self._clear))})"

    def bases(self, residues: bytes, start: int = 0) -> bytes:
        """Codons of residues, without ``problem``, that begin at residue ``start`` of their protein."""
        letters: NDArray[np.uint8] = np.frombuffer(residues, dtype=np.uint8)
        chosen = np.zeros(letters.size, dtype=np.int64)
        if self.settings.draw == "sample" and letters.size:
            places = np.arange(start, start + letters.size)
            drawn = (mix(self.settings.seed, places, letters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
            chosen = (drawn[:, None] >= self._below[letters]).sum(axis=1).clip(max=5)
        return self._bases[letters, chosen].tobytes()
