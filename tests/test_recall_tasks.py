"""Recall tasks: answers by brute force from the row, rows that are functions of their numbers, chance, limits."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from seqlong.datamodules.dna.alphabet import N
from seqlong.datamodules.synthetic import (
    MQAR,
    CommonWords,
    Copy,
    DnaNeedle,
    FrequentWords,
    GapMQAR,
    Induction,
    KeyedCopy,
    Needle,
    Phonebook,
    RecallTask,
    RewriteMQAR,
    Rows,
    SelectiveCopy,
    VariableTracking,
)
from seqlong.datamodules.synthetic.draw import Draw
from seqlong.datamodules.synthetic.language import WORDS, words
from seqlong.errors import ConfigError, DataError, SeqlongError

ROWS = 12


def rows(task: RecallTask, length: int, seed: int = 0) -> Rows:
    return task.rows(Draw(np.arange(ROWS), seed), length)


def text(tokens: np.ndarray) -> str:
    assert tokens.min() >= 4
    return (tokens - 4).astype(np.uint8).tobytes().decode()


def answers(made: Rows, row: int) -> list[list[int]]:
    """The tokens of each answer of a row, in order."""
    return [made.targets[row][made.answer[row] == n].tolist() for n in range(made.answer[row].max() + 1)]


# --- each task by brute force -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "tells", "length"), [(1, 1, 4), (5, 3, 41), (16, 2, 256)])
def test_rewritten_keys_answer_with_their_last_value(pairs: int, tells: int, length: int) -> None:
    made = rows(RewriteMQAR(pairs, tells, 64), length)
    for row in range(ROWS):
        told, place = {}, {}
        for at in range(0, 2 * pairs * tells, 2):
            told[made.tokens[row, at]], place[made.tokens[row, at]] = made.tokens[row, at + 1], at + 1
        assert len(told) == pairs
        asked = np.flatnonzero(made.targets[row] >= 0)
        assert sorted(made.tokens[row, asked]) == sorted(told) and asked.min() >= 2 * pairs * tells
        assert [told[key] for key in made.tokens[row, asked]] == made.targets[row, asked].tolist()
        assert [place[key] for key in made.tokens[row, asked]] == made.told[row, asked].tolist()
    if tells > 1:
        firsts = made.tokens[:, 1 : 2 * pairs : 2]
        assert (np.diff(np.sort(made.told[made.told >= 0])) >= 0).all() and len(np.unique(firsts)) > 2


def test_gaps_are_what_they_are_said_to_be_and_cover_their_range() -> None:
    found = set()
    for seed in range(20):
        made = rows(GapMQAR(6, 256, shortest=3, longest=101), 300, seed)
        for row in range(ROWS):
            asked = np.flatnonzero(made.targets[row] >= 0)
            gaps = asked - made.told[row, asked]
            assert len(asked) == 6 and len(set(gaps.tolist())) == 1, "one distance a row"
            found.add(int(gaps[0]))
            for at, where in zip(asked, made.told[row, asked], strict=True):
                key = made.tokens[row, at]
                assert made.tokens[row, where - 1] == key and made.tokens[row, where] == made.targets[row, at]
                assert (made.tokens[row] == key).sum() == 2
    assert min(found) == 3 and max(found) > 80 and max(found) <= 101 and all(gap % 2 for gap in found)


def test_zoology_fills_with_zeros() -> None:
    made = rows(MQAR(4, 64, 0.01, "zero"), 64)
    assert ((made.tokens > 0).sum(axis=1) == 12).all()


def test_induction_answers_with_what_came_after() -> None:
    made = rows(Induction(16), 50)
    for row in range(ROWS):
        (first, last) = np.flatnonzero(made.tokens[row] == 0)
        assert last == 49 and made.targets[row, 49] == made.tokens[row, first + 1] and made.told[row, 49] == first + 1
        assert (made.targets[row, :49] == -1).all()
    places = [int(np.flatnonzero(rows(Induction(16), 5, seed).tokens[0] == 0)[0]) for seed in range(60)]
    assert set(places) == {0, 1, 2}, "the first may stand anywhere but where its answer would be the question"


@pytest.mark.parametrize("length", [2, 7, 64])
def test_copies_are_copies(length: int) -> None:
    made = rows(Copy(32), length)
    half = length // 2
    for row in range(ROWS):
        said = made.tokens[row, :half].tolist()
        assert 0 not in said and made.tokens[row, half] == 0
        assert made.targets[row, half : 2 * half].tolist() == said
        assert made.tokens[row, half + 1 : 2 * half].tolist() == said[:-1]


@pytest.mark.parametrize("noise", [1, 5])
def test_selective_copies_leave_the_noise_out(noise: int) -> None:
    made = rows(SelectiveCopy(7, 32, noise), 60)
    for row in range(ROWS):
        said = [token for token in made.tokens[row, :53].tolist() if token > noise]
        assert len(said) == 7 and made.targets[row, 53:].tolist() == said and (made.tokens[row, 53:] == 0).all()
        assert made.tokens[row, made.told[row, 53:]].tolist() == said
    assert len(np.unique(made.tokens[:, :53])) > 20 and (made.tokens[:, :53] == 0).sum() == 0


@pytest.mark.parametrize("key", ["prefix", "suffix"])
@pytest.mark.parametrize(("n", "k", "length", "vocab"), [(2, 4, 64, 8), (1, 1, 9, 5), (3, 2, 200, 4)])
def test_keyed_copies_follow_the_only_place_of_the_key(key: str, n: int, k: int, length: int, vocab: int) -> None:
    made = rows(KeyedCopy(key, n, k, vocab), length)  # type: ignore[arg-type]
    for row in range(ROWS):
        tokens = made.tokens[row].tolist()
        if key == "prefix":
            assert tokens[0] == 0
            wanted, body, ends = tokens[1 : n + 1], tokens[n + 1 : length - k], tokens[length - k]
            assert ends == 0
        else:
            mark = length - k - n
            wanted, body = tokens[mark + 1 : mark + 1 + n], tokens[:mark]
            assert tokens[mark] == 0
        assert 0 not in body
        found = [at for at in range(len(body) - n + 1) if body[at : at + n] == wanted]
        assert len(found) == 1, "the key stands once"
        answer = body[found[0] + n : found[0] + n + k]
        assert made.targets[row, length - k :].tolist() == answer and tokens[length - k + 1 :] == answer[:-1]
        shift = n + 1 if key == "prefix" else 0
        assert made.told[row, length - k :].tolist() == [shift + found[0] + n + i for i in range(k)]
        assert (made.answer[row, length - k :] == 0).all()


def _asked(made: Rows, row: int) -> tuple[str, str]:
    """The text before the first question and the questions, each with its last letter, which is a target only."""
    whole = text(made.tokens[row]) + text(made.targets[row, -1:])
    first = int(np.flatnonzero(made.targets[row] >= 0)[0])
    line = whole.rindex("\n", 0, first)
    return whole[:line], whole[line:]


@pytest.mark.parametrize("haystack", ["repeat", "book", "needles"])
@pytest.mark.parametrize(("keys", "values", "queries"), [(1, 1, 1), (4, 1, 2), (3, 2, 3)])
def test_needles_are_found_where_they_were_hidden(haystack: str, keys: int, values: int, queries: int) -> None:
    made = rows(Needle(haystack, keys, values, queries), 600)
    for row in range(ROWS):
        hay, questions = _asked(made, row)
        told: dict[str, list[str]] = {}
        for key, value in re.findall(r"secret of (\w{6}) is (\d{7})\. ", hay):
            told.setdefault(key, []).append(value)
        assert len(told) == made.items and all(len(value) == values for value in told.values())
        assert haystack == "needles" or len(told) == keys
        asked = re.findall(r"secrets? of (\w{6}) (?:is|are) ([\d, ]+)", questions)
        assert len(asked) == queries
        said = [value for key, _ in asked for value in told[key]]
        assert [text(np.array(one)) for one in answers(made, row)] == said
        assert all(value in listed for key, listed in asked for value in told[key])
        where = np.flatnonzero(made.targets[row] >= 0)
        assert (made.tokens[row, made.told[row, where]] == made.targets[row, where]).all(), "told where it says"


def test_identifiers_phone_books_and_passkeys() -> None:
    made = rows(Needle("needles", key="uuid", value="uuid"), 700)
    for row in range(ROWS):
        hay, questions = _asked(made, row)
        told = dict(re.findall(r"secret of ([0-9a-f-]{36}) is ([0-9a-f-]{36})\. ", hay))
        ((key, value),) = re.findall(r"secret of ([0-9a-f-]{36}) is ([0-9a-f-]{36})", questions)
        assert told[key] == value == text(np.array(answers(made, row)[0])) and len(told) >= 5
    book = rows(Phonebook(2, 4), 300)
    for row in range(ROWS):
        whole = text(book.tokens[row]) + text(book.targets[row, -1:])
        told = dict(re.findall(r"(?<!\?)\b(\w{6}): (\d{4})\n", whole))
        asked = re.findall(r"\?(\w{6}): (\d{4})", whole)
        assert len(asked) == 2 and all(told[name] == number for name, number in asked) and len(told) == book.items
        assert [text(np.array(one)) for one in answers(book, row)] == [number for _, number in asked]
    assert re.search(r"The secret of \w{6} is \d{5}\. ", text(rows(Needle("repeat", digits=5), 200).tokens[0]))


def test_short_numbers_are_for_training_only() -> None:
    task = Needle("repeat", digits=4, fewest=2)
    sizes = Counter()
    for part in range(3):
        made = task.rows(Draw(np.arange(60), 5, part=part), 100)
        for row in range(60):
            (said,) = re.findall(r"is (\d+)\. ", text(made.tokens[row]))
            assert [text(np.array(one)) for one in answers(made, row)] == [said] and said[0] != "0"
            sizes[part, len(said)] += 1
    assert min(sizes[0, size] for size in (2, 3, 4)) > 8 and sizes[1, 4] == sizes[2, 4] == 60
    assert task.chance() == 1 / 9000


@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (3, 2), (2, 0)])
def test_variables_hold_the_number_by_way_of_others(chains: int, hops: int) -> None:
    made = rows(VariableTracking(chains, hops, "book"), 700)
    for row in range(ROWS):
        hay, question = _asked(made, row)
        value: dict[str, str] = {}
        for name, given in re.findall(r"VAR (\w{6}) = ((?:VAR )?\w+)\. ", hay):
            value[name] = value[given[4:]] if given.startswith("VAR ") else given  # in the order of the text
        (number,) = re.findall(r"These hold (\d{5}):", question)
        said = [text(np.array(one)) for one in answers(made, row)]
        assert said == [name for name in value if value[name] == number] and len(said) == hops + 1
        assert len(value) == chains * (hops + 1)
        where = np.flatnonzero(made.targets[row] >= 0)
        assert (made.tokens[row, made.told[row, where]] == made.targets[row, where]).all()


def test_common_and_frequent_words_are_counted() -> None:
    made = rows(CommonWords(3, 6, 2), 500)
    for row in range(ROWS):
        hay, _ = _asked(made, row)
        counts = Counter(hay.split())
        assert sorted(set(counts.values())) == [2, 6]
        said = [text(np.array(one)) for one in answers(made, row)]
        assert said == [word for word in dict.fromkeys(hay.split()) if counts[word] == 6] and len(said) == 3
    made = rows(FrequentWords(3, 1.5, 50), 900)
    for row in range(ROWS):
        hay, _ = _asked(made, row)
        top = Counter(hay.split()).most_common(4)
        assert [text(np.array(one)) for one in answers(made, row)] == [word for word, _ in top[:3]]
        assert top[0][1] > top[1][1] > top[2][1] > top[3][1] and (made.told == -1).all()


@pytest.mark.parametrize("background", ["random", "file"])
def test_motifs_stand_once_and_are_asked_for(background: str, tmp_path: Path) -> None:
    source = background
    if background == "file":
        bases = "".join(np.random.default_rng(0).choice(list("ACGT"), 900)) + "N" * 40 + "ACGTTTGA" * 60
        source = str(tmp_path / "small.fa")
        Path(source).write_text(f">one\n{bases}\n>tiny\nACGT\n")
    made = rows(DnaNeedle(4, 2, 6, 3, source, str(tmp_path)), 300)
    unknown = 0
    for row in range(ROWS):
        line = "".join("....ACGTN"[token] for token in made.tokens[row]) + "....ACGTN"[made.targets[row, -1]]
        _, *asked = re.split(r"N(?=[ACGT]{9}(?:N|$))", line[-20:])
        assert len(asked) == 2
        hay = line[:-20]
        unknown += hay.count("N")
        for number, question in enumerate(asked):
            key, value = question[:6], question[6:]
            assert len([at for at in range(len(hay)) if hay.startswith(key, at)]) == 1, "the key stands once"
            assert hay[hay.index(key) + 6 :].startswith(value)
            assert ["....ACGTN"[token] for token in answers(made, row)[number]] == list(value)
        where = np.flatnonzero(made.targets[row] >= 0)
        assert (made.tokens[row, made.told[row, where]] == made.targets[row, where]).all()
    assert (unknown > 0) == (background == "file") and N == 8
    if background == "file":
        with pytest.raises(DataError, match=r"longest record has 1,420 bases, but a row needs 1,9\d\d"):
            DnaNeedle(1, 1, 8, 3, source, str(tmp_path)).rows(Draw(np.arange(1)), 2000)


# --- laws of all ------------------------------------------------------------------------------------------------------

ALL: list[tuple[RecallTask, int]] = [
    (MQAR(8, 64), 100),
    (RewriteMQAR(8, 2, 64), 100),
    (GapMQAR(4, 64), 100),
    (Induction(16), 40),
    (Copy(16), 40),
    (SelectiveCopy(5, 32, 4), 40),
    (KeyedCopy("prefix", 1, 2, 5), 60),
    (KeyedCopy("suffix", 1, 2, 5), 60),
    (Needle("book", 2), 300),
    (Needle("needles", queries=2), 300),
    (Phonebook(), 200),
    (VariableTracking(2, 1), 300),
    (CommonWords(2, 4, 1), 300),
    (FrequentWords(), 900),
    (DnaNeedle(3, 2, 5, 2), 100),
]
NAMES = [f"{type(task).__name__}-{number}" for number, (task, _) in enumerate(ALL)]


@pytest.mark.parametrize(("task", "length"), ALL, ids=NAMES)
def test_a_row_depends_on_its_number_alone(task: RecallTask, length: int) -> None:
    whole = task.rows(Draw(np.arange(30), 7), length)
    for chosen in ([11], [29, 3], list(range(20, 30))):
        part = task.rows(Draw(np.array(chosen), 7), length)
        for name in ("tokens", "targets", "told", "answer"):
            assert (getattr(part, name) == getattr(whole, name)[chosen]).all(), name
    assert len(np.unique(whole.tokens, axis=0)) == 30
    other = task.rows(Draw(np.arange(30), 8), length)
    assert (other.tokens != whole.tokens).any(axis=1).all()


@pytest.mark.parametrize(("task", "length"), ALL, ids=NAMES)
def test_rows_are_well_formed(task: RecallTask, length: int) -> None:
    made = rows(task, length)
    assert made.tokens.shape == made.targets.shape == made.told.shape == made.answer.shape == (ROWS, length)
    assert made.tokens.dtype == np.int64 and made.tokens.min() >= 0 and made.tokens.max() < task.vocab_size
    assert made.targets.max() < task.vocab_size and made.items >= 1
    assert ((made.answer >= 0) == (made.targets >= 0)).all() and (made.targets >= 0).any(axis=1).all()
    for row in range(ROWS):
        numbers = made.answer[row][made.answer[row] >= 0]
        assert (np.diff(numbers) >= 0).all() and set(numbers.tolist()) == set(range(numbers.max() + 1))
    said = task.describe()
    assert said["task"] and 0 < task.chance() < 1 and said["chance"] == task.chance()


@pytest.mark.parametrize(("task", "length"), ALL, ids=NAMES)
def test_rows_that_are_too_short_say_what_they_need(task: RecallTask, length: int) -> None:
    with pytest.raises(SeqlongError, match=r"need rows of [\d,]+ positions, found length 1"):
        task.rows(Draw(np.arange(2)), 1)
    # What the message asks for is enough, and the shortest rows that work are still right.
    short = next(size for size in range(1, 2000) if _fits(task, size))
    assert short <= length and (task.rows(Draw(np.arange(2)), short).targets >= 0).any()


def _fits(task: RecallTask, length: int) -> bool:
    try:
        task.rows(Draw(np.arange(2)), length)
    except ConfigError:
        return False
    return True


def test_guessing_is_right_as_often_as_chance_says() -> None:
    """Guesses drawn like the answers themselves: those of another seed's row."""
    for task, length in ((MQAR(8, 32), 64), (Induction(9), 20), (SelectiveCopy(8, 12, 3), 30), (Copy(5), 30),
                         (KeyedCopy("suffix", 2, 1, 9), 30), (DnaNeedle(2, 1, 5, 1), 60)):  # fmt: skip
        one, two = (task.rows(Draw(np.arange(600), seed), length) for seed in (1, 2))
        first, second = (np.concatenate([answers(m, row)[0][:1] for row in range(600)]) for m in (one, two))
        rate, chance = (first == second).mean(), task.chance()
        assert abs(rate - chance) < 4 * np.sqrt(chance * (1 - chance) / 600) + 1e-9, task.title


