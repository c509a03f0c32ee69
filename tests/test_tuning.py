"""Tuned configurations: which file wins, what a damaged one does, and that no wrong kernel is ever used."""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seqlong.errors import SeqlongError
from seqlong.kernels import probes, tuning
from seqlong.kernels.tuning import Config, settle

DEFAULT: Config = {"chunk": 64, "warps": 4, "fast": False}
KEY = "bf16 k64 v64"


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's own file, in a folder of this test, and a process that has settled nothing yet."""
    path = tmp_path / "tuned" / "own.json"
    path.parent.mkdir()
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    monkeypatch.setenv("SEQLONG_CACHE", str(tmp_path))
    path.write_text("{}")
    new_process()
    yield path
    new_process()


def new_process() -> None:
    tuning.forget()
    tuning._verdicts.clear()
    tuning._complained.clear()


def write(path: Path, config: Config, op: str = "op") -> None:
    path.write_text(json.dumps({"about": {"gpu": "x"}, op: {KEY: config}}))


class Checker:
    """A check that counts, and finds fault with some configurations."""

    def __init__(self, bad: Callable[[Config], bool] = lambda config: False) -> None:
        self.bad, self.seen = bad, []

    def __call__(self, config: Config) -> str | None:
        self.seen.append(config)
        return "the result o has a relative error of 0.5" if self.bad(config) else None


def test_key_names_types_and_widths() -> None:
    assert tuning.key(torch.bfloat16, k=64, v=128, shared=True, packed=False) == "bf16 k64 v128 shared"
    assert tuning.parse_key("bf16 k64 v128 shared") == (torch.bfloat16, {"k": 64, "v": 128}, {"shared"})
    with pytest.raises(ValueError, match="begins with 'k64'; expected one of bf16"):
        tuning.parse_key("k64")


def test_own_file_over_shipped_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.VARIABLE)
    monkeypatch.setenv("SEQLONG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning, "_name", lambda device: "NVIDIA H100 80GB HBM3")
    (tmp_path / "shipped").mkdir()
    device = torch.device("cuda", 0)
    assert tuning.lookup("op", KEY, DEFAULT, device) == DEFAULT, "an unknown GPU gets the default"
    write(tmp_path / "shipped" / "h100.json", {"chunk": 128})
    tuning.forget()
    assert tuning.lookup("op", KEY, DEFAULT, device) == {**DEFAULT, "chunk": 128}
    assert tuning.lookup("op", "bf16 k32 v32", DEFAULT, device) == DEFAULT
    saved = tuning.save(device, {"op": {KEY: {"chunk": 32, "fast": True}}}, {"gpu": "x"})
    assert saved == tmp_path / "cache" / "tuned" / "h100.json"
    assert tuning.lookup("op", KEY, DEFAULT, device) == {"chunk": 32, "warps": 4, "fast": True}
    tuning.save(device, {"op": {"bf16 k16 v16": {"chunk": 16}}}, {"gpu": "x"})
    assert tuning.lookup("op", KEY, DEFAULT, device)["chunk"] == 32, "what was tuned before stays"
    assert tuning.lookup("op", KEY, DEFAULT, "cpu") == DEFAULT


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('{"op": {\n  "bf16 k64 v64": {"chunk": 32},,\n}}', 2, "is not JSON"),
        ("[1]", 1, "expected a dictionary of ops"),
        ('{\n"other": {},\n"op": 3}', 3, "expected a dictionary of keys"),
        ('{"op": {\n"bf16 k64 v64": [32]}}', 2, "expected numbers, words, true or false"),
        ('{"op": {"bf16 k64 v64": {"chunk": 32,\n"warps": "four"}}}', 2, "'warps' is \"four\"; expected {'chunk': 64"),
        ('{"op": {"bf16 k64 v64": {\n"chunks": 32}}}', 2, "'chunks' is 32; expected"),
        ('{"op": {"bf16 k64 v64": {\n"warps": true}}}', 2, "'warps' is true; expected"),
    ],
)
def test_a_damaged_file_gives_one_warning_and_the_default(own: Path, text: str, line: int, said: str) -> None:
    own.write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert tuning.lookup("op", KEY, DEFAULT, "cpu") == DEFAULT
            tuning.lookup("elsewhere", KEY, DEFAULT, "cpu")
    (warning,) = [str(warning.message) for warning in caught]
    assert warning.startswith(f"{own}:{line}: ") and said in warning
    assert "mend it, or delete the file" in warning


def test_a_named_file_that_is_missing_is_said(own: Path) -> None:
    own.unlink()
    with pytest.warns(UserWarning, match="SEQLONG_TUNED names .*, which does not exist"):
        assert tuning.lookup("op", KEY, DEFAULT, "cpu") == DEFAULT


