"""Genome: the stores of one or several sequence files as one list of contigs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.proteins import ReverseTranslation
from seqlong.datamodules.dna.store import Contig, GenomeStore
from seqlong.errors import DataError, nearest


class Genome:
    """The contigs of all ``stores``, numbered through in order.

    Args:
        stores: one for each file.

    Attributes:
        stores: the same.
        contigs: all of them.
        bases: bases in all.
    """

    def __init__(self, stores: Sequence[GenomeStore]) -> None:
        self.stores = tuple(stores)
        self.contigs: list[Contig] = [contig for store in stores for contig in store.contigs]
        self.bases = sum(store.bases for store in stores)
        self._places = [(store, number) for store in self.stores for number in range(len(store.contigs))]
        self._names: dict[str, list[int]] = {}
        for number, (store, _) in enumerate(self._places):
            name = self.contigs[number].name
            for key in (name, f"{store.path.name}:{name}"):
                self._names.setdefault(key, []).append(number)

    @classmethod
    def open(
        cls,
        paths: str | Path | Sequence[str | Path],
        cache_dir: str | Path | None = None,
        circular: Sequence[str] | Literal["all"] = (),
        protein: ReverseTranslation | None = None,
    ) -> Genome:
        """Build or open the store of each path; see `GenomeStore.build_or_open`.

        ``circular`` may name a contig of any of the files, as ``number`` does.

        Raises:
            DataError: a file cannot be read, none is given or one is given twice, or ``circular`` names no contig.
        """
        several = [paths] if isinstance(paths, str | Path) else list(paths)
        if not several:
            raise DataError("path: found an empty list, expected at least one sequence file")
        if len({str(path) for path in several}) < len(several):
            twice = next(path for path in several if several.count(path) > 1)
            raise DataError(f"path: {twice} is listed twice")
        rings = "all" if circular == "all" else ()
        stores = [GenomeStore.build_or_open(path, cache_dir, rings, protein) for path in several]
        first: dict[str, str | Path] = {}
        for path, store in zip(several, stores, strict=True):
            same = first.setdefault(store.digest, path)
            if same is not path:
                raise DataError(f"path: {path} has the same content as {same}, so what one trains on the other tests")
        if not isinstance(circular, str):
            genome = cls(stores)
            named = [genome._places[genome.number(name, "circular")] for name in circular]
            stores = [
                store.with_circular([store.contigs[number].name for owner, number in named if owner is store])
                for store in stores
            ]
        return cls(stores)

    def number(self, name: str, where: str = "split") -> int:
        """The number of the contig called ``name``, or ``file:name`` where several files have one of that name.

        Args:
            name: as above.
            where: what names it, for the error.

        Raises:
            DataError: no contig, or several, of that name.
        """
        found = self._names.get(name, [])
        if len(found) == 1:
            return found[0]
        files = ", ".join(str(store.path) for store in self.stores)
        if found:
            owner = self._places[found[0]][0].path.name
            raise DataError(f"{where}: '{name}' is in several of {files}; write it with its file, as '{owner}:{name}'")
        raise DataError(
            f"{where}: contig '{name}' is not in {files}{nearest(name, self._names)} (the first contig there is "
            f"'{self.contigs[0].name}')"
        )

    def read(self, number: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes of bases ``start`` to ``stop`` of contig ``number``; see `GenomeStore.read`."""
        store, local = self._places[number]
        return store.read(local, start, stop)
