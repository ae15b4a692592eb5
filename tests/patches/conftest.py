"""Import vLLM once, with its own warnings allowed; undo what a test patches in it."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports warn; pytest makes errors of warnings
    from liveprune.patches.plugin import PATCHES

    for _patch in PATCHES:
        for _module in (_patch.seam.module, *_patch.also):
            importlib.import_module(_module)

Places = dict[tuple[Any, str], Any]


@pytest.fixture
def places() -> Iterator[Places]:
    """Every (object, attribute) that the plugin may replace, with its original; put back after."""
    originals: Places = {}
    for patch in PATCHES:
        owner: Any = sys.modules[patch.seam.module]
        *path, name = patch.seam.qualname.split(".")
        for part in path:
            owner = getattr(owner, part)
        for place in (owner, *(sys.modules[module] for module in patch.also)):
            originals[place, name] = getattr(place, name)
    yield originals
    for (place, name), original in originals.items():
        setattr(place, name, original)


@pytest.fixture
def read_config(tmp_path: Path) -> Callable[[dict[str, Any]], Any]:
    """Read a config.json as vLLM does: through transformers' own class of the family."""
    from transformers import AutoConfig

    def read(raw: dict[str, Any]) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return AutoConfig.from_pretrained(tmp_path)

    return read
