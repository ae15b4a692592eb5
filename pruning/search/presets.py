"""Hyper-parameters of the EEP search, by name of where they come from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from liveprune.pruning.errors import PlanError


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a search but model, data, budget and seed (methods.md, 2.3 and 2.4).

    Thresholds are in points, 100 times the mean fitness. The defaults are the preset ``liveprune``:
    the released code's values, several children per generation, and racing.
    """

    groups: int | Literal["each"] | None = None
    """Runs of layers of about equal length that share one pair of matrices; None is 4, or one for
    each layer where there are fewer."""
    merge: bool = True
    """Run the merge stage; without it the search ends with the pruned plan."""
    semantics: Literal["literal", "slice"] | None = None
    """What pruning means where the router does not renormalise (methods.md, 1.2): ``literal``
    drops experts after a softmax over all of them, as EEP's formula does; ``slice`` drops their
    gate rows. None is literal wherever the router takes router maps. Layers with real-valued
    coefficients have no sliced form: they are always literal."""
    inits: int = 31
    """Random prunings to start from."""
    prune_candidates: int = 100
    """Candidates of the prune stage, the first ones included."""
    merge_candidates: int = 300
    """Candidates of the merge stage."""
    children: int = 8
    """Candidates drawn from one state of the population, and scored in one call."""
    weight_change_prob: float = 0.25
    """Chance that a child may change a group's expert merging."""
    transfer_change_prob: float = 0.25
    """The same of its router mapping; in the prune stage this follows the merging."""
    row_mutate_prob: float = 0.15
    """Prune stage: chance that a row of such a group takes another expert."""
    crossover_prob: float = 0.3
    crossover_in_prune: bool = False
    """Cross over in the prune stage, too."""
    crossover_first_prob: float = 0.6
    """Chance that a row, or an untouched matrix, comes from the first parent."""
    crossover_threshold: float = 1.0
    """Parents lie within so many points of the best ..."""
    crossover_rank: int = 6
    """... or are among so many best."""
    mutate_threshold: float = 3.0
    mutate_rank: int = 0
    """As above; the first one beyond threshold and rank may be a parent, too, as released."""
    element_prob: float = 0.25
    """Merge stage: chance that an element of a touched matrix changes."""
    scale: float = 0.065
    """Standard deviation of that change."""
    norm_prob: float = 0.1
    """Merge stage: chance that the rows of the merging are divided by their sums."""
    merge_from_winner: bool = False
    """The merge stage starts from the prune stage's winner alone, not from its population."""
    dev_num: int = 20
    """Best candidates by train score that are scored again on dev, after each stage."""
    dev_fraction: float = 0.3
    """Part of the train rows put aside as dev, where there is no dev task."""
    racing: bool = True
    """Stop scoring a candidate as soon as it is clearly worse than the best one."""
    block: int = 25
    """Racing: rows scored between two looks."""
    race_z: float = 3.0
    """Racing: standard errors of the paired difference that are clear enough."""

    def __post_init__(self) -> None:
        if self.groups not in (None, "each") and not _is_whole(self.groups, 1):
            raise PlanError(f"groups is {self.groups!r}, expected a number from 1, or 'each'")
        if self.semantics not in (None, "literal", "slice"):
            raise PlanError(f"semantics is {self.semantics!r}, expected 'literal' or 'slice'")
        least = {"inits": 1, "prune_candidates": 1, "merge_candidates": 1, "children": 1}
        least |= {"crossover_rank": 0, "mutate_rank": 0, "dev_num": 1, "block": 1}
        for name, start in least.items():
            if not _is_whole(getattr(self, name), start):
                raise PlanError(
                    f"{name} is {getattr(self, name)!r}, expected a whole number from {start}"
                )
        for name in (x.name for x in dataclasses.fields(self) if x.name.endswith("_prob")):
            if not 0 <= getattr(self, name) <= 1:
                raise PlanError(f"{name} is {getattr(self, name)!r}, expected 0 to 1")
        for name in ("weight_change_prob", "row_mutate_prob", "scale", "race_z"):
            if not getattr(self, name) > 0:
                raise PlanError(f"{name} is {getattr(self, name)!r}, expected more than 0")
        for name in ("crossover_threshold", "mutate_threshold"):
            if not getattr(self, name) >= 0:
                raise PlanError(f"{name} is {getattr(self, name)!r}, expected at least 0")
        if not 0 < self.dev_fraction < 1:
            raise PlanError(f"dev_fraction is {self.dev_fraction!r}, expected between 0 and 1")


PRESETS = MappingProxyType(
    {
        "liveprune": Settings(),
        "released": Settings(children=1, racing=False),
        "paper": Settings(
            children=1,
            racing=False,
            prune_candidates=31 + 40,
            merge_candidates=160,
            crossover_prob=1.0,
            crossover_in_prune=True,
            norm_prob=0.0,
            merge_from_winner=True,
            dev_num=1,
        ),
    }
)
"""``liveprune``: the default.

``released``: the hyper-parameters of EEP's released code (methods.md, 2.4), one child at a time;
its defects (2.5) are not repeated.

``paper``: 40 iterations of pruning after the first random ones, 160 of merging from the best
pruning; every child is crossed over, then mutated; no row normalisation and no choice among several
on dev, which the paper does not have. What it does not state (how many first ones, all rates and
thresholds) comes from the released code.
"""


def preset(name: str, **changes: Any) -> Settings:
    """The settings of that name with some fields changed.

    Raises:
        PlanError: there is no such preset or field, or a value is out of range.
    """
    if name not in PRESETS:
        raise PlanError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}")
    known = [x.name for x in dataclasses.fields(Settings)]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise PlanError(
            f"settings: found {', '.join(unknown)}, expected some of {', '.join(known)}"
        )
    return dataclasses.replace(PRESETS[name], **changes)
