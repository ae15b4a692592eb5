from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.result import SearchResult
from liveprune.pruning.search.run import search
from tests.pruning.search.fakes import FakeTask

Search = Callable[..., SearchResult]


@pytest.fixture
def run_search(tiny_model: Callable[..., Path], tmp_path: Path) -> Search:
    """``search`` on a tiny Mixtral of 4 experts, 2 kept, with small stages; all can be changed."""

    def start(train: FakeTask, *, of: int = 4, **changes: Any) -> SearchResult:
        model = tiny_model("mixtral", num_local_experts=of, num_hidden_layers=2)
        arguments: dict[str, Any] = {
            "folder": tmp_path / "search",
            "experts": 2,
            "top_k": 1,
            "settings": Settings(inits=8, prune_candidates=24, merge_candidates=24),
            **changes,
        }
        return search(model, ModelSpec.from_path(model), None, train=train, **arguments)

    return start
