"""Tuned configurations of kernels, and the check that each one passes on this machine before it is used.

A configuration is a small dictionary, ``{"chunk": 64, "warps": 4}``. It is looked up by op and key, where a key names
types and widths but neither length nor rows: ``bf16 k64 v64``. Three places are asked in turn: the user's own file
(``~/.cache/seqlong/tuned/h100.json``, or ``SEQLONG_TUNED=file``; ``seqlong doctor --tune`` writes it), the file that is
shipped for this kind of GPU (``tuned/h100.json`` beside this module), and the op's default. Compilers produce wrong
kernels now and then, so the first use of a configuration compares it with the chunked form on small inputs; verdicts
are remembered on disk until the kernel's source, Triton, torch, seqlong or the GPU changes.

An op asks in its forward pass. Its backward pass is handed the answer, or asks again, which must give the same::

    config = settle("scalar_decay", key(v.dtype, k=64, v=64), DEFAULT, v.device)
    if config is None:
        ...  # no configuration is right here: run the chunked form
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from seqlong import __version__
from seqlong.errors import SeqlongError, located
from seqlong.kernels.runtime import INTERPRETED, constant_when_traced

log = logging.getLogger(__name__)

Config = dict[str, int | bool | str]
Check = Callable[[Config], str | None]

#: A file of the user's own, instead of that in the cache folder.
VARIABLE = "SEQLONG_TUNED"
SHIPPED = Path(__file__).parent / "tuned"
#: Seconds that a thread waits for the check that another one runs, before it goes on unchecked.
PATIENCE = 120.0
#: Top-level entry of a file that is not an op: where its figures come from.
ABOUT = "about"

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_LATER = "?"  # not checked, and not remembered either


@dataclass(frozen=True)
class Settled:
    """What was decided for one op and key on one device.

    Attributes:
        config: the configuration in use; None if none is right, and the chunked form runs.
        source: ``own``, ``shipped`` or ``default``: where it was found.
        checked: whether it was compared with the chunked form (never on a CPU).
    """

    op: str
    key: str
    device: str
    config: Config | None
    source: str
    checked: bool


_Place = tuple[str, str, torch.device]
_settled: dict[_Place, Settled] = {}
_verdicts: dict[str, str | None] = {}
_running: dict[str, threading.Event] = {}
_lock = threading.Lock()
_local = threading.local()
_backward: dict[tuple[str, str], Config] = {}


def key(dtype: torch.dtype, **sizes: int) -> str:
    """``key(torch.bfloat16, k=64, v=64)`` is ``bf16 k64 v64``; True is written as a bare word, False not at all."""
    words = [_SHORT[dtype]]
    for name, size in sizes.items():
        if not isinstance(size, bool):
            words.append(f"{name}{size}")
        elif size:
            words.append(name)
    return " ".join(words)


def parse_key(text: str) -> tuple[torch.dtype, dict[str, int], set[str]]:
    """The type, sizes and bare words of a key.

    Raises:
        ValueError: it does not begin with a type.
    """
    first, *rest = text.split()
    types = {name: dtype for dtype, short in _SHORT.items() for name in (short, str(dtype).removeprefix("torch."))}
    if first not in types:
        raise ValueError(f"the key '{text}' begins with '{first}'; expected one of {', '.join(types)}")
    found = [(word, re.fullmatch(r"([a-z_]+)(\d+)", word)) for word in rest]
    return types[first], {m[1]: int(m[2]) for _, m in found if m}, {word for word, m in found if not m}


@constant_when_traced
def settle(op: str, key: str, default: Config, device: torch.device | str, check: Check | None = None) -> Config | None:
    """The configuration to run ``op`` with: tuned if there is one, else ``default``; None if neither is right here.

    Costs a dictionary look-up from the second call on. The first one checks the configuration; in another thread,
    so that no autocast, no_grad, deterministic filling, compiler or transform of the caller reaches into the check.
    While a CUDA graph is recorded nothing can be checked, and the answer is not remembered.

    Args:
        op: name of the op.
        key: what the configuration depends on, from ``key()``.
        default: safe values, which also say which settings there are and their types.
        device: where the op runs.
        check: returns what is wrong with a configuration in one sentence, or None. If None: that of
            ``seqlong.kernels.probes``, on a GPU only.

    Returns:
        A copy, or None if the caller is to run the chunked form.
    """
    forced = getattr(_local, "forced", None)
    if forced is None and (op, key) in _backward and torch._C._current_graph_task_id() != -1:
        return {**default, **_backward[op, key]}
    if forced is not None:
        wanted = forced.get(op)
        return {**default, **wanted} if wanted is not None else lookup(op, key, default, device)
    device = _indexed(device)
    place = (op, key, device)
    done = _settled.get(place)
    if done is not None:
        return None if done.config is None else dict(done.config)
    found, source = _find(op, key, default, device)
    options = [(found, source)] if found == default else [(found, source), (default, "default")]
    if check is None and (device.type != "cuda" or INTERPRETED):
        _settled[place] = Settled(op, key, str(device), found, source, False)
        return dict(found)
    for config, origin in options:
        last = (config, origin) == options[-1]
        instead = f"{op} runs as chunked instead, which is slower" if last else "the default is used instead"
        verdict = _judge(op, key, config, device, check, f"{origin} configuration", instead)
        if verdict == _LATER:
            return dict(config)
        if verdict is None:
            _settled[place] = Settled(op, key, str(device), config, origin, True)
            return dict(config)
    _settled[place] = Settled(op, key, str(device), None, "default", True)
    return None


def lookup(op: str, key: str, default: Config, device: torch.device | str) -> Config:
    """The tuned configuration, unchecked: the user's own, else the shipped one, else ``default``."""
    return dict(_find(op, key, default, _indexed(device))[0])