def test_tuning_does_not_overwrite_a_file_that_it_cannot_read(own: Path) -> None:
    own.write_text("{,")
    with pytest.raises(SeqlongError, match=r"own\.json:1: is not JSON"):
        tuning.save("cpu", {"op": {KEY: DEFAULT}}, {})
    assert own.read_text() == "{,"


def test_a_right_configuration_is_checked_once(own: Path) -> None:
    write(own, {"chunk": 32})
    check = Checker()
    for _ in range(3):
        assert settle("op", KEY, DEFAULT, "cpu", check) == {**DEFAULT, "chunk": 32}
    assert check.seen == [{**DEFAULT, "chunk": 32}]
    (used,) = tuning.in_use()
    assert (used.source, used.checked, used.config) == ("own", True, {**DEFAULT, "chunk": 32})


def test_a_wrong_configuration_is_discarded_with_one_warning(own: Path) -> None:
    write(own, {"chunk": 32})
    check = Checker(lambda config: config["chunk"] == 32)
    with pytest.warns(RuntimeWarning) as caught:
        assert [settle("op", KEY, DEFAULT, "cpu", check) for _ in range(3)] == [DEFAULT] * 3
    (message,) = [str(warning.message) for warning in caught]
    for part in ("op: the own configuration", '"chunk": 32', KEY, f"Triton {tuning.triton_version()}", "error of 0.5"):
        assert part in message
    assert "The default is used instead" in message
    assert [config["chunk"] for config in check.seen] == [32, 64]


def test_chunked_is_the_last_resort(own: Path) -> None:
    write(own, {"chunk": 32})
    with pytest.warns(RuntimeWarning) as caught:
        assert [settle("op", KEY, DEFAULT, "cpu", Checker(lambda config: True)) for _ in range(3)] == [None] * 3
    assert len(caught) == 2 and "Op runs as chunked instead" in str(caught[1].message)


def test_trusted_says_so_and_warns(own: Path) -> None:
    assert tuning.trusted("op", KEY, DEFAULT, "cpu", Checker())
    with pytest.warns(RuntimeWarning, match="It is not used"):
        assert not tuning.trusted("op", KEY, {"chunk": 1}, "cpu", Checker(lambda config: True))


def test_what_a_compiler_throws_is_a_verdict(own: Path) -> None:
    def check(config: Config) -> str | None:
        raise AssertionError("at 3:4:\n  a = tl.dot(b, c)\n\nPassManager::run failed\n")

    with pytest.warns(RuntimeWarning, match=r"AssertionError: at 3:4: \.\.\. PassManager::run failed\. "):
        assert settle("op", KEY, DEFAULT, "cpu", check) is None


def test_no_memory_is_no_verdict(own: Path) -> None:
    def check(config: Config) -> str | None:
        raise torch.OutOfMemoryError("full")

    assert settle("op", KEY, DEFAULT, "cpu", check) == DEFAULT
    good = Checker()
    assert settle("op", KEY, DEFAULT, "cpu", good) == DEFAULT and good.seen, "asked again when there is memory"


def test_the_next_process_does_not_check_again(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(own, {"chunk": 32})
    with pytest.warns(RuntimeWarning):
        settle("op", KEY, DEFAULT, "cpu", Checker(lambda config: config["chunk"] == 32))
    new_process()
    again = Checker()
    with pytest.warns(RuntimeWarning, match="found by an earlier process; delete .*checked.*json to check again"):
        assert settle("op", KEY, DEFAULT, "cpu", again) == DEFAULT
    assert again.seen == []
    for change in ("_source", "triton_version"):
        new_process()
        monkeypatch.setattr(tuning, change, lambda *_, change=change: f"another {change}")
        again = Checker()
        assert settle("op", KEY, DEFAULT, "cpu", again) == {**DEFAULT, "chunk": 32}
        assert len(again.seen) == 1, f"{change}: another kernel, another check"


def test_the_digest_covers_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernel.py").write_text("a = 1")
    monkeypatch.setattr(probes, "folder", lambda op: tmp_path)
    tuning._source.cache_clear()
    before = tuning._source("op")
    (tmp_path / "kernel.py").write_text("a = 2")
    tuning._source.cache_clear()
    assert tuning._source("op") != before
    tuning._source.cache_clear()


def test_the_digest_covers_what_a_kernel_borrows(monkeypatch: pytest.MonkeyPatch) -> None:
    """log_linear runs scalar_decay's kernels."""
    read: list[str] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(str(path)) or real(path))
    tuning._source.cache_clear()
    tuning._source("log_linear")
    tuning._source.cache_clear()
    for part in ("log_linear/by_level.py", "scalar_decay/plan.py", "kernels/probes.py"):
        assert any(path.endswith(part) for path in read), part
    assert not any("/norm/" in path for path in read)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"verdicts": 3}'])
