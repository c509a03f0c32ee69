"""The verb ``seqlong harness``: lm-evaluation-harness on a model of text, with carried states: nothing is cut off."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from seqlong.datamodules.text.vocabulary import Vocabulary, load_vocabulary
from seqlong.errors import ConfigError
from seqlong.inference.arguments import Parser, integer, open_model
from seqlong.inference.model import Model
from seqlong.state import BackboneState

log = logging.getLogger("seqlong")

HELP = """Runs tasks of lm-evaluation-harness (pip install 'seqlong[harness]') on a causal model of text. Contexts of
any length are read with the model's state: nothing is truncated, and a context of several answers is read once."""
EXAMPLES = """examples:
  seqlong harness lambada_openai,wikitext --ckpt last --limit 100
  seqlong harness my_task --include tasks/ --ckpt runs/books-... --output scores.json"""
#: Tokens that are read at once.
_PART = 1 << 15
#: Tokens that are written where a task sets no number.
_MOST = 256


class TextModel:
    """What a model of text is asked by the harness, in strings: log-likelihoods, and greedy continuations.

    Args:
        model: a causal language model.
        vocabulary: what it was trained with; texts begin with its ``bos``, if it has one.

    Raises:
        ConfigError: the model is not causal, or of another vocabulary.
    """

    def __init__(self, model: Model, vocabulary: Vocabulary) -> None:
        model.require("causal", why="lm-evaluation-harness")
        size = model.task.head.vocab_size
        if vocabulary.size > size:
            raise ConfigError(
                f"{model.path} has {size} tokens, but the tokenizer {vocabulary.size}; give the one that it was "
                "trained with"
            )
        self.model, self.vocabulary = model, vocabulary
        self._read: tuple[list[int], tuple[torch.Tensor, BackboneState] | None] = ([], None)

    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        """``ln p(continuation | context)``, and whether each of its tokens is the likeliest."""
        given, asked = self._pair(context, continuation)
        return self._score(given, asked)

    def score_whole(self, text: str) -> float:
        """``ln p(text)``, in one pass over it, whatever its length."""
        tokens = self.vocabulary.encode(text)
        given, asked = self._opened([], tokens)
        return self._score(given, asked)[0]

    def write(self, context: str, until: Sequence[str] = (), most: int = _MOST) -> str:
        """The likeliest token after the other, up to a string of ``until`` (left out), ``eos`` or ``most`` tokens."""
        given = self._start() + self.vocabulary.encode(context)
        if not given:
            raise ConfigError("the context is empty, and the tokenizer has no token that begins a text")
        last, state = self._after(given)
        written: list[int] = []
        text = ""
        while len(written) < most:
            token = int(last.argmax())
            if token == self.vocabulary.eos:
                break
            written.append(token)
            text = self.vocabulary.decode(written)
            ends = [text.index(stop) for stop in until if stop and stop in text]
            if ends:
                return text[: min(ends)]
            logits, after = self.model.logits(torch.tensor([[token]]), state)
            assert after is not None
            last, state = logits[0, -1], after
        return text

    def _start(self) -> list[int]:
        return [] if self.vocabulary.bos is None else [self.vocabulary.bos]

    def _opened(self, given: list[int], asked: list[int]) -> tuple[list[int], list[int]]:
        """Something to begin with, without which the first token cannot be asked."""
        given = self._start() + given
        return (given, asked) if given else (asked[:1], asked[1:])

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both. White space at the end of a context belongs to what follows, as tokenizers cut."""
        kept = context.rstrip()
        if kept and self.vocabulary.unit != "byte":
            continuation, context = context[len(kept) :] + continuation, kept
        given = self.vocabulary.encode(context)
        whole = self.vocabulary.encode(context + continuation)
        return self._opened(given, whole[len(given) :])

    def _score(self, given: list[int], asked: list[int]) -> tuple[float, bool]:
        if not asked:
            return 0.0, True
        last, state = self._after(given)
        nats = -last.double().log_softmax(0)[asked[0]].item()
        greedy = int(last.argmax()) == asked[0]
        for start in range(0, len(asked) - 1, _PART):
            tokens = torch.tensor([asked[start : start + _PART + 1]])
            logits, after = self.model.logits(tokens[:, :-1], state)
            assert after is not None
            targets = tokens[0, 1:].to(logits.device)
            nats -= logits[0].double().log_softmax(-1).gather(1, targets[:, None]).sum().item()
            greedy = greedy and bool((logits[0].argmax(-1) == targets).all())
            state = after
        return -nats, greedy

    def _after(self, given: list[int]) -> tuple[torch.Tensor, BackboneState]:
        """Logits ``(y)`` and state after some tokens; what was read last time is not read again."""
        if self._read[0] != given or self._read[1] is None:
            state = self.model.initial_state()
            hidden = None
            for start in range(0, len(given), _PART):
                hidden, after = self.model.hidden(torch.tensor([given[start : start + _PART]]), state)
                assert after is not None
                state = after
            assert hidden is not None
            with torch.no_grad(), self.model.products():
                self._read = (given, (self.model.task.head.logits(hidden[:, -1:])[0, -1], state))
        found = self._read[1]
        assert found is not None
        return found


def harness_model(text_model: TextModel) -> Any:
    """A ``lm_eval.api.model.LM``, for ``lm_eval.simple_evaluate(model=...)``.

    Raises:
        ConfigError: lm_eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed: pip install 'seqlong[harness]'")
    from lm_eval.api.model import LM

    class SeqlongLM(LM):  # type: ignore[misc]
        """Requests of the harness, one after the other; those of one context side by side."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            order = sorted(range(len(requests)), key=lambda number: requests[number].args[0])
            found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            for number in _shown(order, "Asking"):
                found[number] = text_model.score(*requests[number].args)
                self.cache_hook.add_partial("loglikelihood", requests[number].args, found[number])
            return found

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [text_model.score_whole(one.args[0]) for one in _shown(requests, "Reading")]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [_written(text_model, *one.args) for one in _shown(requests, "Writing")]

    return SeqlongLM()


def _written(text_model: TextModel, context: str, settings: dict[str, Any]) -> str:
    if settings.get("do_sample") and float(settings.get("temperature", 1.0)) > 0:
        raise ConfigError(
            "this task draws its answers; seqlong harness writes the likeliest: set do_sample=false in it"
        )
    until = settings.get("until") or []
    most = int(settings.get("max_gen_toks", _MOST))
    return text_model.write(context, [until] if isinstance(until, str) else list(until), most)


def _shown(things: Sequence[Any], what: str) -> Iterable[Any]:
    return track(things, what, console=Console(stderr=True), disable=not sys.stderr.isatty())


def command(words: Sequence[str]) -> int:
    """Serve the verb; returns the exit status."""
    parser = Parser("harness", HELP, EXAMPLES)
    parser.add_argument("tasks", help="names of tasks, with commas")
    parser.add_model()
    parser.add_argument("--tokenizer", help="tokenizer.json, where it is not where it was in training")
    parser.add_argument("--include", help="folder of your own tasks (YAML of the harness)")
    parser.add_argument("--limit", type=integer, help="documents of each task; all if not given")
    parser.add_argument("--shots", type=int, help="examples before each question; as the task says if not given")
    parser.add_argument("--output", help="JSON of all scores")
    given = parser.parse_args(list(words))
    model = open_model(given)
    settings = (model.config.get("data") or {}).get("init_args") or {}
    tokenizer = given.tokenizer or settings.get("tokenizer")
    if not tokenizer or ".text" not in str((model.config.get("data") or {}).get("class_path")):
        raise ConfigError(f"{model.path} was not trained on text, which lm-evaluation-harness asks in")
    asked = harness_model(TextModel(model, load_vocabulary(str(tokenizer), settings.get("bos"), settings.get("eos"))))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=given.include)
    names = [name for name in given.tasks.split(",") if name]
    if unknown := [name for name in names if name not in tasks.all_tasks]:
        raise ConfigError(f"lm-evaluation-harness has no task '{unknown[0]}'; lm-eval ls tasks lists them")
    found = simple_evaluate(
        model=asked, tasks=names, num_fewshot=given.shots, limit=given.limit, task_manager=tasks, bootstrap_iters=0
    )
    table = Table("task", "measure", "value")
    for name, scores in found["results"].items():
        for measure, value in scores.items():
            if isinstance(value, float):
                table.add_row(name, measure.removesuffix(",none"), f"{value:.4f}")
    Console().print(table)
    if given.output:
        Path(given.output).write_text(json.dumps(found["results"], indent=1, default=str), encoding="utf-8")
        print(given.output)
    return 0
