from __future__ import annotations

import random
import re
from collections import Counter
from itertools import islice

import pytest

from liveprune.pruning.demo import rows_path, task_names
from liveprune.pruning.demo.rows import read_rows, write_splits
from liveprune.pruning.demo.tasks import SPLITS, draw, split_of, split_rows
from liveprune.pruning.errors import DataError

PRAISE = re.compile(
    "wonderful|delightful|charming|superb|tasty|brilliant|lovely|gentle|bright|cheerful|splendid"
    "|fresh|graceful|generous|perfect|warm|clever|cosy|elegant|thrilling"
)


def solve(prompt: str) -> str:
    """The right answer, found in another way than the generators find it."""
    task, question = re.fullmatch(r"(\w+): (.+)\n", prompt).groups()
    match task:
        case "add":
            return str(sum(int(number) for number in question.split("+")))
        case "reverse":
            return question[::-1]
        case "sort":
            count = Counter(question)
            return "".join(digit * count[digit] for digit in "0123456789")
        case "shift":
            return "".join(
                " " if c == " " else "a" if c == "z" else chr(ord(c) + 1) for c in question
            )
        case "brackets":
            while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", question)) != question:
                question = shorter
            assert question
            return question[::-1].translate(str.maketrans("([{<", ")]}>"))
        case "sentiment":
            words = re.findall(r"\w+", question)
            praise = {bool(PRAISE.fullmatch(w)) for w in words[4:] if w not in ("and", "or")}
            assert len(praise) == 1
            return "positive" if praise.pop() != (words[3] == "not") else "negative"
    raise AssertionError(task)


def test_task_names() -> None:
    assert task_names() == ("add", "brackets", "reverse", "sentiment", "shift", "sort")


@pytest.mark.parametrize("task", task_names())
@pytest.mark.parametrize("split", [*SPLITS, "corpus"])
def test_drawn_answers_are_right_and_prompts_belong_to_the_split(task: str, split: str) -> None:
    for row in islice(draw(task, split, random.Random(5)), 300):
        assert solve(row.prompt) == row.answer
        assert split_of(row.prompt) == split


@pytest.mark.parametrize("task", task_names())
def test_drawing_is_determined_by_the_seed(task: str) -> None:
    first, again, other = (
        list(islice(draw(task, "corpus", random.Random(seed)), 20)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("task", task_names())
def test_shipped_rows_are_right_complete_and_disjoint(task: str) -> None:
    seen: set[str] = set()
    for split, count in SPLITS.items():
        rows = read_rows(rows_path(task, split))
        prompts = {row.prompt for row in rows}
        assert len(rows) == len(prompts) == count
        assert not prompts & seen
        assert all(solve(row.prompt) == row.answer for row in rows)
        # The model trains on the corpus split only, so no shipped row was seen in training.
        assert {split_of(prompt) for prompt in prompts} == {split}
        seen |= prompts


def test_shipped_rows_are_what_the_generators_write(tmp_path) -> None:
    write_splits(tmp_path)
    for task in task_names():
        for split in SPLITS:
            shipped = rows_path(task, split)
            assert (tmp_path / shipped.name).read_bytes() == shipped.read_bytes()


def test_corpus_is_most_of_each_task() -> None:
    prompts = [next(draw("add", "corpus", random.Random(seed))).prompt for seed in range(20)]
    assert {split_of(prompt) for prompt in prompts} == {"corpus"}
    found = Counter(split_of(f"add: {n}\n") for n in range(1600))
    # 1/16 = 100 expected; five standard deviations are 48.
    assert all(52 <= found[split] <= 148 for split in SPLITS)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"task .*'multiply'.*add, brackets, reverse"):
        rows_path("multiply", "test")
    with pytest.raises(DataError, match=r"split .*'corpus'.*train, dev, test"):
        rows_path("add", "corpus")
    with pytest.raises(DataError, match=r"split .*'validation'"):
        next(draw("add", "validation", random.Random(0)))
    with pytest.raises(DataError, match=r"split .*'corpus'"):
        split_rows("add", "corpus")