def test_damaged_verdicts_cost_a_check(own: Path, content: str) -> None:
    settle("op", KEY, DEFAULT, "cpu", Checker())
    (memory,) = (own.parent / "checked").glob("op-*.json")
    memory.write_text(content)
    new_process()
    check = Checker()
    assert settle("op", KEY, DEFAULT, "cpu", check) == DEFAULT and len(check.seen) == 1


def test_works_where_nothing_can_be_written(own: Path) -> None:
    (own.parent / "checked").write_text("a file where the folder should be")
    check = Checker()
    assert [settle("op", KEY, DEFAULT, "cpu", check) for _ in range(2)] == [DEFAULT] * 2
    assert len(check.seen) == 1


def test_the_check_may_call_the_op(own: Path) -> None:
    write(own, {"chunk": 32})
    asked: list[Config | None] = []

    def check(config: Config) -> str | None:
        asked.append(settle("op", KEY, DEFAULT, "cpu", check))
        asked.append(settle("another", KEY, {"x": 1}, "cpu", check))
        return None

    assert settle("op", KEY, DEFAULT, "cpu", check) == {**DEFAULT, "chunk": 32}
    assert asked == [{**DEFAULT, "chunk": 32}, {"x": 1}]


def test_the_check_is_free_of_the_callers_modes(own: Path) -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def check(config: Config) -> str | None:
        x = torch.ones(3, requires_grad=True)
        (x * 2).sum().backward()
        assert isinstance(x.grad, Tensor)
        autocast = torch.is_autocast_enabled("cpu")
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast))
        return None

    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert settle("op", KEY, DEFAULT, "cpu", check) == DEFAULT
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(True, False, False)]


def _scale(config: str | None) -> int:
    return 1 if config is None else json.loads(config)["chunk"]


_checks: list[Config] = []


def _check(config: Config) -> str | None:
    _checks.append(config)
    return None


def test_settles_while_a_compiler_traces(own: Path) -> None:
    write(own, {"chunk": 32})
    _checks.clear()

    def op(x: Tensor) -> Tensor:
        config = settle("op", tuning.key(torch.bfloat16, k=x.shape[-1], v=64), DEFAULT, x.device, _check)
        return x if config is None else x * int(config["chunk"])

    compiled = torch.compile(op, fullgraph=True, backend="eager")
    x = torch.ones(2, 64, requires_grad=True)
    assert torch.equal(compiled(x), 32 * x) and torch.equal(compiled(x), 32 * x)
    assert len(_checks) == 1