def trusted(
    op: str, key: str, config: Config, device: torch.device | str, check: Check | None = None, *, warn: bool = True
) -> bool:
    """Whether ``config`` passes its check here; asked once, then remembered. Warns once if it does not."""
    verdict = _judge(op, key, config, _indexed(device), check, "configuration" if warn else None, "it is not used")
    return verdict is None or verdict == _LATER


def in_use() -> list[Settled]:
    """Every configuration that this process has settled on."""
    return list(_settled.values())


def forget() -> None:
    """Read the files again and settle anew; verdicts stay."""
    _settled.clear()
    _read.cache_clear()


@contextmanager
def using(op: str, config: Config, key: str | None = None) -> Iterator[None]:
    """Within, and on this thread, ``op`` runs with ``config``, and nothing is checked.

    Args:
        key: the key that the op will ask for; then the threads of backward passes get ``config`` too.
    """
    before = getattr(_local, "forced", None)
    _local.forced = {**(before or {}), op: config}
    if key is not None:
        _backward[op, key] = config
    try:
        yield
    finally:
        _local.forced = before
        if key is not None:
            _backward.pop((op, key), None)


# -- Files ------------------------------------------------------------------------------------------------------------


def own_file(device: torch.device | str) -> Path:
    """The user's own file for this kind of GPU."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return _folder() / f"{gpu_slug(_name(_indexed(device)))}.json"


def _folder() -> Path:
    """Where files of this user's machine are kept."""
    if cache := os.environ.get("SEQLONG_CACHE"):
        return Path(cache) / "tuned"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqlong" / "tuned"


def gpu_slug(name: str) -> str:
    """``"NVIDIA H100 80GB HBM3"`` as ``h100``, ``"NVIDIA GeForce RTX 4090"`` as ``rtx-4090``."""
    maker = {"nvidia", "amd", "geforce", "tesla"}
    words = [word for word in re.split(r"[^A-Za-z0-9]+", name) if word and word.lower() not in maker]
    for place, word in enumerate(words):
        if word.lower() in {"rtx", "gtx", "titan", "instinct", "radeon", "quadro"} and place + 1 < len(words):
            return f"{word}-{words[place + 1]}".lower()
        if re.fullmatch(r"[A-Za-z]+\d+[A-Za-z]*", word):
            return word.lower()
    return "-".join(words).lower() or "gpu"


