"""The admin keys: where the server and the command line find them, and how one is made.

The first of these that is given: a key file, the environment variable, ``admin.key`` in the state
folder (which the server makes when there is none). A key file holds one key a line, so that an old
and a new key can be right at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from liveprune.pruning.errors import IncompatibleEnvironmentError
from liveprune.pruning.files import sync_folder

KEY_VARIABLE = "LIVEPRUNE_ADMIN_KEY"
STATE_VARIABLE = "LIVEPRUNE_STATE_DIR"
STORE_VARIABLE = "LIVEPRUNE_STORE"
KEY_FILE = "admin.key"

logger = logging.getLogger("liveprune.admin")


def key_digest(key: str) -> bytes:
    """SHA-256 of a key, 32 bytes; what the server keeps instead of the key."""
    return hashlib.sha256(key.encode()).digest()


def default_state_folder() -> Path:
    """The folder for the server's own files: ``$LIVEPRUNE_STATE_DIR``, else as XDG says."""
    if folder := os.environ.get(STATE_VARIABLE):
        return Path(folder).absolute()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "liveprune"


def server_keys(
    file: Path | None, state: Path, *, public: Collection[str] = ()
) -> Callable[[], tuple[bytes, ...]]:
    """The digests of the keys that open the admin API, as a function to ask at every request.

    Args:
        file: ``--admin-key-file``.
        state: state folder; gets an ``admin.key`` if no key is given.
        public: keys of the public API (besides ``VLLM_API_KEY``); they never open the admin API.

    Raises:
        IncompatibleEnvironmentError: no usable key, or one that is a public key as well.
        OSError: the file cannot be read, or others can read it.
    """
    shared = {key_digest(key) for key in (*public, os.environ.get("VLLM_API_KEY", "")) if key}
    if file is None and (key := _environment_key()) is not None:
        fixed = _digests((key,), KEY_VARIABLE, shared)
        return lambda: fixed
    if file is None:
        file = state / KEY_FILE
        if not file.exists():
            make_key(file)
    return _KeyFile(file, shared).digests


def client_key(file: Path | None, state: Path) -> tuple[str, str]:
    """The key that the command line sends, and where it was found.

    Raises:
        IncompatibleEnvironmentError: there is none.
        OSError: the file cannot be read, or others can read it.
    """
    if file is None and (key := _environment_key()) is not None:
        return key, KEY_VARIABLE
    path = file or state / KEY_FILE
    if file is None and not path.exists():
        raise IncompatibleEnvironmentError(
            f"found no admin key: {KEY_VARIABLE} is not set and {path} does not exist; set one of "
            f"{KEY_VARIABLE}, {STATE_VARIABLE} (the server's state folder) or --admin-key-file"
        )
    return read_keys(path)[0], str(path)


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line.

    As ssh does with private keys, a file of ours that others may read is refused. A file that
    belongs to somebody else is not: its owner decides (secrets mounted into a container).

    Raises:
        IncompatibleEnvironmentError: no key, or a line that cannot be one.
        OSError: the file cannot be read, or others can read it.
    """
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        mode = stat.S_IMODE(found.st_mode)
        if found.st_uid == os.getuid() and mode & 0o077:
            raise PermissionError(f"{path}: mode is {mode:04o}, expected 0600: others can read it")
        lines = file.read().splitlines()
    keys = tuple(
        _checked(line.strip().decode(errors="replace"), f"{path} line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    )
    if not keys:
        raise IncompatibleEnvironmentError(f"{path}: found no key; expected one a line")
    return keys


def make_key(path: Path) -> None:
    """Write a new random key to ``path``, mode 0600; does nothing if another start was faster.

    The file appears with its content or not at all: it is linked to its name when it is written,
    which fails if the name is taken.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        Path(temporary).unlink()
    sync_folder(path.parent)


class _KeyFile:
    """The keys of a file as it is now: keys are rotated without a restart.

    A file that goes bad closes the admin API until it is mended; serving goes on.
    """

    def __init__(self, path: Path, shared: Collection[bytes]) -> None:
        self._path = path
        self._shared = shared
        self._seen = _identity(path)
        self._digests = _digests(read_keys(path), str(path), shared)

    def digests(self) -> tuple[bytes, ...]:
        now = _identity(self._path)
        if now != self._seen:
            self._seen = now
            try:
                self._digests = _digests(read_keys(self._path), str(self._path), self._shared)
                logger.info("admin keys read again from %s", self._path)
            except (OSError, IncompatibleEnvironmentError) as error:
                self._digests = ()
                logger.warning("the admin API is closed: %s", error)
        return self._digests


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes when the file is edited, replaced, or gets another mode."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _digests(keys: Collection[str], source: str, shared: Collection[bytes]) -> tuple[bytes, ...]:
    digests = tuple(key_digest(key) for key in keys)
    if any(digest in shared for digest in digests):
        raise IncompatibleEnvironmentError(
            f"{source}: found a key of the public API; expected keys that open the admin API only"
        )
    return digests


def _environment_key() -> str | None:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    return _checked(key, KEY_VARIABLE) if key else None


def _checked(key: str, where: str) -> str:
    if not key.isascii() or not key.isprintable() or " " in key:
        # The message must not show the key.
        raise IncompatibleEnvironmentError(
            f"{where}: found a key with a space or a special character; expected printable ASCII"
        )
    return key
