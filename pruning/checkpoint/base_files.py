"""The files of a base model that belong to every variant of it: tokenizer, templates, licence."""

from __future__ import annotations

from pathlib import Path

from liveprune.pruning.errors import CheckpointError

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
_REWRITTEN = {"config.json", "README.md"}
_FOLDERS = ("additional_chat_templates",)
MAX_BYTES = 1 << 26


def base_files(model: Path) -> dict[str, Path]:
    """Map relative names to the files to copy: all small ones but weights, code and our own.

    Code (``*.py``) is left behind, since nothing here trusts remote code. Links of a hub snapshot
    are followed to its blobs.

    Raises:
        CheckpointError: a link leads out of the model's folder, so that publishing a copy could
            give away another file.
    """
    found = {}
    for folder in (model, *(model / name for name in _FOLDERS)):
        if folder.is_symlink() and folder != model:
            continue
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = path.relative_to(model).as_posix()
            if path.is_file() and _wanted(name, path):
                _check_inside(path, model)
                found[name] = path
    return found


def _wanted(name: str, path: Path) -> bool:
    if name in _REWRITTEN or name.endswith(".index.json") or path.name.startswith("."):
        return False
    return path.suffix not in {*_WEIGHTS, ".py"} and path.stat().st_size <= MAX_BYTES


def _check_inside(path: Path, model: Path) -> None:
    target = path.resolve()
    allowed = [model.resolve()]
    if model.absolute().parent.name == "snapshots":
        allowed.append(model.absolute().parent.parent.resolve() / "blobs")
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise CheckpointError(f"{path}: links to {target}, expected a file inside {model}")
