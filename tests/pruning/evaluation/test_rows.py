from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.errors import DataError
from liveprune.pruning.evaluation.rows import Form, Questions, load_questions
from tests.checkpoints import edited

Family = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(*rows: Any) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return make


@pytest.fixture
def load(tiny_model: Family, write: Callable[..., Path]) -> Callable[..., Questions]:
    def make(form: Form, *rows: Any, **options: Any) -> Questions:
        return load_questions(write(*rows), tiny_model("mixtral"), form=form, **options)

    return make


def ids(text: str) -> tuple[int, ...]:
    """The character tokenizer of the tiny models: 4 special tokens, newline, then ASCII."""
    return tuple(4 if c == "\n" else ord(c) - 32 + 5 for c in text)


def test_a_prompt_and_its_answer(load: Callable[..., Questions]) -> None:
    questions = load("answer", {"prompt": "1+1=\n", "answer": " 2 "})
    (row,) = questions.rows
    assert row.prompt == ids("1+1=\n")
    assert row.answers == (ids(" 2 "),)
    assert row.text == "2"
    assert row.where.endswith("rows.jsonl:1")
    assert questions.end == (2,)
    assert questions.max_tokens == 512


def test_choices(load: Callable[..., Questions]) -> None:
    questions = load("choices", {"prompt": "x", "choices": [" a", "bc"], "answer": 1})
    (row,) = questions.rows
    assert row.answers == (ids(" a"), ids("bc"))
    assert (row.right, row.text) == (1, "bc")


def test_rows_without_labels(load: Callable[..., Questions]) -> None:
    """Labels, where there are some, are not looked at."""
    turns = [{"role": "user", "content": "hi"}]
    questions = load(
        "prompt",
        {"prompt": "a"},
        {"prompt": "b", "answer": 5},
        {"messages": turns},
    )
    assert [row.prompt for row in questions.rows] == [ids("a"), ids("b"), ids("user: hi\n")]
    assert all(row.answers == () for row in questions.rows)


def test_chats_end_with_the_generation_prompt(
    tiny_model: Family, write: Callable[..., Path], tmp_path: Path
) -> None:
    model = edited(tiny_model("mixtral"), tmp_path / "chat")
    template = "{{ messages[0].content }}{% if add_generation_prompt %}!{% endif %}"
    (model / "chat_template.jinja").write_text(template)
    path = write({"messages": [{"role": "user", "content": "hi"}]})
    assert load_questions(path, model, form="prompt").rows[0].prompt == ids("hi!")


def test_decoded_text_keeps_its_spaces(load: Callable[..., Questions]) -> None:
    questions = load("answer", {"prompt": "a", "answer": "b , do n't ."})
    assert questions.rows[0].text == "b , do n't ."


def test_the_demo_model_reads_rows_as_it_was_trained(write: Callable[..., Path]) -> None:
    """Special tokens once, at the start; a chat is the same prompt."""
    from liveprune.pruning.demo import model_path

    path = write(
        {"prompt": "add: 2+3\n", "answer": "5"},
    )
    (row,) = load_questions(path, model_path(), form="answer").rows
    assert row.prompt[0] == 1
    assert 1 not in row.prompt[1:] + row.answers[0]
    chat = write({"messages": [{"role": "user", "content": "add: 2+3"}]})
    assert load_questions(chat, model_path(), form="prompt").rows[0].prompt == row.prompt


def test_an_answer_that_shares_a_token_with_its_prompt_is_read_alone(
    write: Callable[..., Path],
) -> None:
    """The demo's "positive" is one token: the prompt's own tokens stay as they are."""
    from liveprune.pruning.demo import model_path

    (row,) = load_questions(
        write({"prompt": "pos", "answer": "itive"}), model_path(), form="answer"
    ).rows
    (whole,) = load_questions(write({"prompt": "positive"}), model_path(), form="prompt").rows
    assert len(whole.prompt) == len(row.prompt) == 2
    assert whole.prompt != row.prompt
    assert (len(row.answers[0]), row.text) == (1, "itive")


