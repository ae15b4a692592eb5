"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

# A busy machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny tensors: more threads only wait for each other. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference folder beside the checkout (golden outputs, data); skips when absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the reference folder ../shared is not there")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model(family, **overrides) -> Path``; made once per session and arguments.

    The folders are shared: tests read them and never write into them.
    """
    models = _models()
    made: dict[str, Path] = {}

    def make(family: str, **overrides: Any) -> Path:
        key = repr((family, sorted(overrides.items())))
        if key not in made:
            made[key] = models.tiny_model(family, tmp_path_factory.mktemp(family), **overrides)
        return made[key]

    return make


def _models() -> ModuleType:
    """Load ``tests/models.py``, which --import-mode=importlib does not make importable."""
    spec = importlib.util.spec_from_file_location(
        "tests.models", Path(__file__).parent / "models.py"
    )
    if spec is None or spec.loader is None:
        raise ImportError("tests/models.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
