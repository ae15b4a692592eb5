"""Find the folder of a model given as a path or as a name on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from liveprune.pruning.errors import CheckpointError


def local_model(model: str) -> Path:
    """Return ``model`` if it is a folder, else download (or find) its snapshot.

    Only safetensors, configuration and tokenizer files are fetched, never code.

    Raises:
        CheckpointError: neither a folder nor a model that the hub or its cache can give.
    """
    path = Path(model)
    if path.is_dir():
        return path
    check_not_a_path(model)
    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model}: found neither a folder nor a model of that name on the hub: {error}"
        ) from error


def check_not_a_path(model: str) -> None:
    """Refuse what can only be meant as a path and is no folder.

    Raises:
        CheckpointError: ``model`` is a file, or starts like a path.
    """
    if Path(model).exists() or model.startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: found no such folder; expected a checkpoint folder")
