from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pruning.pareto.bench import Bench


@pytest.fixture
def bench(tiny_model: Callable[..., Path], tmp_path: Path) -> Bench:
    return Bench(tiny_model("mixtral"), tmp_path)
