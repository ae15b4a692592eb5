"""Which rows a search trains on, chooses on and reports on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from liveprune.pruning.errors import DataError
from liveprune.pruning.search.presets import Settings

if TYPE_CHECKING:
    from liveprune.pruning.evaluation.task import Task


@dataclass(frozen=True)
class RowSet:
    """Some rows of a task, in the order in which they are scored."""

    name: str
    """``train``, ``dev`` or ``test``."""
    task: Task
    rows: tuple[int, ...]


def row_sets(tasks: Mapping[str, Task], settings: Settings, seed: int) -> dict[str, RowSet]:
    """The rows of each set: train shuffled; without dev, a part of train becomes dev.

    Raises:
        DataError: a set has too few rows, or two sets are the same, or measured differently.
    """
    for name, task in tasks.items():
        least = 2 if name == "train" and "dev" not in tasks else 1
        if task.size < least:
            reason = ", a part of which becomes dev" if least > 1 else ""
            raise DataError(f"{name}: found {task.size} rows, expected at least {least}{reason}")
        if task.measure != tasks["train"].measure:
            raise DataError(
                f"{name}: measured by {task.measure!r}, expected {tasks['train'].measure!r} as "
                f"for train"
            )
        same = [key for key, other in tasks.items() if key != name and other.digest == task.digest]
        if same:
            raise DataError(f"{name}: found the same rows as {same[0]}, expected others")
    order = np.random.default_rng([seed, 0]).permutation(tasks["train"].size).tolist()
    sets = {}
    if "dev" not in tasks:
        aside = min(max(1, round(settings.dev_fraction * len(order))), len(order) - 1)
        sets["dev"] = RowSet("dev", tasks["train"], tuple(sorted(order[:aside])))
        order = order[aside:]
    sets["train"] = RowSet("train", tasks["train"], tuple(order))
    for name in tasks.keys() - {"train"}:
        sets[name] = RowSet(name, tasks[name], tuple(range(tasks[name].size)))
    return {name: sets[name] for name in ("train", "dev", "test") if name in sets}
