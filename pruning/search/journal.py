"""The folder of a search: what is searched, and every answer of the engine so far.

A search is a pure function of its identity and of the engine's answers. So it is resumed by running
it again from the start, with the journal in the engine's place for as long as it lasts.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import ConflictError, DataError
from liveprune.pruning.files import sync_file, sync_folder, write_atomic

FORMAT = 1

Entry = dict[str, Any]


class Journal:
    """A tape of requests and answers, one JSON object a line, on disk before the next request."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a line that a crash cut off is removed.

        Raises:
            DataError: a line other than the last is unreadable.
        """
        self.path = path
        self._entries = _read(path)
        self._next = 0

    @property
    def replaying(self) -> bool:
        """The next request is answered from the file."""
        return self._next < len(self._entries)

    def call(self, request: Entry, ask: Callable[[], Entry]) -> Entry:
        """The recorded answer to the request, or a new one, recorded before it is returned.

        Raises:
            DataError: the file has another request in this place.
        """
        if not self.replaying:
            entry = {"request": request, **ask()}
            with self.path.open("ab") as file:
                file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._entries.append(entry)
        entry = self._entries[self._next]
        self._next += 1
        if entry["request"] != request:
            raise DataError(
                f"{self.path}: line {self._next} answers {_brief(entry['request'])}, expected "
                f"{_brief(request)}; another release of liveprune or numpy asks in another "
                f"order: start anew in an empty folder"
            )
        return entry


@contextmanager
def open_folder(
    folder: Path, identity: Mapping[str, Any], kind: str = "search"
) -> Iterator[Journal]:
    """Lock a search's folder, check that it is this search's, and yield its journal.

    Args:
        folder: made if it is not there.
        identity: what is searched, in JSON's types: model, data, method, seed.
        kind: what the work is called; its identity is kept in ``KIND.json``.

    Raises:
        ConflictError: another process uses the folder.
        DataError: it holds another search; the message names what differs. Or it is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(
                f"{folder}: found another {kind} at work in it, expected a folder of its own"
            ) from None
        journal = folder / "journal.jsonl"
        _check_identity(folder / f"{kind}.json", journal, {"format": FORMAT, **identity})
        if not journal.exists():
            journal.touch()
            sync_folder(folder)
        yield Journal(journal)


def _check_identity(path: Path, journal: Path, identity: Mapping[str, Any]) -> None:
    expected = json.loads(json.dumps(identity))
    if not path.exists():
        if journal.exists():
            raise DataError(f"{journal}: found without {path.name}, expected both or neither")
        write_atomic(path, json.dumps(expected, indent=2).encode() + b"\n")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: found {type(found).__name__}, expected an object")
    differences = list(_differences(found, expected, ""))
    if differences:
        raise DataError(
            f"{path}: this folder holds another {path.stem}: {'; '.join(differences)}. Resume "
            f"with what it was started with, or start anew in an empty folder"
        )


def _differences(found: Any, expected: Any, name: str) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            where = f"{name}.{key}" if name else key
            yield from _differences(found.get(key), expected.get(key), where)
    elif found != expected:
        yield f"{name} was {found!r}, now is {expected!r}"


def _read(path: Path) -> list[Entry]:
    data = path.read_bytes()
    lines = data.split(b"\n")
    entries = []
    good = 0
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            if number < len(lines) - 1:
                raise DataError(f"{path}: line {number} is damaged: {error}") from error
            break
        good += len(line) + 1
    if good < len(data):
        os.truncate(path, good)
        sync_file(path)
    return entries


def _brief(request: Entry) -> str:
    text = json.dumps(request)
    return text if len(text) <= 200 else f"{text[:200]}..."
