"""Checkpoints in parts: each process writes what it holds, and any number of processes reads it again.

::

    checkpoints/last.ckpt            the head: everything but the large tensors, and the name of the folder below
    checkpoints/step-00000500/
      __0_0.distcp __1_0.distcp ...  what each process held (torch.distributed.checkpoint)
      index.json                     where each piece of each tensor lies
      head.ckpt                      the head again: a checkpoint by itself
      .done                          the sizes of these files; written last

``last.ckpt`` is replaced when ``.done`` is there: whatever is killed, it names a folder that is whole. Reading runs no
code of the files: tensors and primitives (``weights_only``), and JSON. (``.metadata``, a pickle, is written beside them
for torch's own tools; it is not read here.)
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from seqlong.errors import CheckpointError

#: Where a head holds the name of the folder with the tensors.
PARTS_KEY = "seqlong_parts"
HEAD, INDEX, DONE = "head.ckpt", "index.json", ".done"
#: What of a checkpoint may be large.
_LARGE = ("state_dict", "optimizer_states")
#: Stands in a head for a tensor that is in the folder: {_LEAF: its name}.
_LEAF = "seqlong_part"
#: Tensors of at most so many elements are in the head, unless they are held in parts.
SMALL = 1024
VERSION = 1


# --- heads and tensors ------------------------------------------------------------------------------------------------


def take_apart(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The head of a checkpoint, and its large tensors by name, such as ``optimizer_states/0/state/3/exp_avg``."""
    tensors: dict[str, Tensor] = {}

    def taken(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: taken(item, f"{name}/{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([taken(item, f"{name}/{number}") for number, item in enumerate(value)])
        if isinstance(value, DTensor) or (isinstance(value, Tensor) and value.numel() > SMALL):
            tensors[name] = value.detach()
            return {_LEAF: name}
        return value.detach().cpu() if isinstance(value, Tensor) else value

    head = {key: taken(value, key) if key in _LARGE else value for key, value in checkpoint.items()}
    return head, tensors


def put_together(head: Any, tensor: Callable[[str], Any]) -> Any:
    """A head with its tensors in their places; ``tensor`` gives each by its name."""
    if isinstance(head, dict):
        if len(head) == 1 and _LEAF in head:
            return tensor(head[_LEAF])
        return {key: put_together(value, tensor) for key, value in head.items()}
    if isinstance(head, list | tuple):
        return type(head)([put_together(value, tensor) for value in head])
    return head


def head_of(path: Path) -> Path:
    """``path``, or the head in it if it is a folder of parts."""
    return path / HEAD if (path / HEAD).is_file() else path


def folder_of(path: Path, head: dict[str, Any]) -> Path | None:
    """The folder with the tensors of a head that was read from ``path``; None of a checkpoint in one file.

    Raises:
        CheckpointError: the folder is not there, or not whole.
    """
    name = head.get(PARTS_KEY)
    if name is None:
        return None
    folder = path.parent if path.name == HEAD and path.parent.name == name else path.parent / name
    if problem := lacking(folder):
        raise CheckpointError(f"{path} is the head of a checkpoint in parts, and {problem}{_other(path.parent)}")
    return folder


def lacking(folder: Path) -> str | None:
    """What a folder of parts lacks to be whole; None if nothing."""
    if not folder.is_dir():
        return f"there is no folder {folder} beside it; a copy needs both"
    try:
        files = json.loads((folder / DONE).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder} was not written to its end: it has no {DONE}"
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            had = "is not there" if found is None else f"has {found:,} bytes"
            return f"{path} {had}, instead of its {size:,} bytes"
    return None


def newest(folder: Path) -> Path | None:
    """The head of the newest whole checkpoint in parts among those in a folder of checkpoints."""
    whole = [path for path in folder.glob("step-*") if path.is_dir() and lacking(path) is None]
    return max(whole, key=lambda path: (path / DONE).stat().st_mtime_ns) / HEAD if whole else None


def mend(last: Path) -> str | None:
    """If the checkpoint in parts that ``last`` names is not whole, or ``last`` is not there, put the newest whole one
    in its place; what was done, in words."""
    if last.is_file():
        head = read_head(last)
        if head is None or head.get(PARTS_KEY) is None or lacking(last.parent / head[PARTS_KEY]) is None:
            return None
    found = newest(last.parent)
    if found is None:
        return None
    replace(last, found.read_bytes())
    return f"{last} was not whole; going on from {found.parent.name}, the newest that is"


def _other(folder: Path) -> str:
    found = newest(folder)
    return f". The newest whole one is {found}" if found else ""


def read_head(path: Path) -> dict[str, Any] | None:
    """What a .ckpt file holds, whatever its kind; None if it cannot be read."""
    try:
        head = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises errors of many kinds for files that are none of ours
        return None
    return head if isinstance(head, dict) else None


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a piece lies, in the words of ``FileSystemReader``."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: tuple[str, ...] = ()


class _Reader(FileSystemReader):
    """Reads our index instead of the pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        described: dict[str, Any] = {}
        places: dict[MetadataIndex, _Place] = {}
        for name, about in _index(Path(self.path)).items():
            pieces = [ChunkStorageMetadata(torch.Size(piece[0]), torch.Size(piece[1])) for piece in about["pieces"]]
            properties = TensorProperties(dtype=_dtype(about["dtype"]))
            described[name] = TensorStorageMetadata(properties, torch.Size(about["size"]), pieces)
            places |= {MetadataIndex(name, piece[0]): _Place(*piece[2:]) for piece in about["pieces"]}
        return Metadata(described, storage_data=places)


def shapes(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in parts, without what is in them (``device="meta"``)."""
    about = _index(folder).items()
    return {name: torch.empty(one["size"], dtype=_dtype(one["dtype"]), device="meta") for name, one in about}


def read(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Whole tensors, in the CPU's memory, by this process alone.

    Args:
        folder: of the parts.
        wanted: which names.

    Raises:
        CheckpointError: a part cannot be read.
    """
    tensors = {name: torch.empty_like(one, device="cpu") for name, one in shapes(folder).items() if wanted(name)}
    read_into(folder, tensors)
    return tensors


def read_into(folder: Path, targets: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill tensors, or this process's parts of them (``DTensor``), from whatever parts they were saved in.

    Args:
        folder: of the parts.
        targets: by name; all processes of ``group`` have the same names.
        group: who reads together; None is this process alone.

    Raises:
        CheckpointError: a part cannot be read, is of another shape, or is not there.
    """
    if not targets:
        return
    known = shapes(folder)
    for name, target in targets.items():
        if name not in known or known[name].shape != target.shape:
            found = f"is {tuple(known[name].shape)}" if name in known else "is not there"
            raise CheckpointError(f"{folder}: {name} {found}, and the model's is {tuple(target.shape)}")
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                dict(targets),
                storage_reader=_Reader(folder),
                planner=planner,
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as error:
        why = "; ".join(f"rank {rank}: {reason(found[0])}" for rank, found in sorted(error.failures.items()))
        raise CheckpointError(f"{folder} cannot be read: {why}. It is damaged; use an earlier checkpoint") from error


def _index(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / INDEX).read_text())
        if content["format"] == VERSION:
            return dict(content["tensors"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} cannot be read: {reason(error)}") from error
    raise CheckpointError(f"{folder} was written by another version of seqlong (format {content['format']})")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"'{name}' in {INDEX} is no type of tensors")
    return found


def names_of(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every tensor of a tree of dictionaries and lists, with the name that ``take_apart`` gives it."""
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield from names_of(item, f"{name}/{key}")
    elif isinstance(tree, list | tuple):
        for number, item in enumerate(tree):
            yield from names_of(item, f"{name}/{number}")
    elif isinstance(tree, Tensor):
        yield name, tree


# --- files ------------------------------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> None:
    """Write a file, to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def reason(error: BaseException) -> str:
    """Why, in one line."""
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
