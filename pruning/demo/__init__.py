"""The demo model: a small Mixtral-style checkpoint of our own and the rows to prune it with.

`docs/demo-model.md` says how it was made and what pruning does to it.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from liveprune.pruning.demo.tasks import SPLITS, require, task_names

__all__ = ["model_path", "rows_path", "task_names"]


def model_path() -> Path:
    """Folder of the shipped checkpoint (config, safetensors, tokenizer)."""
    return _package_folder() / "model"


def rows_path(task: str, split: str) -> Path:
    """JSONL file of `{"prompt": str, "answer": str}` rows of one task; split: train, dev or test.

    Raises `DataError` for an unknown task or split.
    """
    require("task", task, task_names())
    require("split", split, SPLITS)
    return _package_folder() / "data" / f"{task}.{split}.jsonl"


def _package_folder() -> Path:
    # A real folder, never inside an archive: engines and safetensors need paths, not streams.
    return Path(str(files(__name__)))
