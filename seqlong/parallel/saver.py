"""Saver: writes checkpoints in parts (see parts.py), while training goes on if asked."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from seqlong.errors import CheckpointError
from seqlong.parallel.parts import DONE, HEAD, INDEX, PARTS_KEY, VERSION, read_head, reason, replace, take_apart, write


class Saver:
    """Writes checkpoints in parts, all processes together, one at a time.

    Args:
        group: all processes, by a backend for the CPU (gloo), of nobody else: writing goes on while others train.
        background: copy to the host's memory and write while training goes on.
    """

    def __init__(self, group: dist.ProcessGroup, background: bool) -> None:
        self.group, self.background = group, background
        self._writing: Future[None] | None = None
        self._whole: str | None = None

    def save(self, checkpoint: dict[str, Any], path: Path, links: tuple[str, ...], stale: tuple[str, ...]) -> None:
        """Write ``path`` and its folder; returns when the tensors are copied, or, not in the background, written.

        Args:
            checkpoint: the same on every process but for what tensors hold.
            path: of the head.
            links: names beside it that are to be this checkpoint too.
            stale: names beside it that are not needed after that.

        Raises:
            CheckpointError: this one, or the one before it, was not written.
        """
        self.wait()
        chosen = [_unused(path.parent, checkpoint["global_step"]) if dist.get_rank(self.group) == 0 else ""]
        dist.broadcast_object_list(chosen, src=dist.get_global_rank(self.group, 0), group=self.group)
        folder = path.parent / chosen[0]
        head, tensors = take_apart(checkpoint)
        stream = io.BytesIO()
        if dist.get_rank(self.group) == 0:
            torch.save({**head, PARTS_KEY: folder.name}, stream)
        writer = _Writer(folder, lambda files: _commit(folder, path, stream.getvalue(), files, links, stale))
        if not self.background:
            self._write(writer, tensors, folder)
            return
        staged = writer.stage(tensors)
        writing: Future[None] = Future()

        def work() -> None:
            problem: CheckpointError | None = CheckpointError(f"writing {folder} ended by an error of ours (see above)")
            try:
                self._write(writer, staged, folder)
                problem = None
            except CheckpointError as error:
                problem = error
            finally:
                if problem is None:
                    writing.set_result(None)
                else:
                    writing.set_exception(problem)

        # A daemon: a process that ends because another hangs must not wait for it here. Good ends call `wait`.
        threading.Thread(target=work, name="seqlong-checkpoint", daemon=True).start()
        self._writing = writing

    def wait(self, seconds: float | None = None) -> None:
        """Wait until what is being written is written.

        Raises:
            CheckpointError: it was not, or not in time.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result(seconds)
        except FutureTimeout as error:
            raise CheckpointError(f"a checkpoint was not written within {seconds:g} seconds") from error

    def settle(self, seconds: float) -> None:
        """Wait until what is being written is written or has failed; for use by another thread."""
        writing = self._writing
        if writing is not None:
            wait_for([writing], seconds)

    def trouble(self) -> str | None:
        """Why what was written in the background is not, if that is known by now. Waits for nothing."""
        writing = self._writing
        error = writing.exception() if writing is not None and writing.done() else None
        return None if error is None else str(error)

    def _write(self, writer: _Writer, tensors: dict[str, Tensor], folder: Path) -> None:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=self.group)
        except CheckpointException as error:
            why = "; ".join(f"rank {rank}: {reason(found[0])}" for rank, found in sorted(error.failures.items()))
            raise self._failed(folder, why) from error
        except (RuntimeError, OSError) as error:  # another process is gone
            raise self._failed(folder, f"rank {dist.get_rank(self.group)}: {reason(error)}") from error
        self._whole = folder.name

    def _failed(self, folder: Path, why: str) -> CheckpointError:
        if dist.get_rank(self.group) == 0:
            shutil.rmtree(folder, ignore_errors=True)
        before = f"{self._whole} is whole" if self._whole else "what was there before is as it was"
        return CheckpointError(f"cannot write the checkpoint {folder} in parts: {why}; {before}")