def test_depths_are_spread_over_the_whole_text() -> None:
    made = Needle("book").rows(Draw(np.arange(300), 3), 500)
    first = (made.targets >= 0).argmax(axis=1)
    depth = made.told[np.arange(300), first] / first
    assert (np.histogram(depth, 5, (0, 1))[0] > 30).all()


def test_very_long_rows() -> None:
    for task in (MQAR(4096, 16384), GapMQAR(), Needle("needles"), DnaNeedle(2)):
        made = task.rows(Draw(np.arange(1)), 131_072)
        assert made.tokens.shape == (1, 131_072) and (made.targets >= 0).any()


# --- draws and language -----------------------------------------------------------------------------------------------


def test_draws_without_replacement() -> None:
    draw = Draw(np.arange(4000))
    small = draw.distinct(4, 2)
    counts = Counter(map(tuple, small.tolist()))
    assert len(counts) == 12 and min(counts.values()) > 240, "every ordered pair alike"
    large = Draw(np.arange(50)).distinct(5000, 900)  # this many repeat, and are drawn again
    assert all(len(set(row)) == 900 for row in large.tolist()) and large.max() < 5000
    log_weight = np.log(np.array([0.7, 0.2, 0.1]))
    picked = Draw(np.arange(4000)).weighted(log_weight, 2)
    share = np.bincount(picked[:, 0], minlength=3) / 4000
    assert np.abs(share - [0.7, 0.2, 0.1]).max() < 0.03 and (picked[:, 0] != picked[:, 1]).all()
    second = (picked[picked[:, 0] == 0][:, 1] == 1).mean()
    assert abs(second - 2 / 3) < 0.04, "the second in proportion to what is left"


