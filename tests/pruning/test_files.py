from __future__ import annotations

import threading
from pathlib import Path

import pytest

from liveprune.pruning import files
from liveprune.pruning.files import new_folder, write_atomic


def test_write_creates_parents_and_leaves_one_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "plan.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "plan.json"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    target = files.os if step == "fsync" else Path  # type: ignore[attr-defined]
    monkeypatch.setattr(target, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_concurrent_writes_leave_one_of_them_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    contents = [bytes([65 + i]) * 50_000 for i in range(8)]
    threads = [threading.Thread(target=write_atomic, args=(path, c)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "out" / "model"
    with new_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("x")
        assert not path.exists()
    assert (path / "sub" / "x").read_text() == "x"
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "model") as folder:
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    with new_folder(tmp_path / "model") as folder:
        (folder / "x").write_text("x")
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "y").write_text("y")
    assert (tmp_path / "empty" / "y").exists()


def test_existing_content_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "keep").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("model", "file"):
        with (
            pytest.raises(
                FileExistsError, match=f"{name}: exists already; expected a new or empty"
            ),
            new_folder(tmp_path / name),
        ):
            pass
    assert (tmp_path / "model" / "keep").read_text() == "keep"
    assert len(list(tmp_path.iterdir())) == 2


def test_of_two_writers_the_slower_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"

    def overtaken() -> None:
        with new_folder(path) as slow:
            with new_folder(path) as fast:
                (fast / "x").write_text("fast")
            (slow / "x").write_text("slow")

    with pytest.raises(FileExistsError, match="exists already"):
        overtaken()
    assert (path / "x").read_text() == "fast"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