def save(device: torch.device | str, found: Mapping[str, Mapping[str, Config]], about: Mapping[str, str]) -> Path:
    """Add configurations, op -> key -> config, to the user's own file.

    Raises:
        SeqlongError: the file is there and is not JSON, or cannot be written.
    """
    path = own_file(device)
    content: dict[str, Any] = {}
    try:
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise SeqlongError(f"{path} is not a dictionary of ops; delete it, and tune again")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", None)
        raise SeqlongError(located(path, line, f"is not JSON ({error}); delete it, and tune again")) from error
    content[ABOUT] = dict(about)
    for op, configs in found.items():
        content[op] = {**content.get(op, {}), **configs}
    try:
        _write(path, content)
    except OSError as error:
        raise SeqlongError(
            f"cannot write {path}: {error.strerror}; name another file with the environment variable {VARIABLE}"
        ) from error
    forget()
    return path


def _find(op: str, key: str, default: Config, device: torch.device) -> tuple[Config, str]:
    files = [(own_file(device), "own"), (SHIPPED / f"{gpu_slug(_name(device))}.json", "shipped")]
    for path, source in files if device.type == "cuda" or VARIABLE in os.environ else []:
        found = _read(path).get(op, {}).get(key)
        if found is None:
            continue
        wrong = [name for name, value in found.items() if type(value) is not type(default.get(name))]
        if not wrong:
            return {**default, **found}, source
        _complain(path, wrong[0], f"{op}, {key}: '{wrong[0]}' is {json.dumps(found[wrong[0]])}; expected {default}")
    return dict(default), "default"


@lru_cache
def _read(path: Path) -> dict[str, dict[str, Config]]:
    """Op -> key -> configuration. What cannot be read is left out, with a warning that names file and line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if os.environ.get(VARIABLE) == str(path):
            warnings.warn(f"{VARIABLE} names {path}, which does not exist; the shipped configurations are used")
        return {}
    except json.JSONDecodeError as error:
        _complain(path, error.lineno, f"is not JSON: {error.msg}")
        return {}
    except (OSError, UnicodeDecodeError) as error:
        _complain(path, None, f"cannot be read: {error}")
        return {}
    if not isinstance(content, dict):
        _complain(path, 1, f"holds a {type(content).__name__}; expected a dictionary of ops")
        return {}
    result: dict[str, dict[str, Config]] = {}
    for op, configs in content.items():
        if op == ABOUT:
            continue
        if not isinstance(configs, dict):
            _complain(path, op, f"'{op}' is {json.dumps(configs)}; expected a dictionary of keys")
            continue
        for key, config in configs.items():
            if isinstance(config, dict) and all(isinstance(value, int | str) for value in config.values()):
                result.setdefault(op, {})[key] = config
            else:
                _complain(path, key, f"{op}, '{key}' is {json.dumps(config)}; expected numbers, words, true or false")
    return result


_complained: set[tuple[Path, str]] = set()


def _complain(path: Path, where: int | str | None, message: str) -> None:
    if (path, message) in _complained:
        return
    _complained.add((path, message))
    if isinstance(where, str):
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()
        where = next((number for number, line in enumerate(text, 1) if f'"{where}"' in line), None)
    warnings.warn(f"{located(path, where, message)}. It is left out: mend it, or delete the file", stacklevel=2)


def _write(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


# -- Checks -----------------------------------------------------------------------------------------------------------


def _judge(
    op: str, key: str, config: Config, device: torch.device, check: Check | None, kind: str | None, instead: str
) -> str | None:
    """None if the configuration is right, what is wrong with it, or ``_LATER`` if it could not be checked now."""
    settings = json.dumps(config, sort_keys=True)
    place = f"{op}|{key}|{settings}|{_name(device)}|{triton_version()}"
    with _lock:
        if place in _verdicts:
            return _verdicts[place]
        if _busy(device):
            return _LATER
        other = _running.get(place)
        if other is None:
            _running[place] = threading.Event()
    if other is not None:
        # The backward pass of a check that runs in another thread must not wait for that check.
        if torch._C._current_graph_task_id() == -1:
            other.wait(PATIENCE)
        return _verdicts.get(place, _LATER)
    verdict: str | None = _LATER
    remembered, memory = False, Path()
    try:
        memory = _memory(op, device)
        saved = _verdicts_saved(memory)
        if f"{key}|{settings}" in saved:
            verdict, remembered = saved[f"{key}|{settings}"], True
        else:
            verdict = _in_a_thread(check or _default_check(op, key, device), op, key, config, device)
            if verdict != _LATER:
                with suppress(OSError):  # a folder that cannot be written costs the next process a check, no more
                    _write(
                        memory, {ABOUT: _environment(op, device), "verdicts": {**saved, f"{key}|{settings}": verdict}}
                    )
    finally:
        with _lock:
            if verdict != _LATER:
                _verdicts[place] = verdict
            _running.pop(place).set()
    if verdict not in (None, _LATER) and kind is not None:
        again = f" (found by an earlier process; delete {memory} to check again)" if remembered else ""
        warnings.warn(
            f"{op}: the {kind} {settings} for {key} is wrong on {_name(device)} with Triton {triton_version()}: "
            f"{verdict}{again}. {instead[0].upper()}{instead[1:]}; `seqlong doctor` shows what runs",
            RuntimeWarning,
            stacklevel=3,
        )
    return verdict


def _busy(device: torch.device) -> bool:
    """Whether nothing may be launched beside what the caller does: it records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _default_check(op: str, key: str, device: torch.device) -> Check:
    from seqlong.kernels import probes  # it imports the ops, which import this module

    return lambda config: probes.self_check(op, key, device)