def test_words_are_different_and_six_letters_long() -> None:
    made = words(np.arange(0, WORDS, 37))
    assert len(set(made.tolist())) == len(made) and {len(word) for word in made.tolist()} == {6}


def test_a_text_of_the_user_is_the_haystack_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Wörter, viele Wörter. " * 40, encoding="utf-8")
    made = rows(Needle(str(path), 1), 300)
    raw = (made.tokens[0] - 4).astype(np.uint8).tobytes()
    assert "viele Wörter".encode() in raw and re.search(rb"The secret of \w{6} is \d{7}\. ", raw)
    (tmp_path / "bad.txt").write_bytes(b"fine\nnot \xff fine")
    with pytest.raises(DataError, match=r"bad\.txt:2: byte 0xff is not UTF-8"):
        rows(Needle(str(tmp_path / "bad.txt")), 300)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="holds no text"):
        rows(Needle(str(tmp_path / "empty.txt")), 300)
    with pytest.raises(DataError, match=r"there is no file nowhere\.txt; expected 'repeat', 'book'"):
        Needle("nowhere.txt")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Needle(keys=1, queries=2), "asks for 2 keys, but there are 1"),
        (lambda: Needle(digits=19), "digits of at most 18, found 19"),
        (lambda: Needle(digits=3, fewest=4), "needs fewest of 1 to digits, 3, and value: number; found fewest 4"),
        (lambda: Needle(value="word", fewest=1), "found fewest 1, value word"),
        (lambda: GapMQAR(shortest=9, longest=5), "longest 5 to be at least shortest 9"),
        (lambda: RewriteMQAR(tells=0), "needs tells of 1 or more, found 0"),
        (lambda: SelectiveCopy(4, 8, 6), "vocab_size of 9 or more, found 8"),
        (lambda: CommonWords(often=3, seldom=3), "needs often of 4 or more, found 3"),
        (lambda: DnaNeedle(key_bases=40), "key_bases of at most 31, found 40"),
        (lambda: DnaNeedle(motifs=20, key_bases=3), "too few keys of 3 bases for 20 motifs"),
        (lambda: DnaNeedle(key_bases=5).rows(Draw(np.arange(1)), 5000), "keys of 5 bases come by chance"),
        (lambda: Phonebook().with_items(3), "Phonebook has no number of entries to vary"),
        (lambda: Needle("book", queries=2, keys=2).with_items(1), "asks for 2 keys, but there are 1"),
    ],
)
def test_settings_that_do_not_fit(make, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=said):
        make()
