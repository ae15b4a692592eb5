"""Calibration rows: a JSONL file, checked, tokenised and batched.

One JSON object a line, in one of five forms; other keys are ignored:

* ``{"text": str}``
* ``{"messages": [{"role": str, "content": str}, ...]}``, through the tokenizer's chat template
* ``{"input_ids": [int, ...]}``, tokenised already
* ``{"prompt": str, "answer": str}``: the text is prompt + answer
* ``{"prompt": str, "choices": [str, ...], "answer": int}``: prompt + the right choice
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from liveprune.pruning.errors import DataError

TokenIds = npt.NDArray[np.int64]

FORMS = ("text", "messages", "input_ids", "prompt")
MAX_TOKENS = 2048
"""Default tokens per row; the rest of a longer row is cut off."""
MAX_ROWS = 1024
"""Default number of rows, counted from the top of the file."""
BATCH_TOKENS = 4096
"""Default tokens per batch, padding included."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to one length."""

    input_ids: TokenIds
    """[rows, length] int64; 0 where padded."""
    attention_mask: TokenIds
    """[rows, length] int64: 1 for a token of a row, 0 for padding."""
    indices: tuple[int, ...]
    """Which rows these are, by their place in the file."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokenised rows in the order of the file."""

    token_ids: tuple[TokenIds, ...]
    """One int64 vector a row, none empty."""

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.token_ids)

    @cached_property
    def digest(self) -> str:
        """Content digest, 32 hex digits: which tokens, in which rows."""
        state = hashlib.blake2b(digest_size=16)
        for row in self.token_ids:
            state.update(len(row).to_bytes(8, "little"))
            state.update(row.astype("<i8").tobytes())
        return state.hexdigest()

    def batches(self, batch_tokens: int = BATCH_TOKENS) -> tuple[Batch, ...]:
        """Rows sorted by length, longest first, in batches of at most ``batch_tokens``.

        Sorting keeps padding small; the longest batch comes first, so that lack of memory shows
        at once. A row longer than ``batch_tokens`` gets a batch of its own.
        """
        order = sorted(range(len(self.token_ids)), key=lambda i: (-len(self.token_ids[i]), i))
        batches = []
        while order:
            rows = max(1, batch_tokens // len(self.token_ids[order[0]]))
            batches.append(self._batch(tuple(order[:rows])))
            order = order[rows:]
        return tuple(batches)

    def _batch(self, indices: tuple[int, ...]) -> Batch:
        shape = (len(indices), max(len(self.token_ids[i]) for i in indices))
        input_ids = np.zeros(shape, np.int64)
        mask = np.zeros(shape, np.int64)
        for place, i in enumerate(indices):
            row = self.token_ids[i]
            input_ids[place, : len(row)] = row
            mask[place, : len(row)] = 1
        return Batch(input_ids, mask, indices)


def load_rows(
    path: Path,
    model: Path,
    *,
    vocab_size: int,
    max_tokens: int = MAX_TOKENS,
    max_rows: int = MAX_ROWS,
) -> Rows:
    """Read the first ``max_rows`` rows of a JSONL file; tokenise with ``model``'s tokenizer.

    Every row is checked before the tokenizer is loaded; a file of ``input_ids`` needs none.

    Raises:
        DataError: naming the file and the line, what was found and what was expected.
    """
    for name, value in (("max_tokens", max_tokens), ("max_rows", max_rows)):
        if value < 1:
            raise DataError(f"{name} is {value}, expected at least 1")
    contents = [(where, _content(row, where)) for where, row in read_jsonl(path, max_rows)]
    if not contents:
        raise DataError(f"{path}: found no rows, expected at least 1")
    is_text = any(not isinstance(content, np.ndarray) for _, content in contents)
    tokenizer = load_tokenizer(model) if is_text else None
    rows = [
        checked_ids(_encode(content, tokenizer, where)[:max_tokens], vocab_size, where)
        for where, content in contents
    ]
    return Rows(tuple(rows))


def read_jsonl(path: Path, max_rows: int | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield ``("FILE:LINE", object)`` for each line that is not blank.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable: {error}") from error
    found = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if max_rows is not None and found >= max_rows:
            return
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: found {type(row).__name__}, expected a JSON object")
        found += 1
        yield where, row


Content = str | list[dict[str, str]] | TokenIds
"""A row before tokenising: text, chat messages, or token ids."""


def _content(row: Mapping[str, Any], where: str) -> Content:
    present = [form for form in FORMS if form in row]
    if len(present) != 1:
        raise DataError(
            f"{where}: found the keys {sorted(row)}, expected exactly one of {', '.join(FORMS)}"
        )
    form = present[0]
    value = row[form]
    if form == "input_ids":
        if not _is_list_of(value, int) or any(isinstance(i, bool) for i in value):
            raise DataError(f"{where}: input_ids is {value!r:.60}, expected a list of integers")
        return np.asarray(value, np.int64)
    if form == "messages":
        return chat_messages(value, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {form} is {type(value).__name__}, expected a string")
    return value if form == "text" else value + right_answer(row, where)


def chat_messages(value: Any, where: str) -> list[dict[str, str]]:
    """Check the ``messages`` of a row: not empty, each with a role and a content.

    Raises:
        DataError: naming ``where``.
    """
    wanted = "a list of objects with the strings role and content"
    if not _is_list_of(value, dict) or not value:
        raise DataError(f"{where}: messages is {value!r:.60}, expected {wanted}")
    for message in value:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise DataError(f"{where}: found the message {message!r:.60}, expected {wanted}")
    return list(value)


def right_answer(row: Mapping[str, Any], where: str) -> str:
    """Return the text of the right answer of a row with a prompt: its answer, or that choice.

    Raises:
        DataError: naming ``where``.
    """
    answer = row.get("answer")
    if "choices" not in row:
        if not isinstance(answer, str):
            raise DataError(f"{where}: answer is {answer!r:.60}, expected a string")
        return answer
    choices = row["choices"]
    if not _is_list_of(choices, str) or not choices:
        raise DataError(f"{where}: choices is {choices!r:.60}, expected a list of strings")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: answer is {answer!r:.60}, expected 0 to {len(choices) - 1}")
    return str(choices[answer])


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def load_tokenizer(model: Path) -> Any:
    """Load the tokenizer beside a checkpoint; code that comes with it is never run.

    Raises:
        DataError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{model}: no usable tokenizer: {error}; expected tokenizer files beside the model "
            f"(calibration rows may be input_ids instead)"
        ) from error


def _encode(content: Content, tokenizer: Any, where: str) -> TokenIds:
    if isinstance(content, np.ndarray):
        return content
    if isinstance(content, str):
        ids = tokenizer(content)["input_ids"]
    elif tokenizer.chat_template is None:
        raise DataError(f"{where}: found messages, but the tokenizer has no chat template")
    else:
        # The template writes its own special tokens.
        text = tokenizer.apply_chat_template(content, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.asarray(ids, np.int64)


def checked_ids(ids: TokenIds, vocab_size: int, where: str) -> TokenIds:
    """Return ``ids``, one or more, each within the model's vocabulary.

    Raises:
        DataError: naming ``where``.
    """
    if not len(ids):
        raise DataError(f"{where}: found no tokens, expected at least 1")
    bad = ids[(ids < 0) | (ids >= vocab_size)]
    if len(bad):
        raise DataError(f"{where}: found token id {bad[0]}, expected 0 to {vocab_size - 1}")
    return ids