class _Writer(FileSystemWriter):
    """Writes the index too, and says when all is written. (``finish`` runs on one process, after all have written.)"""

    def __init__(self, folder: Path, commit: Callable[[dict[str, int]], None]) -> None:
        super().__init__(folder)
        self._commit = commit

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        tensors: dict[str, Any] = {}
        files: dict[str, int] = {}
        for result in (one for part in results for one in part):
            name, place = result.index.fqn, result.storage_data
            about = metadata.state_dict_metadata[name]
            assert isinstance(about, TensorStorageMetadata)
            kept = tensors.setdefault(
                name, {"dtype": str(about.properties.dtype)[6:], "size": list(about.size), "pieces": []}
            )
            offset = list(result.index.offset or [0] * len(about.size))
            size = next(list(chunk.sizes) for chunk in about.chunks if list(chunk.offsets) == offset)
            kept["pieces"].append([offset, size, place.relative_path, place.offset, place.length])
            files[place.relative_path] = max(files.get(place.relative_path, 0), place.offset + place.length)
        folder = Path(self.path)
        write(folder / INDEX, json.dumps({"format": VERSION, "tensors": tensors}).encode())
        self._commit({**files, INDEX: (folder / INDEX).stat().st_size})


def _commit(
    folder: Path, path: Path, head: bytes, files: dict[str, int], links: tuple[str, ...], stale: tuple[str, ...]
) -> None:
    """All is written: say so, put the head in its place, and give back what nobody names any more."""
    write(folder / HEAD, head)
    sizes = {**files, HEAD: len(head)}
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size < size:
            raise CheckpointError(
                f"{folder / name} was written, but is not seen by the first process on {socket.gethostname()}: "
                "checkpoints in parts need a run folder that all machines share"
            )
    sizes = {name: (folder / name).stat().st_size for name in sizes}
    write(folder / DONE, json.dumps({"files": sizes}).encode())
    replace(path, head)
    publish(path, links, stale)
    sweep(path.parent)


def publish(path: Path, links: tuple[str, ...], stale: tuple[str, ...]) -> None:
    """Give a checkpoint more names beside it, and take away names of others."""
    for name in links:
        other = path.with_name(name)
        other.unlink(missing_ok=True)
        try:
            os.link(path, other)  # it is replaced, never written over, so a link is a copy
        except OSError:
            shutil.copyfile(path, other)
    for name in stale:
        if name not in links:
            path.with_name(name).unlink(missing_ok=True)


def sweep(folder: Path, unfinished: bool = False) -> None:
    """Delete the folders of parts that no checkpoint in ``folder`` names; none if one of these cannot be read.

    Args:
        folder: of checkpoints.
        unfinished: only those that were not written to their end.
    """
    found = [path for path in folder.glob("step-*") if _ours(path)]
    if not found:
        return
    heads = [read_head(path) for path in folder.glob("*.ckpt")]
    if any(head is None for head in heads):
        return
    named = {head.get(PARTS_KEY) for head in heads if head is not None}
    for path in found:
        if path.name not in named and not (unfinished and (path / DONE).exists()):
            (path / DONE).unlink(missing_ok=True)  # first: half of a folder must not look whole
            shutil.rmtree(path, ignore_errors=True)


def _ours(path: Path) -> bool:
    """Whether this is a folder of parts, and nothing else is in it."""
    if not re.fullmatch(r"step-\d{8}(-\d+)?", path.name) or not path.is_dir():
        return False
    known = {HEAD, INDEX, DONE, ".metadata", ".metadata.tmp"}
    return all(inside.name in known or inside.suffix == ".distcp" for inside in path.iterdir())


def _unused(folder: Path, step: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    names = (f"step-{step:08d}{f'-{count}' if count else ''}" for count in range(10**6))
    return next(name for name in names if not (folder / name).exists())
