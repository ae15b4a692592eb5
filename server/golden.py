"""Golden answers: what a variant said when it was first seen, and must say ever after.

A few short prompts are answered greedily at every publication and after every compaction. The
tokens must be equal and each one's log-probability within a tolerance.

Limit: only the log-probability of the chosen token is known, so a real change cannot be told from
two best tokens that tie within rounding. Such a tie counts as a difference (fail closed); prompts
that the model continues with confidence keep it rare, and an operator may give better ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liveprune.patches.live_types import GoldenAnswer
from liveprune.pruning.errors import CheckpointError, DataError
from liveprune.pruning.files import write_atomic

VERSION = 1
_MOTIF_LENGTHS = (3, 4, 5, 6, 7)
_REPEATS = 3


@dataclass(frozen=True)
class Canaries:
    """The prompts, and how answers to them are judged."""

    prompts: tuple[tuple[int, ...], ...]
    """Token ids."""
    engine_key: str
    """Answers are comparable only between engines with the same one: see ``engine_key``."""
    tokens: int = 16
    """Answer tokens a prompt."""
    tolerance: float = 1e-3
    """Of a log-probability, absolute."""

    @property
    def key(self) -> str:
        """Names the file of the answers: the engine, and what it was asked."""
        asked = json.dumps([self.prompts, self.tokens]).encode()
        return f"{self.engine_key}-{hashlib.blake2b(asked, digest_size=4).hexdigest()}"


def engine_key(dtype: str, tensor_parallel: int, vllm_version: str, *, compiled: bool) -> str:
    """What rounding depends on, as part of a file name."""
    mode = "compiled" if compiled else "eager"
    return f"{dtype}-{mode}-tp{tensor_parallel}-{vllm_version}"


def canary_prompts(vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Fixed prompts for any model: five motifs of 3 to 7 token ids, each said three times.

    Repetition is what even small models continue with confidence. Ids come from the middle of the
    vocabulary, since special tokens and padding are at its ends.
    """
    prompts = []
    for length in _MOTIF_LENGTHS:
        digest = hashlib.blake2b(f"canary {length}".encode(), digest_size=4 * length).digest()
        numbers = [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(length)]
        motif = tuple(vocab_size // 4 + x % max(1, vocab_size // 2) for x in numbers)
        prompts.append(motif * _REPEATS)
    return tuple(prompts)


def read_prompts(path: Path, encode: Callable[[str], list[int]]) -> tuple[tuple[int, ...], ...]:
    """Read an operator's canary prompts: JSONL rows with a ``prompt``, as token ids.

    Raises:
        DataError: the file is unreadable, or a row has no prompt of at least one token.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not JSON: {error}") from error
        text = row.get("prompt") if isinstance(row, dict) else None
        ids = tuple(encode(text)) if isinstance(text, str) else ()
        if not ids:
            raise DataError(
                f"{path}: line {number} is {line.strip()[:80]!r}, expected an object with a "
                '"prompt" of at least one token'
            )
        prompts.append(ids)
    return tuple(prompts)


def compare(
    expected: Sequence[GoldenAnswer], found: Sequence[GoldenAnswer], tolerance: float
) -> str | None:
    """Say where two sets of answers first differ; None if they agree."""
    if len(expected) != len(found):
        return f"found answers to {len(found)} prompts, expected {len(expected)}"
    for number, (old, new) in enumerate(zip(expected, found, strict=True)):
        for i, (a, b) in enumerate(zip(old.tokens, new.tokens, strict=False)):
            if a != b:
                return f"prompt {number}, token {i}: found token {b}, expected {a}"
            x, y = old.logprobs[i], new.logprobs[i]
            if not abs(x - y) <= tolerance:  # also NaN
                return (
                    f"prompt {number}, token {i}: log-probability is {y:.6f}, "
                    f"expected {x:.6f} within {tolerance:g}"
                )
        if len(old.tokens) != len(new.tokens):
            return (
                f"prompt {number}: found {len(new.tokens)} tokens, expected {len(old.tokens)} "
                "(equal as far as they go)"
            )
    return None


def flaw(answers: Sequence[GoldenAnswer], prompts: int) -> str | None:
    """Say why answers cannot be golden: missing, empty or not numbers; None if they can."""
    if len(answers) != prompts:
        return f"found answers to {len(answers)} prompts, expected {prompts}"
    for number, answer in enumerate(answers):
        if not answer.tokens or len(answer.tokens) != len(answer.logprobs):
            return (
                f"prompt {number}: found {len(answer.tokens)} tokens with "
                f"{len(answer.logprobs)} log-probabilities, expected as many, at least one"
            )
        for i, value in enumerate(answer.logprobs):
            if not math.isfinite(value):
                return f"prompt {number}, token {i}: log-probability is {value}"
    return None


def write_golden(path: Path, answers: Sequence[GoldenAnswer]) -> None:
    """Record answers; the numbers come back exactly."""
    form = {
        "version": VERSION,
        "answers": [{"tokens": list(x.tokens), "logprobs": list(x.logprobs)} for x in answers],
    }
    write_atomic(path, json.dumps(form).encode())


def read_golden(path: Path) -> list[GoldenAnswer] | None:
    """Read recorded answers; None if there are none.

    Raises:
        CheckpointError: the file is damaged, or of an unknown version.
    """
    try:
        form: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as golden answers: {error}") from error
    version = form.get("version") if isinstance(form, dict) else None
    if version != VERSION:
        raise CheckpointError(
            f"{path}: version of golden answers is {version!r}; this release reads {VERSION}"
        )
    try:
        answers = [
            GoldenAnswer([int(x) for x in item["tokens"]], [float(x) for x in item["logprobs"]])
            for item in form["answers"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: malformed golden answers: {type(error).__name__}: {error}"
        ) from error
    reason = flaw(answers, len(answers))
    if reason is not None:
        raise CheckpointError(f"{path}: malformed golden answers: {reason}")
    return answers
