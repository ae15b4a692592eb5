"""The demo's task families: seeded generators of prompts with one exact answer each.

Every prompt belongs to exactly one split, chosen by a hash of its text, so the shipped train,
dev and test rows are disjoint from each other and from all that the model was trained on,
whichever seeds were used: the training corpus draws from the `corpus` split only.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from liveprune.pruning.errors import DataError

SPLITS = {"train": 500, "dev": 200, "test": 300}
"""Shipped splits and their rows per task; everything else is the `corpus` split."""

_BUCKETS = 16
_BUCKET_OF_SPLIT = {"train": 0, "dev": 1, "test": 2}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CLOSER = {"(": ")", "[": "]", "{": "}", "<": ">"}
_GOOD = _words(
    "wonderful delightful charming superb tasty brilliant lovely gentle bright "
    "cheerful splendid fresh graceful generous perfect warm clever cosy elegant thrilling"
)
_BAD = _words(
    "awful dreadful boring bitter clumsy gloomy rotten nasty stale "
    "rude broken ugly noisy horrid dull grim shabby painful tedious crooked"
)
_SUBJECTS = _words(
    "soup film hotel song book garden meal concert train waiter room story "
    "lecture coffee market cake museum ferry blanket neighbour bicycle painting "
    "breakfast library journey castle umbrella festival kitchen puppet sandwich theatre"
)
_ADVERBS = ("very", "rather", "truly", "quite", "simply", "really")


@dataclass(frozen=True)
class Row:
    """One question; `prompt` ends with a newline, and `answer` follows it directly."""

    prompt: str
    answer: str


def _add(rng: random.Random) -> Row:
    digits = rng.choices(range(10), k=rng.randint(3, 4))
    return Row(f"add: {'+'.join(map(str, digits))}\n", str(sum(digits)))


def _reverse(rng: random.Random) -> Row:
    letters = rng.choices(_LETTERS, k=rng.randint(3, 6))
    return Row(f"reverse: {' '.join(letters)}\n", " ".join(reversed(letters)))


def _sort(rng: random.Random) -> Row:
    digits = rng.choices("0123456789", k=rng.randint(4, 7))
    return Row(f"sort: {''.join(digits)}\n", "".join(sorted(digits)))


def _shift(rng: random.Random) -> Row:
    letters = rng.choices(_LETTERS, k=rng.randint(3, 6))
    following = (_LETTERS[(_LETTERS.index(letter) + 1) % len(_LETTERS)] for letter in letters)
    return Row(f"shift: {' '.join(letters)}\n", " ".join(following))


def _sentiment(rng: random.Random) -> Row:
    good = rng.random() < 0.5
    negated = rng.random() < 0.3
    # "not" speaks of both words: "not dull or stale" is praise.
    words = rng.sample(_GOOD if good != negated else _BAD, k=rng.randint(1, 2))
    said = (" or " if negated else " and ").join(words)
    degree = "not" if negated else rng.choice(_ADVERBS)
    answer = "positive" if good else "negative"
    return Row(f"sentiment: the {rng.choice(_SUBJECTS)} was {degree} {said}\n", answer)


def _brackets(rng: random.Random) -> Row:
    opened: list[str] = []
    text = ""
    for _ in range(rng.randint(3, 8)):
        if opened and rng.random() < 0.35:
            text += _CLOSER[opened.pop()]
        else:
            opened.append(rng.choice("([{<"))
            text += opened[-1]
    if not opened:
        opened.append(rng.choice("([{<"))
        text += opened[-1]
    return Row(f"brackets: {text}\n", "".join(_CLOSER[b] for b in reversed(opened)))


_TASKS: dict[str, Callable[[random.Random], Row]] = {
    "add": _add,
    "brackets": _brackets,
    "reverse": _reverse,
    "sentiment": _sentiment,
    "shift": _shift,
    "sort": _sort,
}


def task_names() -> tuple[str, ...]:
    """Names of the task families, sorted."""
    return tuple(_TASKS)


def require(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise `DataError` naming `kind` and what is known unless `name` is known."""
    names = tuple(known)
    if name not in names:
        raise DataError(f"unknown {kind} of the demo: {name!r}; expected one of {', '.join(names)}")


def split_of(prompt: str) -> str:
    """Split that owns a prompt: `train`, `dev`, `test` (1/16 each) or `corpus` (the rest)."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % _BUCKETS
    return next((s for s, owned in _BUCKET_OF_SPLIT.items() if owned == bucket), "corpus")


def draw(task: str, split: str, rng: random.Random) -> Iterator[Row]:
    """Endless rows of one task and split, repeats included, determined by the state of `rng`."""
    require("task", task, task_names())
    require("split", split, (*SPLITS, "corpus"))
    while True:
        row = _TASKS[task](rng)
        if split_of(row.prompt) == split:
            yield row


def split_rows(task: str, split: str, seed: int = 0) -> list[Row]:
    """The distinct rows of one shipped split, in the order drawn."""
    require("split", split, SPLITS)
    drawn = draw(task, split, random.Random(f"{task}.{split}.{seed}"))
    distinct: dict[Row, None] = {}
    while len(distinct) < SPLITS[split]:
        distinct[next(drawn)] = None
    return list(distinct)
