from __future__ import annotations

from pathlib import Path

import pytest

from liveprune.pruning.model_name import model_name


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/name", "org/name"),
        ("name", "name"),
        (Path("/models/x-7b"), "x-7b"),
        ("/home/me/models/x-7b", "x-7b"),
        ("../models/x-7b", "x-7b"),
        (Path("models/x-7b"), "x-7b"),
        (Path("/cache/models--org--name/snapshots/abc"), "org/name"),
        ("/cache/models--org--name/snapshots/abc", "org/name"),
    ],
)
def test_names(model: str | Path, expected: str) -> None:
    assert model_name(model) == expected
