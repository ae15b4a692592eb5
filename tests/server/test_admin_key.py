from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path

import pytest

from liveprune.pruning.errors import IncompatibleEnvironmentError
from liveprune.server import admin_key
from liveprune.server.admin_key import (
    client_key,
    default_state_folder,
    key_digest,
    make_key,
    read_keys,
    server_keys,
)


@pytest.fixture(autouse=True)
def no_keys_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (admin_key.KEY_VARIABLE, admin_key.STATE_VARIABLE, "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def key_file(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def digests(*keys: str) -> tuple[bytes, ...]:
    return tuple(key_digest(key) for key in keys)


def test_the_first_start_makes_a_key_that_the_client_finds(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state"
    keys = server_keys(None, state)
    file = state / "admin.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    key, source = client_key(None, state)
    assert keys() == digests(key)
    assert len(key) == 43  # 32 random bytes, six bits a character
    assert source == str(file)
    assert list(state.iterdir()) == [file]
    assert server_keys(None, state)() == digests(key)  # the next start keeps it


def test_starts_at_the_same_time_agree_on_one_key(tmp_path: Path) -> None:
    found: list[tuple[bytes, ...]] = []
    barrier = threading.Barrier(8)

    def begin() -> None:
        barrier.wait()
        found.append(server_keys(None, tmp_path / "state")())

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_key_that_is_there_is_never_replaced(tmp_path: Path) -> None:
    file = key_file(tmp_path / "admin.key", "mine\n")
    make_key(file)
    assert file.read_text() == "mine\n"
    assert list(tmp_path.iterdir()) == [file]


def test_two_keys_are_not_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_key(tmp_path / name)
    assert read_keys(tmp_path / "one") != read_keys(tmp_path / "two")


def test_the_flag_comes_before_the_environment_and_that_before_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = key_file(tmp_path / "keys", "\nfrom-flag\n\nsecond \n")
    monkeypatch.setenv(admin_key.KEY_VARIABLE, " from-environment ")
    assert server_keys(flag, tmp_path)() == digests("from-flag", "second")
    assert client_key(flag, tmp_path) == ("from-flag", str(flag))
    assert server_keys(None, tmp_path)() == digests("from-environment")
    assert client_key(None, tmp_path) == ("from-environment", admin_key.KEY_VARIABLE)
    assert not (tmp_path / "admin.key").exists()


def test_an_empty_variable_is_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(admin_key.KEY_VARIABLE, "  ")
    assert server_keys(None, tmp_path)() == digests(*read_keys(tmp_path / "admin.key"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o644, 0o777])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = key_file(tmp_path / "keys", "secret-key\n", mode)
    for use in (lambda: server_keys(file, tmp_path), lambda: client_key(file, tmp_path)):
        with pytest.raises(PermissionError, match=f"mode is {mode:04o}, expected 0600") as caught:
            use()
        assert "secret-key" not in str(caught.value)


def test_a_mounted_secret_of_another_user_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = key_file(tmp_path / "keys", "k\n", 0o644)
    monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1)
    assert read_keys(file) == ("k",)


@pytest.mark.parametrize("text", ["", "\n \n", "two words\n", "kéy\n", "a\tb\n", "good\nb ad\n"])
def test_a_file_without_usable_keys_is_refused(tmp_path: Path, text: str) -> None:
    file = key_file(tmp_path / "keys", text)
    with pytest.raises(IncompatibleEnvironmentError, match=r"keys.*expected"):
        server_keys(file, tmp_path)


def test_a_bad_key_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(admin_key.KEY_VARIABLE, "hush hush")
    with pytest.raises(IncompatibleEnvironmentError, match="LIVEPRUNE_ADMIN_KEY") as caught:
        server_keys(None, tmp_path)
    assert "hush" not in str(caught.value)


def test_a_public_key_cannot_be_an_admin_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = key_file(tmp_path / "keys", "mine\npublic-one\n")
    with pytest.raises(IncompatibleEnvironmentError, match="public API"):
        server_keys(file, tmp_path, public=["public-one"])
    assert server_keys(file, tmp_path, public=["another"])() == digests("mine", "public-one")
    monkeypatch.setenv("VLLM_API_KEY", "public-one")
    with pytest.raises(IncompatibleEnvironmentError, match="public API"):
        server_keys(file, tmp_path)


def test_keys_are_rotated_without_a_restart(tmp_path: Path) -> None:
    file = key_file(tmp_path / "keys", "old\n")
    keys = server_keys(file, tmp_path)
    assert keys() == digests("old")
    replacement = key_file(tmp_path / "new", "old\nnew\n")
    replacement.replace(file)
    assert keys() == digests("old", "new")
    key_file(file, "newer\n")
    assert keys() == digests("newer")


def test_a_key_file_that_goes_bad_closes_and_a_mended_one_opens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = key_file(tmp_path / "keys", "one\n")
    keys = server_keys(file, tmp_path, public=["public-one"])
    for spoil in (
        lambda: file.chmod(0o644),
        lambda: key_file(file, "\n"),
        lambda: key_file(file, "public-one\n"),
        file.unlink,
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "liveprune.admin"):
            spoil()
            assert keys() == ()
            assert keys() == ()
        assert caplog.text.count("the admin API is closed") == 1
        key_file(file, "mended\n")
        assert keys() == digests("mended")


def test_the_client_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleEnvironmentError) as caught:
        client_key(None, tmp_path)
    for place in ("LIVEPRUNE_ADMIN_KEY", str(tmp_path / "admin.key"), "--admin-key-file"):
        assert place in str(caught.value)
    with pytest.raises(FileNotFoundError):
        client_key(tmp_path / "missing", tmp_path)


def test_the_state_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert default_state_folder() == tmp_path / ".local" / "state" / "liveprune"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert default_state_folder() == tmp_path / "xdg" / "liveprune"
    monkeypatch.setenv(admin_key.STATE_VARIABLE, "here")
    assert default_state_folder() == Path.cwd() / "here"
