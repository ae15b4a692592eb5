"""What a one-pass method is: a score per expert, from one of four sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from liveprune.pruning.calibration.statistics import LayerStatistics

if TYPE_CHECKING:
    from liveprune.pruning.calibration.weights import LayerWeights
    from liveprune.pruning.methods.moeits_removals import Removals

Scores = npt.NDArray[np.float64]
"""[experts] float64, higher = keep; -inf where the score is undefined: pruned first."""


@dataclass(frozen=True)
class Method:
    """A score for the experts of a layer; exactly one of the four sources is set.

    Scores are not negative, apart from -inf, so that ``budget`` can compare layers by shares.
    """

    name: str
    title: str
    reference: str
    """arXiv id, or an empty string for what is folklore."""
    formula: str
    from_statistics: Callable[[LayerStatistics], Scores] | None = None
    """Needs calibration rows."""
    from_weights: Callable[[LayerWeights], Scores] | None = None
    """Reads the checkpoint, one expert at a time."""
    from_seed: Callable[[int, np.random.Generator], Scores] | None = None
    """Of the number of experts and a seeded generator."""
    from_pairs: Callable[[LayerWeights, str, int, Callable[[], None] | None], Removals] | None = (
        None
    )
    """Compares the experts of a layer two by two: of the weights, an estimator of ``nmi``, a seed,
    and what to call after each pair and matrix. It may decide how many stay, too (``tau``)."""

    def __post_init__(self) -> None:
        sources = (self.from_statistics, self.from_weights, self.from_seed, self.from_pairs)
        if sum(source is not None for source in sources) != 1:
            raise ValueError(f"method {self.name}: expected exactly one source of scores")

    @property
    def needs_calibration(self) -> bool:
        return self.from_statistics is not None

    @property
    def reads_weights(self) -> bool:
        return self.from_weights is not None or self.from_pairs is not None
