"""Put a pinned `axe.min.js` into build/tools: the accessibility checks of the dashboard's tests.

Nothing is fetched where it is there already. The path of the file is printed.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FILE = Path(__file__).parent.parent / "build" / "tools" / "axe.min.js"
PACKAGE = "axe-core@4.14.1"
SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"


def fetch(folder: Path) -> bytes:
    """Return axe.min.js out of PACKAGE, downloaded by npm into FOLDER."""
    if shutil.which("npm") is None:
        sys.exit("get_axe: npm is not on PATH: install npm")
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), PACKAGE]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as package:
        script = package.extractfile("package/axe.min.js")
        if script is None:
            sys.exit(f"{PACKAGE}: package/axe.min.js is not a file")
        return script.read()


def digest(script: bytes) -> str:
    """SHA-256, as SHA256 has it."""
    return hashlib.sha256(script).hexdigest()


def main() -> None:
    if not (FILE.is_file() and digest(FILE.read_bytes()) == SHA256):
        with tempfile.TemporaryDirectory() as folder:
            script = fetch(Path(folder))
        if (found := digest(script)) != SHA256:
            sys.exit(f"{PACKAGE}: found SHA-256 {found} of axe.min.js, expected {SHA256}")
        FILE.parent.mkdir(parents=True, exist_ok=True)
        partial = FILE.with_suffix(f".{os.getpid()}")
        partial.write_bytes(script)
        partial.replace(FILE)
    print(FILE)


if __name__ == "__main__":
    main()
