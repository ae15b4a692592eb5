from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.errors import ConflictError, DataError
from liveprune.pruning.search.journal import Journal, open_folder

IDENTITY = {"model": "m", "seed": 1, "method": {"name": "eep", "groups": None, "scale": 0.1}}


def never() -> dict[str, Any]:
    raise AssertionError("asked though it is in the journal")


def test_answers_are_found_again_in_order(tmp_path: Path) -> None:
    with open_folder(tmp_path / "new" / "search", IDENTITY) as journal:
        assert not journal.replaying
        assert journal.call({"a": 1}, lambda: {"x": [0.1]})["x"] == [0.1]
        # On disk before the next is asked for.
        journal.call({"a": 2}, lambda: {"x": len(journal.path.read_text().splitlines())})
    with open_folder(tmp_path / "new" / "search", IDENTITY) as journal:
        assert journal.replaying
        assert journal.call({"a": 1}, never)["x"] == [0.1]
        assert journal.call({"a": 2}, never)["x"] == 1
        assert not journal.replaying


def test_another_request_in_its_place_is_refused(tmp_path: Path) -> None:
    with open_folder(tmp_path, IDENTITY) as journal:
        journal.call({"a": 1}, dict)
    with (
        open_folder(tmp_path, IDENTITY) as journal,
        pytest.raises(DataError, match=r'line 1 answers {"a": 1}, expected {"a": 2}'),
    ):
        journal.call({"a": 2}, never)


@pytest.mark.parametrize("cut", range(1, 22))
def test_a_line_cut_off_is_dropped_wherever(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    whole = b'{"request":1,"x":1}\n'
    path.write_bytes(whole + b'{"request":2,"x":22}\n'[:-cut])
    journal = Journal(path)
    assert path.read_bytes() == whole
    assert journal.call(1, never)["x"] == 1  # type: ignore[arg-type]
    journal.call(2, lambda: {"x": 3})  # type: ignore[arg-type]
    assert [json.loads(line)["x"] for line in path.read_text().splitlines()] == [1, 3]


def test_a_last_line_of_zeros_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"request":1}\n' + bytes(10) + b"\n")
    Journal(path)
    assert path.read_bytes() == b'{"request":1}\n'


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"request":1}\n{"req\n{"request":3}\n')
    with pytest.raises(DataError, match="line 2 is damaged"):
        Journal(path)


def test_what_differs_is_named(tmp_path: Path) -> None:
    with open_folder(tmp_path, IDENTITY):
        pass
    other = {**IDENTITY, "seed": 2, "method": {"name": "eep", "groups": 4, "scale": 0.1}}
    with (
        pytest.raises(DataError, match=r"method\.groups was None, now is 4; seed was 1, now is 2"),
        open_folder(tmp_path, other),
    ):
        pass


def test_one_search_a_folder(tmp_path: Path) -> None:
    with (
        open_folder(tmp_path, IDENTITY),
        pytest.raises(ConflictError, match="another search at work"),
        open_folder(tmp_path, IDENTITY),
    ):
        pass
    with open_folder(tmp_path, IDENTITY):
        pass


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("search.json", "{", "not readable as JSON"),
        ("search.json", "[]", "found list, expected an object"),
        ("journal.jsonl", "", "found without search.json"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message), open_folder(tmp_path, IDENTITY):
        pass
