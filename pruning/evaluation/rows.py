"""Evaluation rows: a JSONL file, checked and tokenised into prompts and answers.

One JSON object a line; other keys are ignored. Which form a row must have depends on the measure:

* answer: ``{"prompt": str, "answer": str}``
* choices: ``{"prompt": str, "choices": [str, ...], "answer": int}``
* prompt, for measures without labels: any row with a ``prompt``, or
  ``{"messages": [{"role": str, "content": str}, ...]}`` whose last turn is not the assistant's,
  through the chat template with its generation prompt
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from liveprune.pruning.calibration.rows import (
    chat_messages,
    checked_ids,
    load_tokenizer,
    read_jsonl,
    right_answer,
)
from liveprune.pruning.errors import DataError
from liveprune.pruning.model_spec import ModelSpec

Form = Literal["answer", "choices", "prompt"]
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """One row as tokens."""

    prompt: Tokens
    answers: tuple[Tokens, ...] = ()
    """The right answer, or all choices; without end tokens. Empty for a row without labels."""
    right: int = 0
    """Which of ``answers`` is right."""
    text: str = ""
    """The right answer's tokens decoded and stripped: what a generated answer is held against."""
    where: str = ""
    """FILE:LINE."""


@dataclass(frozen=True, eq=False)
class Questions:
    """The tokenised rows in the order of the file, and what reads and ends an answer."""

    rows: tuple[Question, ...]
    end: Tokens
    """Tokens that end an answer: of the tokenizer, the generation config, the config, in order."""
    decode: Callable[[Sequence[int]], str]
    """Text of token ids, special tokens left out."""
    max_tokens: int
    """Most tokens the model takes, prompt and answer together."""

    @cached_property
    def digest(self) -> str:
        """Content digest, 32 hex digits: the tokens of all rows, what is right, what ends."""
        content = [[x.prompt, x.answers, x.right] for x in self.rows]
        state = hashlib.blake2b(json.dumps([content, self.end]).encode(), digest_size=16)
        return state.hexdigest()


def load_questions(
    path: Path, model: Path, *, form: Form, max_rows: int | None = None, chat: bool = False
) -> Questions:
    """Read the first ``max_rows`` rows of a JSONL file; tokenise with ``model``'s tokenizer.

    Every row's form is checked before the tokenizer is loaded. A prompt carries the tokenizer's
    special tokens or, with ``chat``, is one user's turn in the chat template, which writes its
    own; its answer is what the tokens of prompt + answer add to it, or, where the two share a
    token, the answer tokenised by itself.

    Raises:
        DataError: naming the file and the line, what was found and what was expected; or the
            model has no usable tokenizer.
        CheckpointError: ``model`` has no readable config.
    """
    if max_rows is not None and max_rows < 1:
        raise DataError(f"max_rows is {max_rows}, expected at least 1")
    spec = ModelSpec.from_path(model)
    rows = [(where, row) for where, row in read_jsonl(path, max_rows)]
    if not rows:
        raise DataError(f"{path}: found no rows, expected at least 1")
    for where, row in rows:
        _check_form(row, form, where)
    reader = _Reader(load_tokenizer(model), int(spec.config["vocab_size"]), chat=chat)
    return Questions(
        rows=tuple(reader.question(row, form, where) for where, row in rows),
        end=_end_tokens(model, reader.tokenizer, spec.config),
        decode=reader.decode,
        max_tokens=int(spec.config["max_position_embeddings"]),
    )


def _check_form(row: Mapping[str, Any], form: Form, where: str) -> None:
    if form == "prompt" and "messages" in row and "prompt" not in row:
        if chat_messages(row["messages"], where)[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: the last message is the assistant's, expected a turn to be answered"
            )
        return
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise DataError(f"{where}: prompt is {prompt!r:.60}, expected a string")
    if form == "prompt":
        return
    if ("choices" in row) != (form == "choices"):
        found = "choices" if "choices" in row else "no choices"
        expected = "choices" if form == "choices" else "prompt and answer without choices"
        raise DataError(f"{where}: found {found}, expected {expected} for this measure")
    right_answer(row, where)
    for text in row["choices"] if form == "choices" else [row["answer"]]:
        if not text.strip():
            raise DataError(f"{where}: found the blank answer {text!r}, expected some text")


@dataclass(frozen=True)
class _Text:
    """What is tokenised."""

    text: str
    special: bool
    """The tokenizer adds its special tokens; a chat template has written them already."""


class _Reader:
    """Text to tokens and back."""

    def __init__(self, tokenizer: Any, vocab_size: int, *, chat: bool) -> None:
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._chat = chat

    def question(self, row: Mapping[str, Any], form: Form, where: str) -> Question:
        asked = self._asked(row, where)
        prompt = self._tokens(asked, where)
        if form == "prompt":
            return Question(prompt, where=where)
        texts = row["choices"] if form == "choices" else [row["answer"]]
        answers = tuple(self._answer(prompt, asked, text, where) for text in texts)
        right = row["answer"] if form == "choices" else 0
        return Question(prompt, answers, right, self.decode(answers[right]).strip(), where)

    def decode(self, ids: Sequence[int]) -> str:
        # Without the clean-up, which would take spaces out of the gold text's tokens as well.
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _asked(self, row: Mapping[str, Any], where: str) -> _Text:
        if "prompt" in row and not self._chat:
            return _Text(row["prompt"], special=True)
        if self.tokenizer.chat_template is None:
            found = "chat was asked for" if "prompt" in row else "found messages"
            raise DataError(f"{where}: {found}, but the tokenizer has no chat template")
        user = [{"role": "user", "content": row["prompt"]}] if "prompt" in row else row["messages"]
        text = self.tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        return _Text(text, special=False)

    def _answer(self, prompt: Tokens, asked: _Text, answer: str, where: str) -> Tokens:
        joint = self._tokens(_Text(asked.text + answer, asked.special), where)
        if joint[: len(prompt)] == prompt and len(joint) > len(prompt):
            return joint[len(prompt) :]
        return self._tokens(_Text(answer, special=False), where)

    def _tokens(self, given: _Text, where: str) -> Tokens:
        ids = self.tokenizer(given.text, add_special_tokens=given.special)["input_ids"]
        return self._checked(ids, where)

    def _checked(self, ids: Sequence[int], where: str) -> Tokens:
        return tuple(checked_ids(np.asarray(ids, np.int64), self._vocab_size, where).tolist())


def _end_tokens(model: Path, tokenizer: Any, config: Mapping[str, Any]) -> Tokens:
    generation = model / "generation_config.json"
    try:
        stated = json.loads(generation.read_text(encoding="utf-8"))
    except FileNotFoundError:
        stated = {}
    except (OSError, ValueError) as error:
        raise DataError(f"{generation}: not readable as JSON: {error}") from error
    places = (
        ("tokenizer", tokenizer.eos_token_id),
        (str(generation), stated.get("eos_token_id")),
        ("config.json", config.get("eos_token_id")),
    )
    found: dict[int, None] = {}
    for place, value in places:
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if not isinstance(token, int):
                raise DataError(f"{place}: eos_token_id is {token!r}, expected a token id")
            found[token] = None
    return tuple(found)