def test_nothing_is_checked_while_a_graph_is_recorded(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Checker(lambda config: True)
    with monkeypatch.context() as recorded:
        recorded.setattr(tuning, "_busy", lambda device: True)
        assert settle("op", KEY, DEFAULT, "cpu", check) == DEFAULT
    assert check.seen == []
    with pytest.warns(RuntimeWarning):
        assert settle("op", KEY, DEFAULT, "cpu", check) is None, "and it was not remembered"


def test_threads_wait_for_one_check(own: Path) -> None:
    check, found = Checker(), []
    begin = threading.Event()

    def slow(config: Config) -> str | None:
        begin.wait(5)
        return check(config)

    threads = [threading.Thread(target=lambda: found.append(settle("op", KEY, DEFAULT, "cpu", slow))) for _ in range(6)]
    for thread in threads:
        thread.start()
    begin.set()
    for thread in threads:
        thread.join(20)
    assert found == [DEFAULT] * 6 and len(check.seen) == 1


def test_a_backward_pass_does_not_wait_for_the_check_that_it_is_part_of(own: Path) -> None:
    """On a GPU the backward pass of the check runs in a thread that knows nothing of the check."""
    found: list[Config | None] = []

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 2

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            forced, tuning._local.forced = tuning._local.forced, None  # as in another thread
            found.append(settle("op", KEY, DEFAULT, "cpu", check))
            tuning._local.forced = forced
            return grad

    def check(config: Config) -> str | None:
        Op.apply(torch.ones(2, requires_grad=True)).sum().backward()
        return None

    done = threading.Thread(target=lambda: settle("op", KEY, DEFAULT, "cpu", check), daemon=True)
    done.start()
    done.join(10)
    assert not done.is_alive() and found == [DEFAULT]


def test_candidates_reach_the_backward_pass() -> None:
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 2

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            forced, tuning._local.forced = tuning._local.forced, None
            found.append(settle("op", KEY, DEFAULT, "cpu"))
            tuning._local.forced = forced
            return grad

    found: list[Config | None] = []
    with tuning.using("op", {"chunk": 16}, KEY):
        Op.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert found == [{**DEFAULT, "chunk": 16}]
    assert settle("op", KEY, DEFAULT, "cpu") == DEFAULT


def test_a_check_reaches_its_own_backward_pass(own: Path) -> None:
    """``--tune`` checks configurations that no file names: forward and backward must not use different ones."""
    found: list[Config | None] = []

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 2

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            forced, tuning._local.forced = tuning._local.forced, None
            found.append(settle("op", KEY, DEFAULT, "cpu"))
            tuning._local.forced = forced
            return grad

    def check(config: Config) -> str | None:
        Op.apply(torch.ones(2, requires_grad=True)).sum().backward()
        return None

    candidate: Config = {**DEFAULT, "chunk": 8}
    assert tuning.trusted("op", KEY, candidate, "cpu", check)
    assert found == [candidate]
    assert settle("op", KEY, DEFAULT, "cpu") == DEFAULT, "and nothing of it stays"


def _child(queue) -> None:  # type: ignore[no-untyped-def]
    queue.put(settle("op", KEY, DEFAULT, "cpu", Checker()))


def test_a_forked_child_does_not_inherit_a_held_lock(own: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with tuning._lock:
        child = context.Process(target=_child, args=(queue,))
        child.start()
    try:
        assert queue.get(timeout=20) == DEFAULT
    finally:
        child.join(5)
        if child.is_alive():
            child.kill()


def test_shipped_files_are_sound() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in sorted(tuning.SHIPPED.glob("*.json")):
            for op, configs in tuning._read(path).items():
                assert op in probes.PROBES
                for key in configs:
                    tuning.parse_key(key)
    assert {path.stem for path in tuning.SHIPPED.glob("*.json")} >= {"h100", "h200"}


# -- The check that ops get by default ---------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An op y = x², whose 'triton' form has a setting that spoils it."""
    module = types.ModuleType("ops.toy")
    module.OFFERED = {"triton": "", "chunked": "", "reference": ""}  # type: ignore[attr-defined]

    def toy(x: Tensor, implementation: str | None = None) -> Tensor:
        if implementation != "triton":
            return x * x
        config = settle("toy", "bf16 d8", {"spoil": "nothing"}, x.device)
        spoil = None if config is None else config["spoil"]
        if spoil == "output":
            return x * x + torch.where(torch.arange(8, device=x.device) == 3, 0.3, 0.0).to(x.dtype)
        if spoil == "gradient":
            return (x * x).detach() + (x - x.detach())
        if spoil == "nan":
            return x * x / (x - x)
        return (x.float() * x.float()).to(x.dtype)

    toy.__module__ = module.__name__
    module.toy = toy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    made = lambda draw: probes.Inputs({"x": draw.normal(draw.rows, draw.length, draw.sizes["d"])})  # noqa: E731
    monkeypatch.setitem(probes.PROBES, "toy", probes.Probe("toy", "ops.toy", made, ("y",), {"d": 8}, {"d": 8}))
    return module


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("nothing", None),
        ("output", "the result y has a relative error of 0.0"),
        ("gradient", "the gradient of x has a relative error of"),
        ("nan", "is not finite"),
    ],
)
def test_self_check_finds_a_wrong_kernel(toy: types.ModuleType, spoil: str, said: str | None) -> None:
    with tuning.using("toy", {"spoil": spoil}):
        found = probes.self_check("toy", "bf16 d8", "cpu")
    assert found is None if said is None else (found is not None and said in found), found


def test_a_wrong_kernel_is_not_used(toy: types.ModuleType, own: Path) -> None:
    """From end to end: the user's file names a configuration whose gradient is wrong."""
    own.write_text(json.dumps({"toy": {"bf16 d8": {"spoil": "gradient"}}}))
    check = tuning._default_check("toy", "bf16 d8", torch.device("cpu"))
    with pytest.warns(RuntimeWarning, match="toy: the own configuration .*gradient of x has a relative error"):
        assert settle("toy", "bf16 d8", {"spoil": "nothing"}, "cpu", check) == {"spoil": "nothing"}


def test_the_words_of_a_key_say_which_case_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def error(_probe: probes.Probe, way: str, *_on: object, case: str, **_settings: object) -> dict[str, float]:
        seen.append(case)
        return {"o": 1.0 if (case, way) == ("channels", "triton") else 0.0}

    monkeypatch.setattr(probes, "error", error)
    assert probes.self_check("vector_decay", "bf16 k64 v64 lower_bound", "cpu") is None
    assert probes.self_check("delta_rule", "bf16 k128 v128", "cpu") is None
    assert seen == ["lower_bound", "plain"]
    assert probes.self_check("delta_rule", "bf16 k128 v128 channels", "cpu") is not None, "KDA's kernels are wrong"