def _in_a_thread(check: Check, op: str, key: str, config: Config, device: torch.device) -> str | None:
    """Modes, autocast, no_grad and streams belong to a thread, so a new one has none of the caller's."""
    result: list[str | None] = []

    def work() -> None:
        with using(op, config, key):
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(device)
                    try:
                        torch.cuda.synchronize(device)
                    except RuntimeError:  # an error of what ran before, which is not this configuration's
                        result.append(_LATER)
                        return
                result.append(check(dict(config)))
            except torch.OutOfMemoryError:
                result.append(_LATER)
            except Exception as error:  # whatever a compiler may throw is a verdict on what it was given
                result.append(in_short(error))

    thread = threading.Thread(target=work, name=f"check {op}", daemon=True)
    thread.start()
    thread.join()
    return result[0] if result else _LATER


def in_short(error: Exception) -> str:
    """Type, first and last line: compilers quote much source between them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' ... '.join(line[:200] for line in lines[:1] + lines[1:][-1:])}"


def _memory(op: str, device: torch.device) -> Path:
    """The file of the verdicts that hold for this op in this environment."""
    digest = hashlib.sha256(json.dumps(_environment(op, device), sort_keys=True).encode()).hexdigest()[:16]
    return _folder() / "checked" / f"{op}-{digest}.json"


def _environment(op: str, device: torch.device) -> dict[str, str]:
    return {
        "seqlong": __version__,
        "torch": torch.__version__,
        "triton": triton_version(),
        "gpu": _name(device),
        "source": _source(op),
    }


@lru_cache
def _source(op: str) -> str:
    """A digest of the files that the op is made of, those of ops that it borrows from, and those that check it."""
    from seqlong.kernels import probes

    here = Path(__file__).parent
    own = sorted((here / probes.folder(op)).glob("*.py"))
    said = "".join(path.read_text(encoding="utf-8") for path in own)
    lent = sorted(set(re.findall(r"^\s*from seqlong\.kernels\.(\w+)[. ]", said, re.MULTILINE)))
    digest = hashlib.sha256()
    for path in [
        *own,
        *(file for name in lent for file in sorted((here / name).glob("*.py"))),
        *sorted(here.glob("*.py")),
    ]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _verdicts_saved(path: Path) -> dict[str, str | None]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["verdicts"]
    except (OSError, ValueError, LookupError, TypeError):  # none yet, or damaged: a check is all that it costs
        return {}
    return found if isinstance(found, dict) else {}


@lru_cache
def triton_version() -> str:
    """The version of Triton, or ``none``."""
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def _indexed(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


@lru_cache
def _name(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return device.type


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _running.clear()


os.register_at_fork(after_in_child=_after_fork)