def test_only_the_first_rows_are_read(load: Callable[..., Questions]) -> None:
    rows = [{"prompt": c} for c in "abc"]
    assert len(load("prompt", *rows, max_rows=2).rows) == 2
    with pytest.raises(DataError, match="max_rows is 0"):
        load("prompt", *rows, max_rows=0)


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("answer", {"text": "a"}, "prompt is None, expected a string"),
        ("answer", {"prompt": 3, "answer": "a"}, "prompt is 3, expected a string"),
        ("answer", {"prompt": "a"}, "answer is None, expected a string"),
        ("answer", {"prompt": "a", "answer": " \n"}, "found the blank answer"),
        (
            "answer",
            {"prompt": "a", "choices": ["b"], "answer": 0},
            "found choices, expected prompt and answer without choices",
        ),
        ("choices", {"prompt": "a", "answer": "b"}, "found no choices, expected choices"),
        ("choices", {"prompt": "a", "choices": ["b"], "answer": 1}, "answer is 1, expected 0 to 0"),
        (
            "choices",
            {"prompt": "a", "choices": ["b", ""], "answer": 0},
            "found the blank answer ''",
        ),
        ("prompt", {"answer": "a"}, "prompt is None"),
        ("prompt", {"messages": []}, "messages is"),
        (
            "prompt",
            {"messages": [{"role": "assistant", "content": "a"}]},
            "the last message is the assistant's",
        ),
        ("prompt", {"prompt": ""}, "found no tokens"),
    ],
)
def test_bad_rows_are_named(
    load: Callable[..., Questions], form: Form, row: dict[str, Any], message: str
) -> None:
    good: dict[str, Any] = {"prompt": "a", "answer": "b"}
    if form == "choices":
        good = {"prompt": "a", "choices": ["b"], "answer": 0}
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{message}"):
        load(form, good, row)


def test_forms_are_checked_before_the_tokenizer_is_loaded(
    tiny_model: Family, write: Callable[..., Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny_model("mixtral") / "config.json").read_text())
    with pytest.raises(DataError, match="answer is 1"):
        load_questions(write({"prompt": "a", "answer": 1}), bare, form="answer")
    with pytest.raises(DataError, match="no usable tokenizer"):
        load_questions(write({"prompt": "a", "answer": "1"}), bare, form="answer")


def test_a_file_without_rows(load: Callable[..., Questions]) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: found no rows"):
        load("prompt")


def test_tokens_beyond_the_vocabulary(
    tiny_model: Family, write: Callable[..., Path], tmp_path: Path
) -> None:
    small = edited(tiny_model("mixtral"), tmp_path / "small", vocab_size=50)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: found token id 70, expected 0 to 49"):
        load_questions(write({"prompt": "a"}), small, form="prompt")


def test_end_tokens_come_from_all_places(
    tiny_model: Family, write: Callable[..., Path], tmp_path: Path
) -> None:
    """The tokenizer's own comes first; one id or a list alike."""
    model = edited(tiny_model("mixtral"), tmp_path / "ends", eos_token_id=9)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 2]}))
    path = write({"prompt": "a"})
    assert load_questions(path, model, form="prompt").end == (2, 8, 9)
    (model / "generation_config.json").unlink()
    assert load_questions(path, model, form="prompt").end == (2, 9)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(DataError, match="eos_token_id is 'x', expected a token id"):
        load_questions(path, model, form="prompt")


def test_the_digest_is_that_of_the_tokens(load: Callable[..., Questions]) -> None:
    row = {"prompt": "x", "choices": ["a", "b"], "answer": 1}
    first = load("choices", row).digest
    assert len(first) == 32
    assert load("choices", {**row, "source": "elsewhere"}).digest == first
    changes = ({"answer": 0}, {"prompt": "y"}, {"choices": ["b", "a"]})
    changed = [load("choices", {**row, **change}).digest for change in changes]
    assert len({first, *changed, load("choices", row, row).digest}) == 5


def test_prompts_as_turns_of_a_chat(
    tiny_model: Family, write: Callable[..., Path], tmp_path: Path
) -> None:
    """The template writes what surrounds them; answers follow it without special tokens."""
    model = edited(tiny_model("mixtral"), tmp_path / "chat")
    template = "[{{ messages[0].content }}]{% if add_generation_prompt %}!{% endif %}"
    (model / "chat_template.jinja").write_text(template)
    path = write({"prompt": "hi", "answer": "ab"})
    (row,) = load_questions(path, model, form="answer", chat=True).rows
    assert row.prompt == ids("[hi]!")
    assert row.answers == (ids("ab"),)
    assert row.text == "ab"


def test_a_chat_needs_a_template(
    tiny_model: Family, write: Callable[..., Path], tmp_path: Path
) -> None:
    model = edited(tiny_model("mixtral"), tmp_path / "plain")
    (model / "chat_template.jinja").unlink()
    path = write({"prompt": "hi", "answer": "ab"})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: chat was asked for, but the tokenizer"):
        load_questions(path, model, form="answer", chat=True)
