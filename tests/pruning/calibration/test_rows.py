from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liveprune.pruning.calibration.rows import Rows, load_rows
from liveprune.pruning.errors import DataError

VOCAB = 128
FIRST = 4  # id of "\n"; the printable characters follow from 5 (space)


def ids(text: str) -> list[int]:
    return [FIRST if c == "\n" else ord(c) - 32 + FIRST + 1 for c in text]


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def test_every_form_is_tokenised(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"text": "ab"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"input_ids": [3, 1, 4]},
        {"prompt": "1+1=", "answer": "2"},
        "\n",
        {"prompt": "1+1=", "choices": ["3", "2"], "answer": 1, "task": "sums"},
    )
    rows = load_rows(path, tiny_model("mixtral"), vocab_size=VOCAB)
    assert [r.tolist() for r in rows.token_ids] == [
        ids("ab"),
        ids("user: hi\n"),
        [3, 1, 4],
        ids("1+1=2"),
        ids("1+1=2"),
    ]
    assert rows.tokens == 2 + 9 + 3 + 5 + 5


def test_limits(tmp_path: Path) -> None:
    path = write(tmp_path, {"input_ids": [1, 2, 3]}, {"input_ids": [4]}, "not read")
    rows = load_rows(path, tmp_path, vocab_size=VOCAB, max_tokens=2, max_rows=2)
    assert [r.tolist() for r in rows.token_ids] == [[1, 2], [4]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[1]\n", "found list, expected a JSON object"),
        ({}, "found the keys .*, expected exactly one of text, messages, input_ids, prompt"),
        ({"text": "a", "prompt": "b"}, "expected exactly one of"),
        ({"text": 3}, "text is int, expected a string"),
        ({"input_ids": []}, "found no tokens"),
        ({"input_ids": [1, True]}, "expected a list of integers"),
        ({"input_ids": [128]}, "found token id 128, expected 0 to 127"),
        ({"messages": []}, "messages is"),
        ({"messages": [{"role": "user"}]}, "found the message"),
        ({"prompt": "a"}, "answer is None, expected a string"),
        ({"prompt": "a", "choices": ["b"], "answer": 1}, "answer is 1, expected 0 to 0"),
        ({"prompt": "a", "choices": "b", "answer": 0}, "choices is 'b'"),
    ],
)
def test_refusals_name_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path, {"input_ids": [1]}, row)
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{message}"):
        load_rows(path, tmp_path, vocab_size=VOCAB)


def test_rows_are_checked_before_the_tokenizer_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "a"}, {"text": None})
    with pytest.raises(DataError, match=r":2: text is NoneType"):
        load_rows(path, tmp_path / "no model", vocab_size=VOCAB)
    with pytest.raises(DataError, match="no usable tokenizer"):
        load_rows(write(tmp_path, {"text": "a"}), tmp_path, vocab_size=VOCAB)


def test_empty_missing_and_senseless(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no rows"):
        load_rows(write(tmp_path, "\n"), tmp_path, vocab_size=VOCAB)
    with pytest.raises(DataError, match="not readable"):
        load_rows(tmp_path / "absent", tmp_path, vocab_size=VOCAB)
    with pytest.raises(DataError, match="max_rows is 0"):
        load_rows(tmp_path / "absent", tmp_path, vocab_size=VOCAB, max_rows=0)


def rows_of(*lengths: int) -> Rows:
    return Rows(tuple(np.arange(1, n + 1) for n in lengths))


def test_batches_are_padded_on_the_right_longest_first() -> None:
    batches = rows_of(2, 3, 1).batches(batch_tokens=6)
    assert [b.indices for b in batches] == [(1, 0), (2,)]
    assert batches[0].input_ids.tolist() == [[1, 2, 3], [1, 2, 0]]
    assert batches[0].attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.integers(1, 40))
def test_batches_hold_every_token_once(lengths: list[int], limit: int) -> None:
    batches = rows_of(*lengths).batches(limit)
    assert sorted(i for b in batches for i in b.indices) == list(range(len(lengths)))
    assert sum(int(b.attention_mask.sum()) for b in batches) == sum(lengths)
    assert all(b.input_ids.size <= limit or len(b.indices) == 1 for b in batches)


def test_digest_tells_content_and_boundaries_apart() -> None:
    assert rows_of(2, 3).digest == rows_of(2, 3).digest
    assert len({rows_of(2, 3).digest, rows_of(3, 2).digest, rows_of(2, 3, 1).digest}) == 3
    split, joined = np.array([1, 2]), (np.array([1]), np.array([2]))
    assert Rows((split,)).digest != Rows(joined).digest
