from __future__ import annotations

from typing import Any

import pytest

from liveprune.pruning.errors import PlanError
from liveprune.pruning.search.presets import PRESETS, Settings, preset


def test_released_values() -> None:
    released = PRESETS["released"]
    assert (released.inits, released.prune_candidates, released.merge_candidates) == (31, 100, 300)
    assert (released.children, released.racing, released.dev_num) == (1, False, 20)
    assert (released.element_prob, released.scale, released.norm_prob) == (0.25, 0.065, 0.1)


def test_paper_iterations_come_after_the_first_prunings() -> None:
    paper = PRESETS["paper"]
    assert paper.prune_candidates - paper.inits == 40
    assert paper.merge_candidates == 160


def test_any_field_can_be_changed() -> None:
    assert preset("liveprune") == Settings()
    changed = preset("released", scale=0.1, groups="each")
    assert (changed.scale, changed.groups, changed.children) == (0.1, "each", 1)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("eep", {}, "preset is 'eep', expected one of liveprune, released, paper"),
        ("paper", {"sigma": 1}, "found sigma"),
        ("paper", {"groups": 0}, "groups is 0"),
        ("paper", {"groups": "four"}, "groups is 'four'"),
        ("paper", {"semantics": "mask"}, "semantics is 'mask'"),
        ("paper", {"children": 0}, "children is 0, expected a whole number from 1"),
        ("paper", {"dev_num": 2.5}, "dev_num is 2.5"),
        ("paper", {"crossover_prob": 1.5}, "crossover_prob is 1.5, expected 0 to 1"),
        ("paper", {"crossover_prob": float("nan")}, "crossover_prob is nan"),
        ("paper", {"weight_change_prob": 0.0}, "weight_change_prob is 0.0, expected more than 0"),
        ("paper", {"scale": -1.0}, "scale is -1.0"),
        ("paper", {"mutate_threshold": -1.0}, "mutate_threshold is -1.0"),
        ("paper", {"dev_fraction": 1.0}, "dev_fraction is 1.0"),
    ],
)
def test_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        preset(name, **changes)
