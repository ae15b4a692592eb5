"""One candidate of a search, and the order in which candidates stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from liveprune.pruning.plan import Plan
from liveprune.pruning.search.genome import Genome

Values = npt.NDArray[np.float64]


@dataclass(eq=False)
class Candidate:
    """A genome, its plan, and what is known of its fitness."""

    index: int
    """Place in the search, from 0."""
    stage: str
    """``prune`` or ``merge``."""
    genome: Genome
    plan: Plan
    values: Values = field(default_factory=lambda: np.zeros(0))
    """One in [0, 1] for each train row scored so far, in the search's order of rows."""
    failure: str | None = None
    """Why it could not be scored."""
    dropped: bool = False
    """Given up in a race: ``values`` covers part of the rows."""

    @property
    def complete(self) -> bool:
        """Scored on all train rows."""
        return self.failure is None and not self.dropped

    @property
    def mean(self) -> float:
        """Mean over the rows scored; minus infinity where it failed."""
        return float(self.values.mean()) if self.failure is None else -np.inf


def by_train(population: Sequence[Candidate]) -> list[Candidate]:
    """The complete candidates, best first; of equal ones the earlier."""
    return sorted((x for x in population if x.complete), key=lambda x: (-x.mean, x.index))
